"""Gated feed-forwards (GEGLU) as two products, where the exporter has one that is cut in two.

The product is the widest of a transformer block, and cutting its result means reading and writing all of it once more.
"""

from collections import Counter

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgediff.export.rewriting import Rewriting, attributes_of


def separate_gates(model: ModelProto) -> ModelProto:
    """Makes every MatMul, Add and Split into two halves a MatMul and an Add for each half.

    Args:
        model: Weights inside; changed in place.

    Returns:
        The model.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    taken = Counter(name for node in model.graph.node for name in node.input)
    taken.update(value.name for value in model.graph.output)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    rewriting = Rewriting(model)
    replaced: dict[str, list[NodeProto]] = {}
    for split in model.graph.node:
        add = made.get(split.input[0]) if split.op_type == "Split" and len(split.output) == 2 else None
        if add is None or add.op_type != "Add" or taken[add.output[0]] != 1:
            continue
        products = [made[name] for name in add.input if name in made and made[name].op_type == "MatMul"]
        biases = [weights[name] for name in add.input if name in weights]
        if len(products) != 1 or len(biases) != 1 or taken[products[0].output[0]] != 1:
            continue
        weight = weights.get(products[0].input[1])
        sizes = weights.get(split.input[1]) if len(split.input) > 1 else None
        if weight is None or len(weight.dims) != 2 or (sizes is None and len(split.input) > 1):
            continue
        if not _is_halved(split, sizes, weight, biases[0]):
            continue
        replaced[products[0].output[0]] = []
        replaced[add.output[0]] = []
        replaced[split.output[0]] = _apart(products[0].input[0], weight, biases[0], split, rewriting)
    nodes = [each for node in model.graph.node for each in replaced.get(node.output[0], [node])]
    return rewriting.finish(nodes)


def _is_halved(split: NodeProto, sizes: TensorProto | None, weight: TensorProto, bias: TensorProto) -> bool:
    """Whether the result is cut in the middle of its features."""
    said = attributes_of(split)
    features = weight.dims[1]
    if sizes is not None and numpy_helper.to_array(sizes).tolist() != [features // 2] * 2:
        return False
    return said.get("axis", 0) in (-1, 2) and list(bias.dims) == [features] and features % 2 == 0


def _apart(
    given: str, weight: TensorProto, bias: TensorProto, split: NodeProto, rewriting: Rewriting
) -> list[NodeProto]:
    nodes = []
    halves = zip(
        np.split(numpy_helper.to_array(weight), 2, axis=1), np.split(numpy_helper.to_array(bias), 2), split.output,
        strict=True,
    )  # fmt: skip
    for half_weight, half_bias, out in halves:
        kernel = rewriting.constant(f"{out}.weight", half_weight)
        shift = rewriting.constant(f"{out}.bias", half_bias)
        nodes.append(helper.make_node("MatMul", [given, kernel], [f"{out}.product"], f"{out}.product"))
        nodes.append(helper.make_node("Add", [f"{out}.product", shift], [out], out))
    return nodes
