"""An ExecuTorch program: one file with a method for each graph, computed by XNNPACK.

Constraints that shaped this file:

- Methods of one file share its weights: the partitioner names what it takes by content, and equal weights are written
  once.
- Shapes are fixed: XNNPACK plans its memory when a method is loaded.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from edgediff.errors import UnsupportedError
from edgediff.executorch import import_executorch, quiet
from edgediff.models.part import Part
from edgediff.verify.feed import groups
from edgediff_runtime.manifest import Graph, Target


def write_executorch(
    folder: Path,
    target: Target,
    modules: Mapping[str, Part],
    examples: Mapping[str, Mapping[str, np.ndarray]],
    say: Callable[[str], None],
) -> None:
    """Writes the program of a target.

    Args:
        folder: The bundle that is being written.
        target: What the manifest's draft says of the target.
        modules: The modules by the names of their graphs.
        examples: Real inputs of each graph by name, any number of rows.
        say: Told what is being done.

    Raises:
        UnsupportedError: The exporter failed.
        MissingExtraError: ExecuTorch is not installed.
    """
    exir = import_executorch("executorch.exir", "exporting to ExecuTorch")
    xnnpack = import_executorch("executorch.backends.xnnpack.partition.xnnpack_partitioner", "exporting to ExecuTorch")
    written = [graph for graph in target.graphs if graph.file is not None]
    programs = {}
    for graph in written:
        say(f"tracing {graph.name} for ExecuTorch")
        programs[graph.function] = _trace(modules[graph.name], graph, examples[graph.name], target.batch)
    say("handing graphs to XNNPACK")
    path = folder / str(written[0].file)
    path.parent.mkdir(exist_ok=True)
    try:
        with quiet():
            lowered = exir.to_edge_transform_and_lower(programs, partitioner=[xnnpack.XnnpackPartitioner()])
            program = lowered.to_executorch()
        with path.open("wb") as file:
            program.write_to_file(file)
    except OSError:  # a full disk is no fault of the model
        raise
    except Exception as e:  # the exporter's errors share no base class
        raise UnsupportedError(f"{path.name}: ExecuTorch's exporter failed: {' '.join(str(e).split())[:400]}") from e


def _trace(
    module: Part, graph: Graph, inputs: Mapping[str, np.ndarray], batch: int | None
) -> torch.export.ExportedProgram:
    assert batch is not None  # of this target, graphs are fixed
    first = next(groups(inputs, batch))
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, tuple(torch.from_numpy(first[name]) for name in module.inputs))
    except Exception as e:  # torch.export's errors share no base class
        raise UnsupportedError(f"{graph.name}: torch.export failed: {' '.join(str(e).split())[:400]}") from e
