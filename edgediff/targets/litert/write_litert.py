""".tflite files through LiteRT's converter for torch: one for each component, a signature for each graph.

Constraints that shaped this file:

- Signatures of one file share its weights: the converter writes equal ones once.
- Names of a signature's tensors are those of keyword arguments, and of the entries of a dictionary that is returned.
- Shapes are fixed: XNNPACK and the accelerators' compilers plan memory when a file is opened.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgediff.errors import UnsupportedError
from edgediff.extras import needing, quiet
from edgediff.models.part import Part
from edgediff.targets.base import converter_errors
from edgediff.targets.provenance import shared_provenance
from edgediff_runtime.manifest import Component, Graph


class _ByName(nn.Module):
    """A part that takes its tensors by name and gives them by name."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        made = self.part(*(tensors[name] for name in self.part.inputs))
        return dict(zip(self.part.outputs, made, strict=True))


def write_litert(folder: Path, component: Component, modules: Mapping[str, Part], say: Callable[[str], None]) -> Path:
    """Writes the file of a component, and says where it lies.

    Raises:
        UnsupportedError: The converter failed.
        MissingExtraError: It is not installed.
    """
    written = [graph for graph in component.every_graph if graph.file is not None]
    path = folder / str(written[0].file)
    path.parent.mkdir(exist_ok=True)
    converter = import_litert()
    say(f"converting {', '.join(graph.key for graph in written)} to LiteRT")
    with converter_errors(f"{path.name}: litert_torch"), quiet(), shared_provenance():
        for graph in written:
            module = _ByName(modules[graph.name]).eval()
            converter = converter.signature(graph.function, module, sample_kwargs=_example(graph))
        try:
            # The strict way of torch.export is tried second by default, and traces anew.
            converter.convert(strict_export=False).export(str(path))
        except RuntimeError as e:
            without = re.match(r"Lowering not found: (\S+)", str(e))
            if without is None:
                raise
            where = [_module_of(without[1], graph, modules[graph.name]) for graph in written]
            raise UnsupportedError(
                f"{path.name}: LiteRT has no form of {without[1]}, which {next(filter(None, where), 'a graph')} "
                "computes; leave target litert out"
            ) from e
    return path


def _module_of(operation: str, graph: Graph, part: Part) -> str | None:
    """The innermost module that computes an operation, by path and class, in the words of a message."""
    program = torch.export.export(_ByName(part).eval(), (), _example(graph), strict=False).run_decompositions()
    for node in program.graph.nodes:
        if str(node.target) == operation and node.meta.get("nn_module_stack"):
            name, cls = list(node.meta["nn_module_stack"].values())[-1]
            cls = cls if isinstance(cls, str) else cls.__name__
            return f"{name.removeprefix('part.') or graph.name} ({cls.rpartition('.')[2]})"
    return None


def _example(graph: Graph) -> dict[str, torch.Tensor]:
    """Zeros of a graph's inputs: only shapes and dtypes count; ids are indices, and 0 is one."""
    return {t.name: torch.from_numpy(np.zeros(t.shape, t.dtype)) for t in graph.inputs}


def import_litert() -> Any:
    """Imports the converter; a MissingExtraError where it is not installed."""
    with needing("litert", "exporting to LiteRT"), quiet():
        import litert_torch
    return litert_torch
