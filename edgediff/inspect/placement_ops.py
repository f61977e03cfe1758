"""The operations of an exported graph, ONNX or ML Program, in the one form that placement rules look at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Value:
    """A tensor: its dtype as numpy calls it; its sizes, strings where they are symbolic or not known."""

    name: str
    dtype: str = ""
    shape: tuple[int | str, ...] = ("?",)
    constant: bool = False

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape)) or 'scalar'} {self.dtype}".rstrip()


@dataclass(frozen=True)
class Op:
    """An operation; inputs by MIL's name of the parameter or ONNX's position, attributes where they are strings.

    A graph's inputs, outputs and weights stand among them as ``input``, ``output`` and ``weights``.
    """

    type: str
    name: str
    inputs: Mapping[str, Value] = field(default_factory=dict)
    outputs: tuple[Value, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0

    def input(self, name: str) -> Value:
        """The input of that name, or one of which nothing is known."""
        return self.inputs.get(name, Value(name))


def onnx_ops(graph: Any) -> Iterator[Op]:
    """Reads an ONNX graph.

    Args:
        graph: The protobuf.

    Yields:
        Inputs, outputs, weights that lie outside, then the operations.
    """
    from onnx.helper import tensor_dtype_to_np_dtype

    def dtype(number: int) -> str:
        return str(tensor_dtype_to_np_dtype(number).name) if number else ""

    values = {t.name: Value(t.name, dtype(t.data_type), tuple(t.dims), True) for t in graph.initializer}
    given = [info for info in graph.input if info.name not in values]  # old files list their initializers too
    for info in (*given, *graph.output, *graph.value_info):
        kind = info.type.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
        shape = sizes if kind.HasField("shape") else ("?",)
        values.setdefault(info.name, Value(info.name, dtype(kind.elem_type), shape))
    yield from (Op("input", info.name, outputs=(values[info.name],)) for info in given)
    yield from (Op("output", info.name, outputs=(values[info.name],)) for info in graph.output)
    outside = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
    if outside:
        yield Op("weights", outside[0]["location"], bytes=sum(int(entry.get("length", 0)) for entry in outside))
    for node in graph.node:
        if node.op_type != "Constant":
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}:"
            inputs = {str(i): values.get(name, Value(name)) for i, name in enumerate(node.input) if name}
            outputs = tuple(values.get(name, Value(name)) for name in node.output)
            strings = {a.name: a.s.decode() for a in node.attribute if a.type == a.STRING}
            yield Op(domain + node.op_type, node.name, inputs, outputs, strings)


def mil_ops(spec: Any, name: str) -> Iterator[Op]:
    """Reads a function of an ML Program.

    Args:
        spec: The model's protobuf.
        name: The function.

    Yields:
        Inputs, operations that are no constants, outputs.
    """
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
