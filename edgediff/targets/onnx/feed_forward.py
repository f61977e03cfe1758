"""Gated feed-forwards (GEGLU) a slice of the tokens at a time.

Between its two matmuls a feed-forward holds eight times its input: 42 MB for an image at the highest resolution of
Stable Diffusion v1.5, written to memory and read again four times. Tokens are independent there, so each slice of them
runs through the whole feed-forward, and the intermediate values stay in the processor's cache. Value and gate are
separate matmuls, so that no result is split: the graph splits the weight instead, once when it is loaded. Files keep
the model's weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgediff.targets.onnx.rewriting import Rewriting, attributes_of, equal_slices, renamed
from edgediff.targets.onnx.separate_gates import PRODUCTS, Halves, halved, is_halvable

log = logging.getLogger(__name__)

# Bytes of a slice between the matmuls, for one row of the batch. Smaller slices are slower, as small matmuls are.
SLICE_BYTES = 12 * 2**20
_LINEAR = (*PRODUCTS, "Reshape", "Add")


@dataclass(frozen=True)
class _FeedForward:
    """One feed-forward.

    Attributes:
        flat: Reshapes what it is given, [B, T, C]; may be nothing.
        linear: Makes value and gate side by side, [B, T, 2 H].
        split: Takes them apart.
        after: From there to what it makes, [B, T, C].
        tokens: T.
        slices: How many slices it is to be computed in.
    """

    flat: tuple[NodeProto, ...]
    linear: tuple[NodeProto, ...]
    split: NodeProto
    after: tuple[NodeProto, ...]
    tokens: int
    slices: int

    @property
    def nodes(self) -> tuple[NodeProto, ...]:
        """All of it, in order."""
        return (*self.flat, *self.linear, self.split, *self.after)


def slice_feed_forwards(model: ModelProto) -> ModelProto:
    """Writes every gated feed-forward that holds much as one slice of its tokens after the other."""
    rewriting = Rewriting(model)
    search = _Search(rewriting)
    found = [each for node in model.graph.node if node.op_type == "Split" and (each := search.around(node)) is not None]
    if not found:
        return model
    log.info("feed-forward: %d in slices", len(found))
    ends = {each.nodes[-1].output[0]: each for each in found}
    inside = {node.output[0] for each in found for node in each.nodes}
    cuts: dict[str, NodeProto] = {}

    def halves(weight: str) -> Sequence[str]:
        made = [f"{weight}.half.{half}" for half in range(2)]
        cuts[weight] = helper.make_node("Split", [weight], made, f"{weight}.halves", axis=-1, num_outputs=2)
        return made

    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in ends:
            nodes += _sliced(ends[node.output[0]], rewriting, halves)
        elif node.output[0] not in inside:
            nodes.append(node)
    return rewriting.finish([*cuts.values(), *nodes])


class _Search:
    """Who makes and who takes each tensor of a graph."""

    def __init__(self, rewriting: Rewriting) -> None:
        graph = rewriting.model.graph
        self._rewriting = rewriting
        self._shape = rewriting.shape
        self._made = {name: node for node in graph.node for name in node.output}
        self._taken: dict[str, list[NodeProto]] = {}
        # The graph's outputs count as one more use.
        for node in (*graph.node, NodeProto(input=[value.name for value in graph.output])):
            for name in node.input:
                self._taken.setdefault(name, []).append(node)

    def around(self, split: NodeProto) -> _FeedForward | None:
        """The feed-forward that cuts its first product's result in two here; None where it is none, or holds little."""
        _, tokens, features = shape if len(shape := self._shape(split.input[0])) == 3 else (0, 0, 0)
        said = attributes_of(split)
        slices = equal_slices(tokens, 4 * tokens * features, SLICE_BYTES)
        before = self._before(split.input[0])
        if slices == 1 or said.get("axis", 0) not in (-1, 2) or before is None:
            return None
        start = next(i for i, node in enumerate(before) if node.op_type in PRODUCTS)
        flat, linear = before[:start], before[start:]
        is_halved = all(self._shape(name)[1:] == [tokens, features // 2] for name in split.output)
        if not is_halved or not is_halvable(linear, self._rewriting):
            return None
        halves = [node for name in split.output for node in self._taken.get(name, [])]
        if sorted(node.op_type for node in halves) != ["Gelu", "Mul"]:
            return None
        gelu, product = sorted(halves, key=lambda node: node.op_type)
        after = self._after(product)
        if after is None or gelu.output[0] not in product.input:
            return None
        found = _FeedForward(tuple(flat), tuple(linear), split, (gelu, product, *after), tokens, slices)
        # Nothing else may use the tensors in between.
        within = [name for node in found.nodes for name in node.input]
        inner = [name for node in found.nodes[:-1] for name in node.output]
        return None if any(len(self._taken.get(name, [])) != within.count(name) for name in inner) else found

    def _before(self, name: str) -> list[NodeProto] | None:
        """The nodes that lead to a tensor, from one of rank 3 through a product."""
        nodes: list[NodeProto] = []
        while not (_has_product(nodes) and len(self._shape(name)) == 3):
            node = self._made.get(name)
            if node is None or node.op_type not in _LINEAR or (_has_product(nodes) and node.op_type != "Reshape"):
                return None
            nodes.insert(0, node)
            name = next((each for each in node.input if each in self._made), "")
        return nodes

    def _after(self, node: NodeProto) -> list[NodeProto] | None:
        """The nodes behind a node, through a product to a tensor of rank 3."""
        nodes: list[NodeProto] = []
        while not (_has_product(nodes) and len(self._shape(node.output[0])) == 3):
            users = self._taken.get(node.output[0], [])
            if len(users) != 1 or users[0].op_type not in (*PRODUCTS, "Reshape"):
                return None
            node = users[0]
            nodes.append(node)
        return nodes


def _has_product(nodes: list[NodeProto]) -> bool:
    return any(node.op_type in PRODUCTS for node in nodes)


def _sliced(of: _FeedForward, rewriting: Rewriting, halves: Halves) -> list[NodeProto]:
    """The nodes that take a feed-forward's place."""
    one = [*of.flat, *halved(of.linear, of.split, rewriting, halves), *of.after]
    each = of.tokens // of.slices
    given, made = of.nodes[0].input[0], of.nodes[-1].output[0]
    own = {given, *(name for node in one for name in node.output)}
    parts = rewriting.constant(f"slices.{each}x{of.slices}", np.full(of.slices, each))
    pieces = [f"{made}.{given}.{i}" for i in range(of.slices)]
    nodes = [helper.make_node("Split", [given, parts], pieces, f"{made}.{given}", axis=1)]
    for i, piece in enumerate(pieces):
        mine = {name: f"{name}.slice.{i}" for name in own} | {given: piece}
        for node in one:
            copy = renamed(node, mine)
            shape = rewriting.shape(node.output[0])
            if node.op_type == "Reshape" and len(shape) == 3:
                copy.input[1] = rewriting.constant(f"slice.{each}x{shape[2]}", np.array([-1, each, shape[2]]))
            nodes.append(copy)
    results = [f"{made}.slice.{i}" for i in range(of.slices)]
    nodes.append(helper.make_node("Concat", results, [made], made, axis=1))
    return nodes
