"""Weights of a .tflite file in fewer bits: codes and scales, and DEQUANTIZE before what computes with them.

The operation runs once, when a file is opened: XNNPACK takes fp16 and int8 weights with it as it takes those in fp32,
and steps are as fast. For int4 it has no such kernel: LiteRT's own run then, which took 3 times as long. There are no
blocks in this form, so int4 has one scale for each output channel.

The converter multiplies some weights by constants, such as attention's scale or a norm's; what it made is what is
rounded here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.models.stored_weights import StoredWeights
from edgediff.models.weight_formats import Half, Linear, Stored, packed_int4
from edgediff.targets.litert.tflite_file import constant, read_tflite, schema, write_tflite

# How weights may lie in a file, as the transposition that makes torch's of them: convolutions have channels last, and a
# transposed one has its outputs first, which torch has second.
LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((0, 1), (1, 0)), 4: ((0, 3, 1, 2), (3, 0, 1, 2), (0, 1, 2, 3))}


def store_weights_in_tflite(path: Path, weights: StoredWeights) -> set[str]:
    """Puts every weight that has a format into it, in a file that has fp32 weights.

    Returns:
        The names of the weights that the file has.
    """
    model, found = read_tflite(path), set()
    # Signatures share a weight's place in the file.
    known: dict[int, _Match | None] = {}
    for graph in model.subgraphs:
        for tensor in list(graph.tensors):
            place = tensor.buffer
            if place not in known:
                known[place] = _find(model, tensor, weights)
            match = known[place]
            if match is not None:
                found.update(match.names)
                _dequantize(model, graph, tensor, weights.store_as(match.names[0], match.array), match)
    write_tflite(path, model)
    return found


@dataclass(frozen=True)
class _Match:
    """Which weights a constant is.

    Attributes:
        layout: The transposition that makes torch's of it.
        array: The constant, in torch's order.
    """

    names: list[str]
    layout: tuple[int, ...]
    array: np.ndarray


def _find(model: Any, tensor: Any, weights: StoredWeights) -> _Match | None:
    """Which weights a tensor is; None where it is none of them."""
    array = constant(model, tensor)
    if array is None or array.ndim < 2:
        return None
    layouts = LAYOUTS.get(array.ndim, (tuple(range(array.ndim)),))
    for layout in layouts:
        names = weights.find(array.transpose(layout))
        if names:
            return _Match(names, layout, array.transpose(layout))
    for layout in layouts:
        scaled = weights.find_scaled(array.transpose(layout))
        if scaled is not None:
            return _Match([scaled], layout, array.transpose(layout))
    return None


def _dequantize(model: Any, graph: Any, tensor: Any, stored: Stored, match: _Match) -> None:
    """Makes a constant the result of DEQUANTIZE, of a tensor that has its place in the file."""
    s = schema()
    codes = s.TensorT()
    codes.name, codes.shape, codes.buffer, codes.hasRank = tensor.name + b";stored", tensor.shape, tensor.buffer, True
    codes.quantization = s.QuantizationParametersT()
    # The order of the file's dimensions, as torch's are transposed to it.
    back, ordered = np.argsort(match.layout), match.array.shape
    data: np.ndarray
    if isinstance(stored, Half):
        codes.type, data = s.TensorType.FLOAT16, stored.half
    else:
        assert isinstance(stored, Linear), f"{tensor.name}: no form in LiteRT"
        codes.type, data = (s.TensorType.INT8 if stored.bits == 8 else s.TensorType.INT4), stored.codes
        codes.quantization.scale = stored.scales.astype(np.float32)
        codes.quantization.zeroPoint = np.zeros(len(stored.scales), np.int64)
        # Output channels come first in torch; a table of positions has a dimension before them.
        codes.quantization.quantizedDimension = match.layout[ordered.index(len(stored.codes))]
    data = np.ascontiguousarray(data.reshape(ordered).transpose(back))
    if isinstance(stored, Linear) and stored.bits == 4:
        data = packed_int4(data)
    model.buffers[tensor.buffer].data = np.frombuffer(data.tobytes(), np.uint8)
    tensor.buffer = 0
    graph.tensors.append(codes)
    operation = s.OperatorT()
    operation.opcodeIndex = _code(model)
    operation.inputs, operation.outputs = [len(graph.tensors) - 1], [graph.tensors.index(tensor)]
    graph.operators.insert(0, operation)


def _code(model: Any) -> int:
    """DEQUANTIZE's place among a file's codes."""
    s = schema()
    code = s.BuiltinOperator.DEQUANTIZE
    for place, each in enumerate(model.operatorCodes):
        if each.builtinCode == code:
            return place
    made = s.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode, made.version = code, code, 1
    model.operatorCodes.append(made)
    return len(model.operatorCodes) - 1
