"""What the two rows of a guided image have in common, computed once.

Guidance denoises each sample under two conditions, in two rows that begin with the same numbers. They differ only from
the first layer that takes the condition on: in Stable Diffusion v1.5 a residual block and the first attention over all
pixels come before it. A graph changed by this pass takes the sample once for each image and repeats the features where
the rows begin to differ. Given a sample for each row, it computes the same as before.
"""

import logging
from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgediff.targets.onnx.rewriting import Rewriting
from edgediff_runtime.manifest import CONTROL_IMAGE, IMAGES, SAMPLE, TIMESTEP, has_rows

log = logging.getLogger(__name__)

# Operations worth sharing; a single one is the convolution that every UNet begins with. A ControlNet shares that alone,
# before it adds the control image: rows share a sample only where all graphs of a bundle can, so the UNet's do too.
_COSTLY = ("Conv", "Gemm", "MatMul", "Attention", "MultiHeadAttention")
# These broadcast one row to many themselves.
_BROADCASTING = ("Add", "Sub", "Mul", "Div")
_SHARED = "shared"
_ROWS, _IMAGES, _COPIES = f"{_SHARED}.rows", f"{_SHARED}.images", f"{_SHARED}.copies"


def share_rows(model: ModelProto) -> ModelProto:
    """Lets a graph take its sample once for each image, and compute once what does not depend on the condition.

    It is as it was where nothing else has rows to be counted by, where rows part at once, or where the graph counts
    them in more places than it has to.
    """
    given = {value.name for value in model.graph.input}
    others = sorted(name for name in given if name != SAMPLE and has_rows(name))
    if SAMPLE not in given or not others:
        return model
    sharing = _Sharing(model, others[0])
    nodes = sharing.nodes()
    if nodes is None:
        log.info("shared rows: none, as rows part too early, or are counted")
        return model
    log.info("shared rows: %d nodes once for each image, repeated at %s", sharing.shared, ", ".join(sharing.repeated))
    # Recorded shapes are wrong for tensors that now have fewer rows, and for removed ones.
    true = {name for node in nodes for name in node.output} - sharing.of_images - sharing.of_time
    kept = [value for value in model.graph.value_info if value.name in true]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    sample = next(value for value in model.graph.input if value.name == SAMPLE)
    sample.type.tensor_type.shape.dim[0].dim_param = IMAGES
    return sharing.finish(nodes)


def has_shared_rows(model: ModelProto) -> bool:
    """Whether a graph takes a sample once for each image."""
    return any(
        value.name == SAMPLE and value.type.tensor_type.shape.dim[0].dim_param == IMAGES for value in model.graph.input
    )


class _Sharing(Rewriting):
    """A graph whose tensors have all rows, as `counted` has, a row for each image, or, made of the time, one.

    Attributes:
        of_images: Tensors with a row for each image.
        of_time: Tensors with one row.
        shared: How many nodes are computed for each image.
        repeated: Tensors whose rows are repeated.
    """

    def __init__(self, model: ModelProto, counted: str) -> None:
        super().__init__(model)
        self.of_images = {SAMPLE}
        self.of_time = {TIMESTEP}
        self.shared = 0
        self.repeated: list[str] = []
        self._counted = counted
        # Low-rank factors, and what is made of them alone, have no rows, as weights have none.
        given = {value.name for value in model.graph.input}
        self._of_rows = {name for name in given if has_rows(name)} - self.of_images
        self._least = 1 if CONTROL_IMAGE in given else 2
        self._nodes: list[NodeProto] = []
        self._repeats: dict[str, tuple[str, int]] = {}

    def nodes(self) -> list[NodeProto] | None:
        """The nodes that take the graph's nodes' place; None where it is to stay as it is."""
        costly = 0
        for node in self._one_time():
            taken = set(node.input)
            if node.op_type == "Shape" and taken & (self.of_images | self.of_time):
                return None
            if taken & self._of_rows:
                self._repeat(node, self.of_images, _COPIES)
                self._repeat(node, self.of_time, _ROWS)
                self._of_rows.update(node.output)
            elif taken & self.of_images:
                self._repeat(node, self.of_time, _IMAGES)
                self.of_images.update(node.output)
                self.shared += 1
                costly += node.op_type in _COSTLY
            elif taken & self.of_time:
                self.of_time.update(node.output)
            self._nodes.append(node)
        results = {value.name for value in self.model.graph.output}
        for few, times in ((self.of_images, _COPIES), (self.of_time, _ROWS)):
            for name in sorted(results & few):
                self._repeat_result(name, times)
        told = all(rank for _, rank in self._repeats.values())
        return [*self._counts(), *self._nodes] if costly >= self._least and told else None

    def _one_time(self) -> list[NodeProto]:
        """Copies of the nodes, with the time left in one row, and without those that nobody needs then."""
        same: dict[str, str] = {}
        nodes = []
        for original in self.model.graph.node:
            node = NodeProto()
            node.CopyFrom(original)
            node.input[:] = [same.get(name, name) for name in node.input]
            if node.op_type == "Expand" and node.input[0] == TIMESTEP:
                same[node.output[0]] = TIMESTEP
            else:
                nodes.append(node)
        needed = {value.name for value in self.model.graph.output}
        kept = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _repeat(self, node: NodeProto, few: set[str], times: str) -> None:
        """Lets a node take as many rows of each of its inputs as it makes."""
        if few is self.of_time and node.op_type in _BROADCASTING:
            return
        for i, name in enumerate(node.input):
            if name in few:
                node.input[i] = f"{name}{times.removeprefix(_SHARED)}"
                if node.input[i] not in self.repeated:
                    self._add_tile(name, times, node.input[i], len(self.shape(name)))

    def _repeat_result(self, name: str, times: str) -> None:
        """Repeats the rows of one of the graph's results, under its name."""
        few = f"{name}.few"
        for node in self._nodes:
            node.input[:] = [few if each == name else each for each in node.input]
            node.output[:] = [few if each == name else each for each in node.output]
        self._add_tile(few, times, name, len(self.shape(name)))

    def _add_tile(self, name: str, times: str, result: str, rank: int) -> None:
        repeats = f"{times}.{rank}"
        self._repeats[repeats] = (times, rank)
        self.repeated.append(result)
        self._nodes.append(helper.make_node("Tile", [name, repeats], [result], f"{name}{times.removeprefix(_SHARED)}"))

    def _counts(self) -> Iterator[NodeProto]:
        """The nodes that count rows, images and rows of each image, once for tensors of each rank."""
        yield helper.make_node("Shape", [self._counted], [_ROWS], _ROWS, start=0, end=1)
        yield helper.make_node("Shape", [SAMPLE], [_IMAGES], _IMAGES, start=0, end=1)
        yield helper.make_node("Div", [_ROWS, _IMAGES], [_COPIES], _COPIES)
        for repeats, (times, rank) in self._repeats.items():
            once = self.constant(f"{_SHARED}.once.{rank}", np.ones(rank - 1, np.int64))
            yield helper.make_node("Concat", [times, once], [repeats], repeats, axis=0)
