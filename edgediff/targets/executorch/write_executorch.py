"""An ExecuTorch program: one file with a method for each graph, computed by XNNPACK.

Constraints that shaped this file:

- Methods of one file share its weights: the partitioner names what it takes by content, and equal weights are written
  once.
- Shapes are fixed: XNNPACK plans its memory when a method is loaded.
- XNNPACK has no group normalization: one that is left whole is computed outside of it, and ends a piece of the graph
  that XNNPACK computes in one go.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from edgediff.extras import quiet
from edgediff.models.part import Part
from edgediff.targets.base import converter_errors
from edgediff.targets.executorch.import_executorch import import_executorch
from edgediff.targets.provenance import shared_provenance
from edgediff_runtime.manifest import Component, Graph


def write_executorch(
    folder: Path,
    unet: Component,
    modules: Mapping[str, Part],
    say: Callable[[str], None],
) -> None:
    """Writes the program of a component.

    Raises:
        UnsupportedError: The exporter failed.
        MissingExtraError: ExecuTorch is not installed.
    """
    exir = import_executorch("executorch.exir", "exporting to ExecuTorch")
    xnnpack = import_executorch("executorch.backends.xnnpack.partition.xnnpack_partitioner", "exporting to ExecuTorch")
    written = [graph for graph in unet.every_graph if graph.file is not None]
    programs = {}
    for graph in written:
        say(f"tracing {graph.key} for ExecuTorch")
        programs[graph.function] = _trace(modules[graph.name], graph)
    say("handing graphs to XNNPACK")
    path = folder / str(written[0].file)
    path.parent.mkdir(exist_ok=True)
    with converter_errors(f"{path.name}: ExecuTorch's exporter"):
        with quiet(), shared_provenance():
            lowered = exir.to_edge_transform_and_lower(programs, partitioner=[xnnpack.XnnpackPartitioner()])
            program = lowered.to_executorch()
        with path.open("wb") as file:
            program.write_to_file(file)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """Group normalization of [B, C, ...] in operations that XNNPACK has, as ``aten.group_norm`` is called.

    Mean and variance are each channel's own first, which XNNPACK pools in the layout of the convolutions around; those
    of a group follow from a number for each of its channels: its variance is the mean of theirs and of the squares by
    which their means lie apart.
    """
    rows, channels = x.shape[:2]
    of_channels, of_groups = (rows, channels, 1, 1), (rows, num_groups, channels // num_groups, 1)
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    pixels = x if x.dim() == 4 else x.reshape(rows, channels, -1, 1)
    mean = pixels.mean((2, 3), keepdim=True)
    centred = pixels - mean
    variance = (centred * centred).mean((2, 3), keepdim=True).reshape(of_groups)
    mean = mean.reshape(of_groups)
    apart = mean - mean.mean((2, 3), keepdim=True)
    variance = (variance + apart * apart).mean((2, 3), keepdim=True)
    scale = torch.rsqrt(variance + eps) * weight.reshape(1, *of_groups[1:])
    shift = apart * scale + bias.reshape(1, *of_groups[1:])
    return (centred * scale.reshape(of_channels) + shift.reshape(of_channels)).reshape(x.shape)


def _trace(module: Part, graph: Graph) -> torch.export.ExportedProgram:
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    # Only shapes and dtypes count; ids are indices, and 0 is one.
    given = tuple(torch.from_numpy(np.zeros(inputs[name].shape, inputs[name].dtype)) for name in module.inputs)
    with converter_errors(f"{graph.name}: torch.export"), quiet(), torch.no_grad():
        program = torch.export.export(module, given)
        decomposed: torch.export.ExportedProgram = program.run_decompositions(
            {torch.ops.aten.group_norm.default: group_norm}
        )
    return decomposed
