"""The operations of a .tflite file's signature, for the placement lint."""

from pathlib import Path
from typing import Any

from edgediff.targets.litert.tflite_file import operations, read_tflite, schema
from edgediff.targets.operations import Op, Value


def read_signature(path: Path, name: str) -> list[Op]:
    """The operations of one signature, named by the tensor that each gives."""
    model = read_tflite(path)
    (place,) = [each.subgraphIndex for each in model.signatureDefs if each.signatureKey.decode() == name]
    chosen = model.subgraphs[place]
    dtypes = {code: kind.lower() for kind, code in vars(schema().TensorType).items() if isinstance(code, int)}
    values = [_value(model, tensor, dtypes) for tensor in chosen.tensors]
    found = []
    for graph, operation, kind in operations(model):
        if graph is chosen:
            inputs = {str(i): values[at] for i, at in enumerate(operation.inputs) if at >= 0}
            outputs = tuple(values[at] for at in operation.outputs)
            found.append(Op(kind, outputs[0].name, inputs, outputs))
    return found


def _value(model: Any, tensor: Any, dtypes: dict[int, str]) -> Value:
    shape = () if tensor.shape is None else tuple(map(int, tensor.shape))
    data = model.buffers[tensor.buffer].data
    return Value(tensor.name.decode(), dtypes[tensor.type], shape, data is not None and len(data) > 0)
