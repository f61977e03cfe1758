"""Nearest upsampling by two and the convolution behind it, as four small convolutions at the lower resolution.

Of the nine pixels under a 3 x 3 kernel on a doubled map, only four differ. Which weights they get depends on whether
row and column of the result are even or odd: four kernels of 2 x 2, whose weights are sums of the 3 x 3 ones, compute
the four kinds of pixels. That is 16 multiplications instead of 36, and the doubled map is never stored.
"""

import logging

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgediff.targets.onnx.kernels import Convolution, convolution, kernels
from edgediff.targets.onnx.rewriting import Rewriting, attributes_of

log = logging.getLogger(__name__)

# Weights of a kernel's three rows that fall on each of the two rows of pixels below an even and below an odd row.
_ROWS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
_TWICE = [1.0, 1.0, 2.0, 2.0]


def merge_upsampling(model: ModelProto) -> ModelProto:
    """Writes every nearest upsampling by two whose result one convolution takes as four convolutions."""
    graph = model.graph
    rewriting = Rewriting(model)
    small = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL}
    alone = [node for node in graph.node if rewriting.taken[node.output[0]] == 1]
    doubled = {node.output[0]: node for node in alone if _is_doubling(node, small)}
    nodes: list[NodeProto] = []
    merged = set()
    for node in graph.node:
        found = convolution(node, rewriting)
        if found is not None and node.input[0] in doubled:
            merged.add(node.input[0])
            nodes += _merged(doubled[node.input[0]].input[0], found, rewriting)
        else:
            nodes.append(node)
    if not merged:
        return model
    log.info("upsampling: %d merged into the convolution behind it", len(merged))
    return rewriting.finish([node for node in nodes if node.output[0] not in merged])


def _is_doubling(node: NodeProto, small: dict[str, TensorProto]) -> bool:
    if node.op_type != "Resize" or len(node.input) < 3 or node.input[2] not in small:
        return False
    said = attributes_of(node)
    nearest = said.get("mode", b"nearest") == b"nearest" and said.get("nearest_mode") == b"floor"
    plain = said.get("coordinate_transformation_mode") == b"asymmetric" and "axes" not in said
    return nearest and plain and numpy_helper.to_array(small[node.input[2]]).tolist() == _TWICE


def _merged(x: str, of: Convolution, rewriting: Rewriting) -> list[NodeProto]:
    """The nodes that make the convolution's result from the map before it was doubled."""
    sums = np.einsum("pax,qby->pqabxy", _ROWS, _ROWS).reshape(4, 4, 9)
    small, nodes = kernels(of, "upsampling", sums, (2, 2), rewriting)
    out = of.node.output[0]
    made = [f"{out}.pixels.{k}" for k in range(4)]
    for k, (kernel, pixels) in enumerate(zip(small, made, strict=True)):
        row, column = divmod(k, 2)
        # An even row looks up from its own pixel, an odd one down.
        pads = [1 - row, 1 - column, row, column]
        nodes.append(helper.make_node("Conv", [x, kernel, *of.bias], [pixels], pixels, pads=pads, kernel_shape=[2, 2]))
    nodes.append(helper.make_node("Concat", made, [f"{out}.pixels"], f"{out}.pixels", axis=1))
    nodes.append(helper.make_node("DepthToSpace", [f"{out}.pixels"], [out], out, blocksize=2, mode="DCR"))
    return nodes
