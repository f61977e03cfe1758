"""The operations of an ML Program, for the placement lint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgediff.errors import ProgramError
from edgediff.mil.package import read_package
from edgediff.targets.operations import Op, Value


def read_mlprogram(path: Path, function: str | None = None) -> list[Op]:
    """Reads the operations of a function, the default one if None, and how large the package's weights are."""
    package = read_package(path)
    name = package.default if function is None else function
    if name not in package.functions:
        raise ProgramError(f"{path} has no function {name!r}; it has: {', '.join(package.functions)}")
    size = sum(file.stat().st_size for file in package.folder.glob("weights/*"))
    return [Op("weights", "weights", bytes=size), *mil_ops(package.spec, name)]


def mil_ops(spec: Any, name: str) -> Iterator[Op]:
    """A function's inputs, its operations but the constants, its outputs."""
    function = spec.mlProgram.functions[name]
    block = function.block_specializations[function.opset]
    described = next((f.input for f in spec.description.functions if f.name == name), spec.description.input)
    ranged = {i.name for i in described if i.type.multiArrayType.WhichOneof("ShapeFlexibility") == "shapeRange"}
    values: dict[str, Value] = {}

    def declared(named: Any, constant: bool = False) -> Value:
        tensor = named.type.tensorType
        dtype = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name.lower()
        sizes = tuple(d.constant.size if d.HasField("constant") else "?" for d in tensor.dimensions)
        values[named.name] = Value(named.name, dtype, sizes, constant)
        return values[named.name]

    for given in function.inputs:
        yield Op("input", given.name, {}, (declared(given),), {"flexible": "range"} if given.name in ranged else {})
    for op in block.operations:
        constant = op.type == "const" or op.type.startswith("constexpr_")
        outputs = tuple(declared(out, constant) for out in op.outputs)
        bound = {f"{key}{i or ''}": a.name for key in op.inputs for i, a in enumerate(op.inputs[key].arguments)}
        if not constant:
            inputs = {key: values[bound[key]] for key in sorted(bound) if bound[key] in values}
            yield Op(op.type, outputs[0].name if outputs else op.type, inputs, outputs)
    yield from (Op("output", out, outputs=(values[out],)) for out in block.outputs)
