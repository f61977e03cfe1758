"""The evaluator behind the loop's `Session`: images from Core ML packages on any machine, at about torch's speed."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch

from edgediff.errors import ProgramError
from edgediff.mil.function import Function
from edgediff.mil.program import open_program
from edgediff.models.torch_session import TorchTensors
from edgediff_runtime import Bundle, BundleError
from edgediff_runtime.coreml_session import check_features
from edgediff_runtime.manifest import CoreMLTarget, Graph


class MilSession(TorchTensors):
    """Evaluates a bundle's Core ML packages in torch on the CPU.

    Attributes:
        functions: The evaluated function of each graph, those of further sizes included, by the graph's key.
        rounded: Whether results are rounded to the program's precision, as a device does.
        threads: How many of torch's threads a graph is computed with; None leaves them as they are.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, component: str = "unet") -> None:
        """Checks and reads the packages of a component; a BundleError where one cannot be evaluated or is another."""
        target = cast(CoreMLTarget, bundle.manifest.target("coreml"))
        loaded = target.component(component)
        self.graphs = loaded.graphs
        self.batch = loaded.batch
        self.rounded = True
        self.threads = threads
        self.functions: dict[str, Function] = {}
        programs: dict[str, Any] = {}
        for graph in loaded.every_graph:
            if graph.file is None:
                continue
            if graph.file not in programs:
                bundle.folder(graph.file)
            try:
                if graph.file not in programs:
                    programs[graph.file] = open_program(bundle.path / graph.file)
                self.functions[graph.key] = programs[graph.file].function(graph.function)
            except ProgramError as e:
                raise BundleError(f"{graph.file}: {e}") from e
            version = programs[graph.file].specification_version
            if version != target.specification_version:
                said = target.specification_version
                raise BundleError(f"{graph.file} has specification version {version}; the manifest says {said}")
            function = self.functions[graph.key]
            inputs, outputs = (
                {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
                for specs in (function.inputs, function.outputs)
            )
            check_features(graph, inputs, outputs)

    @contextlib.contextmanager
    def unrounded(self) -> Iterator["MilSession"]:
        """While the block runs, results keep fp32's precision: what the program says, without what fp16 makes of it."""
        before, self.rounded = self.rounded, False
        try:
            yield self
        finally:
            self.rounded = before

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Evaluates a graph; a BundleError where an operation cannot be."""
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        # The threads are the process's: others who compute in torch get them back.
        before = torch.get_num_threads()
        torch.set_num_threads(before if self.threads is None else self.threads)
        try:
            made = self.functions[graph.key].run(feeds, rounded=self.rounded)
        except ProgramError as e:
            raise BundleError(f"{graph.file}: {e}") from e
        finally:
            torch.set_num_threads(before)
        tensors.update((tensor.name, made[tensor.stored_name]) for tensor in graph.outputs)
