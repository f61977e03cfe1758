"""The toy target's backend."""

from typing import Any

import torch

from edgediff.models.torch_session import TorchTensors
from edgediff_runtime import Bundle
from edgediff_runtime.manifest import Graph


class ToySession(TorchTensors):
    """Runs .pt2 files in torch."""

    def __init__(self, bundle: Bundle) -> None:
        unet = bundle.manifest.target("toy").unet
        self.graphs, self.batch = unet.graphs, unet.batch
        self._programs = {
            graph.name: torch.export.load(bundle.file(graph.file)).module() for graph in self.graphs if graph.file
        }

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        made = self._programs[graph.name](*(tensors[tensor.name] for tensor in graph.inputs))
        tensors.update(zip((tensor.name for tensor in graph.outputs), made, strict=True))
