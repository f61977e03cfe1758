"""The evaluator behind the loop's `Session`: images from Core ML packages on any machine, at about torch's speed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from edgediff.errors import ProgramError
from edgediff.verify.mil.function import Function
from edgediff.verify.mil.program import open_program
from edgediff_runtime import Bundle, BundleError
from edgediff_runtime.manifest import Graph


class MilSession:
    """Evaluates a bundle's Core ML packages in torch on the CPU.

    Attributes:
        graphs: The bundle's Core ML graphs.
        batch: Rows that each graph takes: they are fixed throughout.
        functions: The evaluated function of each graph by the graph's name.
        rounded: Whether results are rounded to the program's precision, as a device does.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Checks and reads the packages of a bundle.

        Args:
            bundle: The bundle.

        Raises:
            BundleError: A package is damaged, cannot be read or evaluated, or has other inputs or outputs than the
                manifest says.
        """
        target = bundle.manifest.target("coreml")
        self.graphs = target.graphs
        self.batch = target.batch
        self.rounded = True
        self.functions: dict[str, Function] = {}
        programs: dict[str, Any] = {}
        for graph in self.graphs:
            if graph.file is None:
                continue
            if graph.file not in programs:
                bundle.folder(graph.file)
            try:
                if graph.file not in programs:
                    programs[graph.file] = open_program(bundle.path / graph.file)
                self.functions[graph.name] = programs[graph.file].function(graph.function)
            except ProgramError as e:
                raise BundleError(f"{graph.file}: {e}") from e
            version = programs[graph.file].specification_version
            if version != target.specification_version:
                said = target.specification_version
                raise BundleError(f"{graph.file} has specification version {version}; the manifest says {said}")
            _check_tensors(graph, self.functions[graph.name])

    @contextlib.contextmanager
    def unrounded(self) -> Iterator[None]:
        """While the block runs, results keep fp32's precision: what the program says, without what fp16 makes of it."""
        before, self.rounded = self.rounded, False
        try:
            yield
        finally:
            self.rounded = before

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
            value: What `put` or `run` gave.

        Returns:
            An array: numbers of fp16 are held as float32.
        """
        return value.numpy()

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Evaluates a graph.

        Args:
            graph: One of `graphs`.
            tensors: By name; the outputs are added.

        Raises:
            BundleError: An operation cannot be evaluated on these tensors.
        """
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        try:
            tensors.update(self.functions[graph.name].run(feeds, rounded=self.rounded))
        except ProgramError as e:
            raise BundleError(f"{graph.file}: {e}") from e


def _check_tensors(graph: Graph, function: Function) -> None:
    for said, found in ((graph.inputs, function.inputs), (graph.outputs, function.outputs)):
        want = {tensor.name: (tensor.dtype, tensor.shape) for tensor in said}
        have = {name: (spec.dtype, tuple(spec.shape)) for name, spec in found.items()}
        if want != have:
            raise BundleError(f"{graph.file} has {_spell(have)}; the manifest says {_spell(want)}")


def _spell(tensors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(tensors.items()))
