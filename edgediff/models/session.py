"""torch behind the runtime's `Session`: the same loop, with the divided UNet itself in place of exported graphs."""

from typing import Any

import torch

from edgediff.models.clockwork import SplitUNet
from edgediff.models.tensors import TorchTensors
from edgediff_runtime.manifest import Graph


class TorchSession(TorchTensors):
    """Runs the parts of a split UNet in eager torch, without gradients.

    Attributes:
        graphs: The four parts as `edgediff.models.graphs.graph_list` lists them.
        batch: None: any number of rows.
        device: Where the UNet's weights are.
    """

    batch: int | None = None

    def __init__(self, split: SplitUNet, graphs: tuple[Graph, ...]) -> None:
        self.split = split
        self.graphs = graphs
        self.device = next(split.parameters()).device

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs the part of the graph's name.

        Args:
            graph: One of `edgediff.models.graphs.graph_list`.
            tensors: By name; the outputs are added.
        """
        part = self.split.parts[graph.name]
        tensors.update(zip(part.outputs, part(*(tensors[name] for name in part.inputs)), strict=True))
