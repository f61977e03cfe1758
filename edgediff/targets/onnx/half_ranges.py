"""Which operations of an ONNX graph stay fp32 when the rest becomes fp16: those whose numbers fp16 does not hold.

Ranges are measured, in fp32, on what goes into the graph along real trajectories; no operation is kept for its name
alone. A result of more than half of fp16's range counts as beyond it, since another prompt or seed may double it.
Norms are looked into as well: they square their inputs, and a kernel that adds in fp16 overflows from 256 on, or gives
finite numbers that are wrong where the variance is below fp16's smallest normal number.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from edgediff.targets.base import LARGEST_HALF
from edgediff.targets.onnx.half_precision import MASKED, element_types
from edgediff.targets.onnx.measured_ranges import open_graph
from edgediff.targets.onnx.rewriting import attributes_of

# How many times larger another prompt or seed may make a number, or smaller a variance.
MARGIN = 2.0
SMALLEST_NORMAL = 2.0**-14
NORMS = ("InstanceNormalization", "LayerNormalization")


def beyond_half(model: ModelProto, folder: Path, feeds: Iterable[Mapping[str, np.ndarray]]) -> set[str]:
    """Finds the nodes that fp16 is too narrow for.

    Args:
        model: A graph in fp32, of standard operators.
        folder: Where weights outside of the graph lie.
        feeds: Inputs of some runs.

    Returns:
        The first output of every node that makes or takes a number beyond fp16's range, or that is a norm whose squares
        leave it.
    """
    kinds = element_types(model)
    made = [name for node in model.graph.node for name in node.output if kinds.get(name) == TensorProto.FLOAT]
    given = [value.name for value in model.graph.input if kinds[value.name] == TensorProto.FLOAT]
    norms = [node for node in model.graph.node if node.op_type in NORMS]
    largest = dict.fromkeys([*given, *made], 0.0)
    smallest = {node.output[0]: math.inf for node in norms}
    watched = ModelProto()
    watched.CopyFrom(model)
    names = _watch(watched, list(largest), norms)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ranges-") as scratch:
        path = Path(scratch).with_suffix(".onnx")
        try:
            path.write_bytes(watched.SerializeToString())
            session = open_graph(os.fspath(path), optimized=False)
        finally:
            path.unlink(missing_ok=True)
    for each in feeds:
        floats = {
            name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in each.items()
        }
        numbers = dict(zip(names, map(float, session.run(names, floats)), strict=True))
        for name in largest:
            largest[name] = _larger(largest[name], numbers[f"{name}.largest"])
        for name in smallest:
            smallest[name] = min(smallest[name], numbers[f"{name}.variance"])
    wide = {name for name, size in largest.items() if not size * MARGIN <= LARGEST_HALF}
    kept = {node.output[0] for node in model.graph.node if wide & {*node.input, *node.output}}
    for node in norms:
        squares = (largest.get(node.input[0], 0.0) * MARGIN) ** 2
        if squares > LARGEST_HALF or smallest[node.output[0]] < MARGIN * SMALLEST_NORMAL:
            kept.add(node.output[0])
    return kept


def _larger(one: float, other: float) -> float:
    """NaN counts as the largest of all."""
    return math.inf if math.isnan(other) else max(one, other)


def _watch(model: ModelProto, tensors: list[str], norms: list[onnx.NodeProto]) -> list[str]:
    """Makes a graph give the largest magnitude of tensors and the smallest variance in norms; the outputs' names."""
    make, graph = helper.make_node, model.graph
    del graph.output[:]
    # Minus infinity of a mask is another number in fp16.
    for name, value in (("ranges.masked", MASKED), ("ranges.zero", 0.0)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
    names = []

    def output(name: str) -> None:
        names.append(name)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))

    for name in tensors:
        graph.node.extend([
            make("LessOrEqual", [name, "ranges.masked"], [f"{name}.is_masked"]),
            make("Where", [f"{name}.is_masked", "ranges.zero", name], [f"{name}.counted"]),
            make("Abs", [f"{name}.counted"], [f"{name}.magnitude"]),
            make("ReduceMax", [f"{name}.magnitude"], [f"{name}.largest"], keepdims=0),
        ])  # fmt: skip
        output(f"{name}.largest")
    for node in norms:
        name, key = node.output[0], node.input[0]
        if node.op_type == "LayerNormalization":
            axis = 1
            start = attributes_of(node).get("axis", -1)
            graph.node.append(make("Flatten", [key], [f"{name}.flat"], axis=start))
        else:  # an instance norm's rows are its channels, which may be groups of a UNet's
            axis = 2
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, -1], np.int64), f"{name}.rows"))
            graph.node.append(make("Reshape", [key, f"{name}.rows"], [f"{name}.flat"]))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), f"{name}.axis"))
        graph.node.extend([
            make("ReduceMean", [f"{name}.flat", f"{name}.axis"], [f"{name}.mean"], keepdims=1),
            make("Sub", [f"{name}.flat", f"{name}.mean"], [f"{name}.centred"]),
            make("Mul", [f"{name}.centred", f"{name}.centred"], [f"{name}.squared"]),
            make("ReduceMean", [f"{name}.squared", f"{name}.axis"], [f"{name}.variances"], keepdims=0),
            make("ReduceMin", [f"{name}.variances"], [f"{name}.variance"], keepdims=0),
        ])  # fmt: skip
        output(f"{name}.variance")
    return names
