"""The operations of an ONNX graph, for the placement lint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from edgediff.targets.operations import Op, Value


def read_onnx(path: Path) -> list[Op]:
    """Reads a graph's operations without its weights."""
    model = onnx.load(path, load_external_data=False)
    # Exported graphs carry the shapes of everything; inferring them copies the model.
    model = model if model.graph.value_info else onnx.shape_inference.infer_shapes(model)
    return list(onnx_ops(model.graph))


def onnx_ops(graph: Any) -> Iterator[Op]:
    """A graph's inputs, outputs and weights that lie outside, then its operations."""

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
        yield Op(
            "weights",
            ", ".join(sorted({entry["location"] for entry in outside})),
            bytes=sum(int(entry.get("length", 0)) for entry in outside),
        )
    for node in graph.node:
        if node.op_type != "Constant":
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}:"
            inputs = {str(i): values.get(name, Value(name)) for i, name in enumerate(node.input) if name}
            outputs = tuple(values.get(name, Value(name)) for name in node.output)
            strings = {a.name: a.s.decode() for a in node.attribute if a.type == a.STRING}
            yield Op(domain + node.op_type, node.name, inputs, outputs, strings)
