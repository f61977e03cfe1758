"""Group normalization in operators that ONNX Runtime has kernels for.

ONNX's own ``GroupNormalization`` has none on CPUs: a session expands it into about thirty operators, which in a slim
UNet take longer than the convolutions. As instance normalization of the groups it is five, and three of them move or
scale what is there.
"""

import logging
from collections import Counter

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgediff.errors import UnsupportedError

log = logging.getLogger(__name__)

_KIND = "GroupNormalization"


def expand_group_norm(model: ModelProto) -> ModelProto:
    """Writes every ``GroupNormalization`` as instance normalization of its groups.

    Args:
        model: Changed in place; weights inside or as references to external data. Channels, height and width of what
            is normalized must be known, the batch need not be.

    Returns:
        The model.

    Raises:
        UnsupportedError: A shape is not known, or a weight is none of the graph's own.
    """
    graph = model.graph
    if not any(node.op_type == _KIND for node in graph.node):
        return model
    expansion = _Expansion(model)
    nodes = [made for node in graph.node for made in (expansion.of(node) if node.op_type == _KIND else (node,))]
    log.info("group-norm: %d expanded", sum(node.op_type == _KIND for node in graph.node))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(expansion.constants.values())
    _drop_stale(model, expansion.reshaped)
    return model


def _drop_stale(model: ModelProto, reshaped: set[str]) -> None:
    """Removes what was said of the shapes of reshaped weights, and weights that have only left copies behind."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    said = [value for value in graph.value_info if value.name not in reshaped]
    weights = [tensor for tensor in graph.initializer if tensor.name in used or tensor.name not in reshaped]
    del graph.value_info[:], graph.initializer[:]
    graph.value_info.extend(said)
    graph.initializer.extend(weights)


class _Expansion:
    """What the expansions of one graph share.

    Attributes:
        constants: New initialisers by name.
        reshaped: Names of the weights that have another shape now, or copies that have.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.constants: dict[str, TensorProto] = {}
        self.reshaped: set[str] = set()
        self._shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._uses = Counter(name for node in graph.node for name in node.input)

    def of(self, node: NodeProto) -> tuple[NodeProto, ...]:
        """The nodes that take a node's place."""
        x, scale, bias = node.input
        out = node.output[0]
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        groups = settings["num_groups"]
        _, *shape = self._shapes.get(x, [0, 0])
        if not all(shape):
            raise UnsupportedError(f"{node.name} normalizes {x} of unknown shape; expected fixed height and width")
        # A 0 keeps the batch, whatever it is.
        as_groups = self._constant(f"group_norm.groups_{groups}", np.array([0, groups, -1], np.int64))
        as_before = self._constant(f"group_norm.shape_{'x'.join(map(str, shape))}", np.array([0, *shape], np.int64))
        ones = self._constant(f"group_norm.ones_{groups}", np.ones(groups, np.float32))
        zeros = self._constant(f"group_norm.zeros_{groups}", np.zeros(groups, np.float32))
        steps = [f"{out}.{step}" for step in ("groups", "normalized", "reshaped", "scaled")]
        rank = len(shape)
        return (
            helper.make_node("Reshape", [x, as_groups], [steps[0]], f"{node.name}_groups"),
            helper.make_node(
                "InstanceNormalization", [steps[0], ones, zeros], [steps[1]], node.name, epsilon=settings["epsilon"]
            ),
            helper.make_node("Reshape", [steps[1], as_before], [steps[2]], f"{node.name}_reshaped"),
            helper.make_node("Mul", [steps[2], self._per_channel(scale, rank)], [steps[3]], f"{node.name}_scaled"),
            helper.make_node("Add", [steps[3], self._per_channel(bias, rank)], [out], f"{node.name}_shifted"),
        )

    def _per_channel(self, name: str, rank: int) -> str:
        """A weight [C] as [C, 1, ...]: the same bytes, wherever they lie."""
        tensor = self._weights.get(name)
        if tensor is None:
            raise UnsupportedError(f"{name} scales a group normalization; expected one of the graph's weights")
        self.reshaped.add(name)
        if self._uses[name] > 1:  # equal weights are stored once
            name = f"{name}.rank_{rank}"
            if name not in self.constants:
                self.constants[name] = TensorProto()
                self.constants[name].CopyFrom(tensor)
                self.constants[name].name = name
            tensor = self.constants[name]
        dims = [tensor.dims[0], *[1] * (rank - 1)]
        del tensor.dims[:]
        tensor.dims.extend(dims)
        return name

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(values, name))
        return name
