"""int8 weights and matmuls in an exported ONNX graph, with QuantizeLinear and DequantizeLinear around them.

Constraints that shaped this file, all measured (benchmarks/README.md):

- Quantization noise adds up: the squared errors of single layers sum to the error of all together. On the models here
  most of it comes from the few layers that write to the skip connections without a normalization after them: the first
  and the last convolution and the shortcuts that change the number of channels. They are cheap and stay in fp32.
- ONNX Runtime has int8 kernels for a convolution only with an int8 result, for a MatMul with a float result, and for
  Gemm none. So convolutions get int8 inputs and outputs, MatMuls int8 inputs, and Gemm (the projections of the
  timestep) stays in fp32.
- OpenVINO has int8 kernels for both matmuls of attention, if queries, keys and values are signed. ONNX Runtime has
  none, and its own attention operator is faster in fp32.
- x86 processors without VNNI add pairs of int8 products in 16 bits. ONNX Runtime has slower kernels that do not
  overflow, OpenVINO does not: there weights get half the levels, so that the sum fits.
- Matmuls of the text stay in fp32: calibration has seen one prompt, and they are few.
"""

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgediff.targets.onnx.attention import ATTENTION_WEIGHTS
from edgediff.targets.onnx.passes import Pass
from edgediff.targets.onnx.rewriting import Rewriting

# Lowest and highest value of a tensor.
Range = tuple[float, float]
LEVELS = 255
# Weights are symmetric: zero stays zero without a zero point.
WEIGHT_LEVELS = 127
# The sum of two products of an input and such a weight is less than 2^15.
HALVED_WEIGHT_LEVELS = 63
SCALING = ("Add", "Sub", "Mul", "Div", "Cast")


def quantized_nodes(model: ModelProto) -> list[NodeProto]:
    """Chooses what is quantized: convolutions and matmuls with constant weights, except the sensitive ones."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    given = {value.name for value in model.graph.input}
    ends = _ends(model)

    def is_quantized(node: NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or len(node.input) < 2 or node.input[1] not in weights:
            return False
        weight = weights[node.input[1]]
        if node.op_type == "Conv":
            return not ends & {node.input[0], node.output[0]} and _is_inner(node, weight)
        return node.op_type == "MatMul" and node.input[0] not in given and len(weight.dims) == 2

    return [node for node in model.graph.node if is_quantized(node)]


def _ends(model: ModelProto) -> set[str]:
    """The sample and the output, also before and after what scales or centers them."""
    ends = {"sample", "out_sample"}
    for node in model.graph.node:
        if node.op_type in SCALING and ends & set(node.input):
            ends.update(node.output)
    for node in reversed(model.graph.node):
        if node.op_type in SCALING and ends & set(node.output):
            ends.update(node.input)
    return ends


def _is_inner(conv: NodeProto, weight: TensorProto) -> bool:
    """Whether a convolution's noise passes a normalization: it is no shortcut."""
    channels_out, channels_in, *kernel = weight.dims
    groups = next((attribute.i for attribute in conv.attribute if attribute.name == "group"), 1)
    return groups == 1 and (channels_in == channels_out or max(kernel) > 1)


def observed_tensors(model: ModelProto) -> list[str]:
    """Names the tensors whose ranges quantization needs.

    Returns:
        Each once: inputs of all quantized nodes, outputs of convolutions, and what decomposed attentions take
        and weigh by.
    """
    nodes = quantized_nodes(model)
    outputs = (node.output[0] for node in nodes if node.op_type == "Conv")
    attentions = (name for names in attended(model).values() for name in names)
    return list(dict.fromkeys([*(node.input[0] for node in nodes), *outputs, *attentions]))


def attended(model: ModelProto) -> dict[str, tuple[str, str, str, str]]:
    """Finds decomposed attentions: by the result's name, query, key and value by heads, and the softmax's weights."""
    weights = (node.output[0] for node in model.graph.node if node.op_type == "Softmax")
    results = [name.removesuffix(ATTENTION_WEIGHTS) for name in weights if name.endswith(ATTENTION_WEIGHTS)]
    return {out: (f"{out}.q", f"{out}.k", f"{out}.v", f"{out}{ATTENTION_WEIGHTS}") for out in results}


def quantize(model: ModelProto, ranges: Mapping[str, Range], weight_levels: int = WEIGHT_LEVELS) -> ModelProto:
    """Quantizes a graph: uint8 values with a zero point for tensors, int8 for weights with a scale for each channel.

    Args:
        model: The graph, weights inside; changed in place.
        ranges: Of each of its `observed_tensors`.
        weight_levels: Largest magnitude of a weight, 127 or less.
    """
    rewritten = _Quantizing(model, ranges, weight_levels)
    chosen = {node.output[0] for node in quantized_nodes(model)}
    attentions = attended(model).values()
    is_signed = {name: name != weights for *taken, weights in attentions for name in (*taken, weights)}
    for node in list(model.graph.node):
        if node.output[0] in chosen:
            rewritten.quantize(node)
        elif node.output[0] in is_signed:
            rewritten.round_output(node, is_signed[node.output[0]])
        else:
            rewritten.nodes.append(node)
    return rewritten.finish(rewritten.nodes)


