"""Weights of an ONNX graph in fewer bits: codes and scales in the file, and the operators that make the weight of them.

Whoever runs the graph may make the weights once, when it is opened, or in each run: ONNX Runtime makes MatMulNBits of a
matmul whose weight comes out of DequantizeLinear, and folds all of them where ``session.disable_quant_qdq`` is set.
Others keep the codes and make the weights as they are needed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgediff.models.stored_weights import StoredWeights
from edgediff.models.weight_formats import BLOCK, Half, Linear, Stored, packed_int4
from edgediff.targets.onnx.passes import Pass
from edgediff.targets.onnx.pool_weights import read_weight


def store_weights(model: ModelProto, weights: StoredWeights, folder: Path = Path()) -> set[str]:
    """Puts every weight that has a format into it.

    Args:
        model: In fp32; changed in place.
        folder: Where weights outside of the graph lie.

    Returns:
        The names of the weights that the graph has.
    """
    graph, found = model.graph, set()
    kept, nodes = [], []
    for tensor in graph.initializer:
        names, transposed = _find(tensor, weights, folder)
        if not names:
            kept.append(tensor)
            continue
        found.update(names)
        tensors, made = encoded(tensor.name, list(tensor.dims), weights.stored(names[0]), transposed)
        kept += tensors
        nodes += made
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes += list(graph.node)
    # Shapes between nodes are a tenth of a small graph's file, and readers infer them.
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return found


def storing(weights: StoredWeights, found: set[str], folder: Path) -> Pass:
    """The pass that does it; the names of the weights that it finds are added to `found`."""

    def apply(model: ModelProto) -> ModelProto:
        found.update(store_weights(model, weights, folder))
        return model

    return Pass("store-weights", apply)


def _find(tensor: TensorProto, weights: StoredWeights, folder: Path) -> tuple[list[str], bool]:
    """Which weights an initialiser is, and whether it is transposed: matmuls take inputs first, torch outputs."""
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
        return [], False
    array = read_weight(tensor, folder)
    names = weights.find(array)
    if names or array.ndim != 2:
        return names, False
    return weights.find(array.T), True


def encoded(name: str, shape: list[int], stored: Stored, transposed: bool) -> tuple[list[TensorProto], list[NodeProto]]:
    """Initialisers and nodes of which the last one gives a weight in float32, under its name and of its shape."""
    if isinstance(stored, Half):
        half = stored.half.reshape(len(stored.half), -1).T if transposed else stored.half
        tensor = numpy_helper.from_array(np.ascontiguousarray(half).reshape(shape), f"{name}.half")
        return [tensor], [helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.float", to=TensorProto.FLOAT)]
    if not isinstance(stored, Linear):
        raise TypeError(f"{name}: {type(stored).__name__} has no form in ONNX")
    in_blocks = stored.scales.ndim == 2
    codes = stored.codes.reshape(len(stored.codes), -1) if in_blocks or transposed else stored.codes
    scales = stored.scales
    if transposed:
        codes, scales = codes.T, scales.T
    tensors = [_codes(f"{name}.codes", codes, stored.bits), numpy_helper.from_array(
        np.ascontiguousarray(scales), f"{name}.scales")]  # fmt: skip
    nodes, scale = [], f"{name}.scales"
    if scales.dtype == np.float16:
        scale = f"{name}.scales.float"
        nodes.append(helper.make_node("Cast", [f"{name}.scales"], [scale], scale, to=TensorProto.FLOAT))
    axis = int(in_blocks) ^ int(transposed)
    how: dict[str, Any] = {"axis": axis, "block_size": BLOCK} if in_blocks else {"axis": axis}
    is_flat = list(codes.shape) != shape
    made = f"{name}.flat" if is_flat else name
    nodes.append(helper.make_node("DequantizeLinear", [f"{name}.codes", scale], [made], f"{name}.dequantize", **how))
    if is_flat:
        tensors.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape"))
        nodes.append(helper.make_node("Reshape", [made, f"{name}.shape"], [name], f"{name}.reshape"))
    return tensors, nodes


def _codes(name: str, codes: np.ndarray, bits: int) -> TensorProto:
    """int8 codes as they are; of four bits two in a byte."""
    if bits == 8:
        return numpy_helper.from_array(np.ascontiguousarray(codes), name)
    data = packed_int4(codes).tobytes()
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=data)
