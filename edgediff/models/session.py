"""torch behind the runtime's `Session`: the same loop, with the divided UNet itself in place of exported graphs."""

from typing import Any

import numpy as np
import torch

from edgediff.models.clockwork import SplitUNet
from edgediff_runtime.manifest import Graph


class TorchSession:
    """Runs the parts of a split UNet in eager torch, without gradients.

    Attributes:
        graphs: The four parts as `edgediff.models.graphs.graph_list` lists them.
        batch: None: any number of rows.
    """

    batch: int | None = None

    def __init__(self, split: SplitUNet, graphs: tuple[Graph, ...]) -> None:
        self.split = split
        self.graphs = graphs

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Wraps an array without a copy.

        Args:
            array: C-contiguous.

        Returns:
            A tensor on the array's memory.
        """
        return torch.from_numpy(array)

    def get(self, value: torch.Tensor) -> np.ndarray:
        """Gives a tensor back as an array.

        Args:
            value: A tensor on the CPU.

        Returns:
            An array on the tensor's memory; parts make new outputs in every call.
        """
        return value.numpy()

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs the part of the graph's name.

        Args:
            graph: One of `edgediff.models.graphs.graph_list`.
            tensors: By name; the outputs are added.
        """
        part = self.split.parts[graph.name]
        tensors.update(zip(part.outputs, part(*(tensors[name] for name in part.inputs)), strict=True))
