"""Torch behind graphs of a fixed batch, as Core ML has them."""

from typing import Any

from edgediff.models.torch_session import TorchSession
from edgediff_runtime.manifest import Graph


class Chunked(TorchSession):
    """A session that takes just so many rows."""

    def __init__(self, whole: TorchSession, batch: int) -> None:
        super().__init__(whole.parts, whole.graphs, batch)
        self.rows = batch

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        assert len(tensors["sample"]) == self.rows
        super().run(graph, tensors)
