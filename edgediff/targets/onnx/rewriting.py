"""A graph whose nodes are being replaced by others that compute the same."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper


class Rewriting:
    """What a pass needs to know of a graph, and what it adds.

    Attributes:
        model: The model; changed in place. Weights may lie outside.
        weights: Sizes of each initialiser by its name.
        taken: How often nodes take each tensor, or the graph gives it.
    """

    def __init__(self, model: ModelProto) -> None:
        """Reads the graph."""
        graph = model.graph
        self.model = model
        self.weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        self.taken = Counter(name for node in graph.node for name in node.input)
        self.taken.update(value.name for value in graph.output)
        self._shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info, *graph.output)
        }

    def shape(self, name: str) -> list[int]:
        """Sizes of a tensor that is computed: 0 for each that is symbolic, an empty list where nothing is known."""
        return self._shapes.get(name, [])

    def constant(self, name: str, values: np.ndarray) -> str:
        """Adds an initialiser, once: the same name holds the same values."""
        if name not in self.weights:
            self.weights[name] = list(values.shape)
            self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def reshape(self, name: str, sizes: Sequence[int]) -> str:
        """Gives an initialiser, which no node is left to take as it was, other sizes; its bytes stay where they are."""
        tensor = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
        tensor.dims[:] = sizes
        self.weights[name] = list(sizes)
        return name

    def finish(self, nodes: Sequence[NodeProto]) -> ModelProto:
        """Sets the graph's nodes, and leaves out the initialisers that none of them takes."""
        graph = self.model.graph
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        nodes = list(nodes)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
        return self.model


def equal_slices(count: int, size: int, most: int) -> int:
    """In how many equal slices of `count` something of `size` bytes takes at most so many each, a power of two."""
    slices = 1
    while size > slices * most and count % (2 * slices) == 0:
        slices *= 2
    return slices


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of a node with other names for all that it makes, and for what it takes where `names` has one."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names[name] for name in node.output]
    copy.name = copy.output[0]
    return copy


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name: those that it says, defaults left out."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
