"""Convolutions of 3 x 3 whose kernels a pass replaces.

New kernels are sums of the old one's weights. The graph computes the sums, once when it is loaded: files keep the
model's weights, which graphs with and without the pass share. Copies take most of that time, so a kernel is one matmul
with the weights where possible, and nothing is split.
"""

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from edgediff.targets.onnx.rewriting import Rewriting, attributes_of

_PLAIN = {"group": 1, "strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}


@dataclass(frozen=True)
class Convolution:
    """A convolution of 3 x 3, stride 1, with a pixel of zeros around, and its numbers of channels."""

    node: NodeProto
    outputs: int
    inputs: int

    @property
    def bias(self) -> list[str]:
        """Name of its bias, in a list; an empty one where it has none."""
        return list(self.node.input[2:3])


def convolution(node: NodeProto, rewriting: Rewriting) -> Convolution | None:
    """Reads a node; None where it is no such convolution, or its kernel is no weight or another node's too."""
    if node.op_type != "Conv":
        return None
    sizes = rewriting.weights.get(node.input[1], [])
    said = attributes_of(node)
    # Defaults of missing attributes: no padding, and a kernel of the weight's size.
    said = {"pads": [0, 0, 0, 0], "kernel_shape": sizes[2:]} | said
    shared = rewriting.taken[node.input[1]] > 1
    if shared or len(sizes) != 4 or any(said.get(name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    return Convolution(node, sizes[0], sizes[1])


def kernels(
    of: Convolution, name: str, sums: np.ndarray, shape: tuple[int, int], rewriting: Rewriting
) -> tuple[list[str], list[NodeProto]]:
    """New kernels [O, C, *shape] from a convolution's own, by their names, and the nodes that compute them.

    `sums` [K, H * W, 9] are the weights of the K new kernels, as sums of the old one's.
    """
    weights = rewriting.reshape(of.node.input[1], [of.outputs, of.inputs, 1, 9])
    made = [f"{of.node.output[0]}.{name}.{k}" for k in range(len(sums))]
    flat = made if shape[0] == 1 else [f"{kernel}.flat" for kernel in made]
    nodes = []
    for k, (row, kernel) in enumerate(zip(flat, made, strict=True)):
        matrix = rewriting.constant(f"{name}.sums.{k}", sums[k].T.astype(np.float32))
        nodes.append(helper.make_node("MatMul", [weights, matrix], [row], row))
        if row != kernel:
            sizes = rewriting.constant(f"{name}.{of.outputs}x{of.inputs}", np.array([of.outputs, of.inputs, *shape]))
            nodes.append(helper.make_node("Reshape", [row, sizes], [kernel], kernel))
    return made, nodes
