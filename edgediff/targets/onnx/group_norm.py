"""Group normalization in operators that ONNX Runtime has kernels for.

ONNX's own ``GroupNormalization`` has none on CPUs: a session expands it into about thirty operators, which in a slim
UNet take longer than the convolutions. Instance normalization of the groups, and a batch normalization with statistics
0 and 1 for the scale and the shift of each channel, take four operators, two of which copy nothing.
"""

import logging
from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgediff.errors import UnsupportedError
from edgediff.targets.onnx.rewriting import Rewriting, attributes_of

log = logging.getLogger(__name__)

_KIND = "GroupNormalization"


def expand_group_norm(model: ModelProto, portable: bool = False) -> ModelProto:
    """Writes every ``GroupNormalization`` as instance normalization of its groups.

    Args:
        model: Changed in place. The channels of what is normalized must be known; its other sizes need not be.
        portable: Scale and shift by Mul and Add: accelerators know no batch normalization of rank 3, some none at all.

    Raises:
        UnsupportedError: The number of channels is not known.
    """
    graph = model.graph
    count = sum(node.op_type == _KIND for node in graph.node)
    if not count:
        return model
    expansion = _Expansion(model, portable)
    nodes = [made for node in graph.node for made in (expansion.of(node) if node.op_type == _KIND else (node,))]
    log.info("group-norm: %d expanded", count)
    return expansion.rewriting.finish(nodes)


class _Expansion:
    """What the expansions of one graph share."""

    def __init__(self, model: ModelProto, portable: bool) -> None:
        self.portable = portable
        self.rewriting = Rewriting(model)

    def of(self, node: NodeProto) -> tuple[NodeProto, ...]:
        """The nodes that take a node's place."""
        x, scale, bias = node.input
        out = node.output[0]
        settings = attributes_of(node)
        groups = settings["num_groups"]
        shape = self.rewriting.shape(x)[1:]
        if not shape or not shape[0]:
            raise UnsupportedError(f"{node.name} normalizes {x}, whose number of channels is not known")
        # A 0 keeps the batch.
        as_groups = self._constant(f"groups_{groups}", np.array([0, groups, -1], np.int64))
        steps = [f"{out}.{step}" for step in ("groups", "normalized", "reshaped")]
        read = []
        if all(shape):
            as_before = self._constant(f"shape_{'x'.join(map(str, shape))}", np.array([0, *shape], np.int64))
        else:
            as_before = f"{out}.shape"
            read.append(helper.make_node("Shape", [x], [as_before], as_before))
        return (
            *read,
            helper.make_node("Reshape", [x, as_groups], [steps[0]], f"{node.name}_groups"),
            helper.make_node(
                "InstanceNormalization",
                [steps[0], self._filled(groups, 1), self._filled(groups, 0)],
                [steps[1]],
                node.name,
                epsilon=settings["epsilon"],
            ),
            helper.make_node("Reshape", [steps[1], as_before], [steps[2]], f"{node.name}_reshaped"),
            *(self._by_channel if self.portable else self._as_batch_norm)(steps[2], scale, bias, out, shape),
        )

    def _as_batch_norm(self, x: str, scale: str, bias: str, out: str, shape: list[int]) -> Iterator[NodeProto]:
        # Half the time of a Mul and an Add, and the same numbers.
        zeros, ones = self._filled(shape[0], 0), self._filled(shape[0], 1)
        yield helper.make_node("BatchNormalization", [x, scale, bias, zeros, ones], [out], f"{out}_scaled", epsilon=0.0)

    def _by_channel(self, x: str, scale: str, bias: str, out: str, shape: list[int]) -> Iterator[NodeProto]:
        behind = self._constant(f"behind_{len(shape)}", np.arange(1, len(shape)))
        for kind, weights, made in (("Mul", scale, f"{out}.scaled"), ("Add", bias, out)):
            # A session computes this once, when it optimizes the graph.
            yield helper.make_node("Unsqueeze", [weights, behind], [f"{made}.weights"], f"{made}_weights")
            yield helper.make_node(kind, [x, f"{made}.weights"], [made], made)
            x = made

    def _filled(self, size: int, value: int) -> str:
        return self._constant(f"{'ones' if value else 'zeros'}_{size}", np.full(size, value, np.float32))

    def _constant(self, name: str, values: np.ndarray) -> str:
        return self.rewriting.constant(f"group_norm.{name}", values)
