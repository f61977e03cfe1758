"""torch behind the runtime's `Session`: the same loop, with the UNet itself in place of exported graphs."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from edgediff.models.part import Part
from edgediff_runtime.manifest import Graph, Tensor, has_rows

DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {torch.float32: "float32", torch.int64: "int64"}


class TorchTensors:
    """How sessions that compute in torch take arrays in and give them back."""

    device = torch.device("cpu")

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Moves a C-contiguous array to the session's device; on the CPU it is wrapped without a copy."""
        return torch.from_numpy(array).to(self.device)

    def get(self, value: torch.Tensor) -> np.ndarray:
        """A tensor as an array; on the CPU they share memory, since graphs make new outputs in every call."""
        return value.cpu().numpy()


class TorchSession(TorchTensors):
    """Runs parts of a UNet in torch, without gradients, where the first weights are.

    Attributes:
        graphs: What runs, in the order of a step.
        batch: Rows that go through a part together; None for all of them.
    """

    def __init__(self, parts: Mapping[str, Part], graphs: tuple[Graph, ...], batch: int | None = None) -> None:
        self.parts = dict(parts)
        self.graphs = graphs
        self.batch = batch
        self.device = next(tensor for part in self.parts.values() for tensor in part.parameters()).device

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs the part of the graph's name, and adds its outputs to `tensors`."""
        tensors.update(self.parts[graph.name].run(tensors))


def graph_tensor(name: str, value: torch.Tensor) -> Tensor:
    """A tensor as graphs list it: any number of rows, but one ``timestep`` and low-rank factors once."""
    shape = ("batch", *value.shape[1:]) if has_rows(name) else tuple(value.shape)
    return Tensor(name=name, dtype=DTYPES[value.dtype], shape=shape)