class _Quantizing(Rewriting):
    """A graph while it is quantized: nodes so far, and what of them is there to be shared."""

    def __init__(self, model: ModelProto, ranges: Mapping[str, Range], weight_levels: int) -> None:
        super().__init__(model)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.ranges = ranges
        self.weight_levels = weight_levels
        self.nodes: list[NodeProto] = []
        self.quantized: dict[str, str] = {}

    def quantize(self, node: NodeProto) -> None:
        """Adds a node with what is quantized around it."""
        given, weight = node.input[:2]
        if given not in self.quantized:
            self.quantized[given] = self._round_trip(given, f"{given}.dequantized")
        if weight not in self.quantized:
            self.quantized[weight] = self._weight(weight, axis=0 if node.op_type == "Conv" else 1)
        node.input[0], node.input[1] = self.quantized[given], self.quantized[weight]
        if node.op_type == "Conv":
            self.round_output(node)
        else:
            self.nodes.append(node)

    def round_output(self, node: NodeProto, is_signed: bool = False) -> None:
        """Adds a node whose result is rounded: whoever takes it takes rounded values already."""
        made = node.output[0]
        node.output[0] = f"{made}.exact"
        self.nodes.append(node)
        self.quantized[made] = self._round_trip(made, made, source=node.output[0], is_signed=is_signed)

    def _round_trip(self, name: str, result: str, source: str | None = None, is_signed: bool = False) -> str:
        """Adds QuantizeLinear and DequantizeLinear of a tensor."""
        scale, zero = (symmetric if is_signed else affine)(self.ranges[name])
        constants = [self.constant(f"{name}.scale", scale), self.constant(f"{name}.zero_point", zero)]
        rounded = f"{name}.quantized"
        self.nodes.append(
            helper.make_node("QuantizeLinear", [name if source is None else source, *constants], [rounded])
        )
        self.nodes.append(helper.make_node("DequantizeLinear", [rounded, *constants], [result]))
        return result

    def _weight(self, name: str, axis: int) -> str:
        """Adds an int8 weight with its DequantizeLinear."""
        rounded, scale = quantized_weight(numpy_helper.to_array(self.tensors[name]), axis, self.weight_levels)
        constants = [
            self.constant(f"{name}.quantized", rounded),
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", np.zeros(len(scale), np.int8)),
        ]
        result = f"{name}.dequantized"
        self.nodes.append(helper.make_node("DequantizeLinear", constants, [result], axis=axis))
        return result


def affine(extent: Range) -> tuple[np.ndarray, np.ndarray]:
    """Scale, float32 [], and zero point, uint8 [], by which uint8 covers a range and zero, which stays exact.

    >>> scale, zero = affine((-1.0, 1.55))
    >>> float(scale), int(zero)
    (0.009999999776482582, 100)
    """
    low, high = min(extent[0], 0.0), max(extent[1], 0.0)
    scale = _usable((high - low) / LEVELS)
    return np.array(scale, np.float32), np.array(round(-low / scale), np.uint8)


def symmetric(extent: Range) -> tuple[np.ndarray, np.ndarray]:
    """Scale, float32 [], and zero point, int8 [], by which int8 covers a range and its mirror image."""
    return np.array(_usable(max(map(abs, extent)) / WEIGHT_LEVELS), np.float32), np.array(0, np.int8)


def _usable(scale: float) -> float:
    """The scale, or 1 where the tensor is always zero."""
    return 1.0 if scale < np.finfo(np.float32).tiny else scale


def quantized_weight(weight: np.ndarray, axis: int, levels: int = WEIGHT_LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """A weight in int8, of magnitudes up to `levels`, and its scales along an axis, float32 [channels].

    >>> rounded, scale = quantized_weight(np.array([[1.27, -0.64], [0.0, 0.0]], np.float32), axis=0)
    >>> rounded.tolist(), [round(float(each), 4) for each in scale]
    ([[127, -64], [0, 0]], [0.01, 1.0])
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = (np.abs(weight).max(axis=others) / levels).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale


def quantizing(ranges: Mapping[str, Range], weight_levels: int = WEIGHT_LEVELS) -> Pass:
    """The pass that quantizes with these ranges."""
    return Pass("quantize", lambda model: quantize(model, ranges, weight_levels))
