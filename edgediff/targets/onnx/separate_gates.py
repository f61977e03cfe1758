"""Gated feed-forwards (GEGLU) as two matmuls, where the exporter writes one and splits its result.

That matmul is the widest of a transformer block, and splitting its result reads and writes all of it once more.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from edgediff.targets.onnx.rewriting import Rewriting, attributes_of, renamed

PRODUCTS = ("Gemm", "MatMul")
# An initialiser's name in; the names of the halves of its last axis out.
Halves = Callable[[str], Sequence[str]]


def separate_gates(model: ModelProto) -> ModelProto:
    """Makes every MatMul, Add and Split into two halves a MatMul and an Add for each half; weights lie inside."""
    made = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    rewriting = Rewriting(model)

    def halves(name: str) -> list[str]:
        arrays = np.split(numpy_helper.to_array(weights[name]), 2, axis=-1)
        return [rewriting.constant(f"{name}.half.{half}", array) for half, array in enumerate(arrays)]

    replaced: dict[str, list[NodeProto]] = {}
    for split in model.graph.node:
        add = made.get(split.input[0]) if split.op_type == "Split" and len(split.output) == 2 else None
        if add is None or add.op_type != "Add" or rewriting.taken[add.output[0]] != 1:
            continue
        products = [made[name] for name in add.input if name in made and made[name].op_type == "MatMul"]
        biases = [weights[name] for name in add.input if name in weights]
        if len(products) != 1 or len(biases) != 1 or rewriting.taken[products[0].output[0]] != 1:
            continue
        sizes = weights.get(split.input[1]) if len(split.input) > 1 else None
        if sizes is None and len(split.input) > 1:
            continue
        if not is_halvable([products[0], add], rewriting) or not _is_halved(split, sizes, biases[0]):
            continue
        replaced[products[0].output[0]] = []
        replaced[add.output[0]] = []
        replaced[split.output[0]] = halved([products[0], add], split, rewriting, halves)
    nodes = [each for node in model.graph.node for each in replaced.get(node.output[0], [node])]
    return rewriting.finish(nodes)


def _is_halved(split: NodeProto, sizes: TensorProto | None, bias: TensorProto) -> bool:
    """Whether the result is cut in the middle of its features."""
    said = attributes_of(split)
    features = bias.dims[-1]
    if sizes is not None and numpy_helper.to_array(sizes).tolist() != [features // 2] * 2:
        return False
    return said.get("axis", 0) in (-1, 2) and len(bias.dims) == 1 and features % 2 == 0


def is_halvable(linear: Sequence[NodeProto], rewriting: Rewriting) -> bool:
    """Whether halves of a linear layer's features are the layer with halves of its weight and bias.

    `linear` is a Gemm or MatMul, what adds a bias to its result, what reshapes that. The weight must have two axes,
    features last, and nothing may be added but constants.
    """
    sizes = rewriting.weights.get(linear[0].input[1], [])
    if len(sizes) != 2 or attributes_of(linear[0]).get("transB", 0):
        return False
    own = {linear[0].input[0], *(name for node in linear for name in node.output)}
    added = [name for node in linear if node.op_type != "Reshape" for name in node.input if name not in own]
    return all(rewriting.weights.get(name, [])[-1:] == sizes[1:] for name in added)


def halved(linear: Sequence[NodeProto], split: NodeProto, rewriting: Rewriting, halves: Halves) -> list[NodeProto]:
    """The nodes that compute each half of a linear layer's result for itself, as what `split` makes of it."""
    sizes = [node.input[1] for node in linear if node.op_type == "Reshape"]
    constants = [name for node in linear for name in node.input if name in rewriting.weights and name not in sizes]
    pairs = {name: halves(name) for name in constants}
    nodes = []
    for half, out in enumerate(split.output):
        names = {name: f"{out}.{name}" for node in linear for name in node.output} | {split.input[0]: out}
        names |= {name: pair[half] for name, pair in pairs.items()}
        for name in sizes:
            names[name] = rewriting.constant(f"{out}.sizes", np.array([-1, *rewriting.shape(out)[1:]]))
        nodes += [renamed(node, names) for node in linear]
    return nodes
