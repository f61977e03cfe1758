"""torch behind the runtime's `Session`: the same loop, with the UNet itself in place of exported graphs."""

from collections.abc import Mapping
from typing import Any

import torch

from edgediff.models.part import Part
from edgediff.models.tensors import TorchTensors
from edgediff_runtime.manifest import Graph


class TorchSession(TorchTensors):
    """Runs parts of a UNet in torch, without gradients.

    Attributes:
        graphs: The parts as `edgediff.models.graphs.graph_list` lists them.
        batch: None: any number of rows.
        device: Where the UNet's weights are.
    """

    batch: int | None = None

    def __init__(self, parts: Mapping[str, Part], graphs: tuple[Graph, ...]) -> None:
        """Takes what is there.

        Args:
            parts: What runs, by the graphs' names.
            graphs: In the order in which a step runs them.
        """
        self.parts = dict(parts)
        self.graphs = graphs
        self.device = next(tensor for part in self.parts.values() for tensor in part.parameters()).device

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs the part of the graph's name.

        Args:
            graph: One of the session's.
            tensors: By name; the outputs are added.
        """
        part = self.parts[graph.name]
        tensors.update(zip(part.outputs, part(*(tensors[name] for name in part.inputs)), strict=True))
