"""fp16 graphs in fp32 arithmetic: whether their constants are right, and which of their tensors leave fp16's range."""

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from edgediff.bundle.rows import Finding
from edgediff.targets.base import LARGEST_HALF
from edgediff.targets.onnx.half_precision import Converting, to_float
from edgediff.targets.onnx.measured_ranges import open_graph
from edgediff.targets.onnx.pool_weights import WeightFile
from edgediff_runtime import Bundle
from edgediff_runtime.manifest import Graph

# A tensor that uses more than half of the range is a warning: another prompt or seed may double it.
HEADROOM = 0.5
# The largest are always reported.
SHOWN = 3


class UnroundedSession:
    """A component's fp16 ONNX graphs in fp32 arithmetic, on the weights that they have."""

    batch: int | None = None

    def __init__(self, bundle: Bundle, component: str) -> None:
        """Loads the graphs."""
        self.graphs = bundle.manifest.target("onnx").component(component).graphs
        self._sessions = {graph.name: _opened(bundle, graph)[0] for graph in self.graphs if graph.file is not None}

    def put(self, array: np.ndarray) -> Any:
        """Takes an array in fp32 where it is fp16."""
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def get(self, value: Any) -> np.ndarray:
        """Gives a tensor back."""
        return np.array(value)

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on the named tensors and adds its outputs."""
        names = [tensor.name for tensor in graph.outputs]
        made = self._sessions[graph.name].run(names, {tensor.name: tensors[tensor.name] for tensor in graph.inputs})
        tensors.update(zip(names, made, strict=True))


def findings(bundle: Bundle, graph: Graph, inputs: Mapping[str, np.ndarray]) -> tuple[Finding, ...]:
    """Runs an fp16 graph once in fp32 arithmetic and reports what fp16 cannot hold.

    On CPUs ONNX Runtime computes several operators in a row in fp32, so that an overflow need not show there.

    Returns:
        Overflows in the graph's order, then by headroom all that use half of the range, and the `SHOWN` largest.
    """
    session, rounded = _opened(bundle, graph, watched=True)
    feeds = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in inputs.items()}
    names = [f"{name}.{what}" for what in ("largest", "beyond") for name in rounded]
    numbers = np.array(session.run(names, feeds)).reshape(2, -1).T
    overflows, full = [], []
    for node, (largest, beyond) in zip(rounded.values(), numbers.tolist(), strict=True):
        share = largest / LARGEST_HALF
        if beyond:
            found = Finding("overflow", graph.name, node.name, node.op_type, beyond, largest=largest)
            overflows.append(found)
        else:
            full.append(Finding("headroom", graph.name, node.name, node.op_type, share, warns=share >= HEADROOM))
    full.sort(key=lambda finding: -finding.value)
    kept = [finding for place, finding in enumerate(full) if place < SHOWN or finding.warns]
    return (*overflows, *kept)


def _watch(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Adds to a graph's outputs the largest magnitude of tensors, and how many numbers fp16 does not hold."""
    make, graph = onnx.helper.make_node, model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(LARGEST_HALF, np.float32), "fp16.largest"))
    for name in names:
        size, fits, over, count = (f"{name}.{what}" for what in ("magnitude", "fits", "over", "counted"))
        graph.node.extend([
            make("Abs", [name], [size]),
            make("ReduceMax", [size], [f"{name}.largest"], keepdims=0),
            # NaN is not less or equal either.
            make("LessOrEqual", [size, "fp16.largest"], [fits]),
            make("Not", [fits], [over]),
            make("Cast", [over], [count], to=onnx.TensorProto.FLOAT),
            make("ReduceSum", [count], [f"{name}.beyond"], keepdims=0),
        ])  # fmt: skip
        for what in ("largest", "beyond"):
            value = onnx.helper.make_tensor_value_info(f"{name}.{what}", onnx.TensorProto.FLOAT, [])
            graph.output.append(value)


def _opened(bundle: Bundle, graph: Graph, watched: bool = False) -> tuple[Any, dict[str, NodeProto]]:
    """A session of a graph in fp32 arithmetic, and the nodes whose results were fp16.

    Its weights are converted from file to file and mapped, since there may be too many for one protobuf or for memory.
    """
    path = bundle.path / str(graph.file)
    with tempfile.TemporaryDirectory() as folder:
        with WeightFile(Path(folder) / "weights.bin", math.inf) as file:
            model, rounded = to_float(onnx.load(path, load_external_data=False), Converting(path.parent, file))
        if watched:
            _watch(model, rounded)
        made = Path(folder) / "model.onnx"
        made.write_bytes(model.SerializeToString())
        return open_graph(os.fspath(made), optimized=not watched), rounded
