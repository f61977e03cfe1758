"""Core ML behind the loop's `Session`: Apple's own runtime, on macOS."""

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import Graph

Array = npt.NDArray[Any]

COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")


class CoreMLSession:
    """Runs a bundle's Core ML packages with ``MLModel.predict``.

    Tensors are numpy arrays: predictions go through them anyway. One object may serve several threads.

    Attributes:
        graphs: The bundle's Core ML graphs.
        batch: Rows that each graph takes: they are fixed throughout.
    """

    def __init__(self, bundle: Bundle, compute_units: str = "all") -> None:
        """Checks and loads the packages of a bundle.

        Args:
            bundle: The bundle.
            compute_units: One of `COMPUTE_UNITS`.

        Raises:
            RequestError: This is not macOS, coremltools is not installed, or the compute units are unknown.
            BundleError: A package is damaged, cannot be loaded, or has other inputs than the manifest says.
        """
        if compute_units not in COMPUTE_UNITS:
            raise RequestError(f"no compute units {compute_units!r}; choices: {', '.join(COMPUTE_UNITS)}")
        if sys.platform != "darwin":
            raise RequestError(
                "backend 'coreml' is Apple's runtime and needs macOS; elsewhere --backend mil-reference evaluates the "
                "same packages in torch"
            )
        try:
            import coremltools as ct
        except ImportError as e:
            raise RequestError("backend 'coreml' needs coremltools: pip install \"edgediff[export]\"") from e
        target = bundle.manifest.target("coreml")
        self.graphs = target.graphs
        self.batch = target.batch
        self._models: dict[str, Any] = {}
        checked: set[str] = set()
        for graph in self.graphs:
            if graph.file is None:
                continue
            if graph.file not in checked:
                bundle.folder(graph.file)
                checked.add(graph.file)
            try:
                self._models[graph.name] = ct.models.MLModel(
                    os.fspath(bundle.path / graph.file),
                    compute_units=ct.ComputeUnit[compute_units.upper()],
                    function_name=graph.function,
                )
            except Exception as e:  # Core ML's errors come as plain RuntimeErrors and others
                raise BundleError(f"{graph.file} cannot be loaded: {' '.join(str(e).split())[:400]}") from e

    def put(self, array: Array) -> Any:
        """Takes an array as it is.

        Args:
            array: Any array.

        Returns:
            The same.
        """
        return array

    def get(self, value: Any) -> Array:
        """Gives an array back.

        Args:
            value: What `put` or `run` gave.

        Returns:
            The same; predictions make new arrays.
        """
        array: Array = value
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph.

        Args:
            graph: One of `graphs`.
            tensors: By name; the outputs are added, in the dtypes that the manifest declares.

        Raises:
            BundleError: The prediction failed, or lacks an output.
        """
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        try:
            made = self._models[graph.name].predict(feeds)
        except Exception as e:
            raise BundleError(f"{graph.file}: the prediction failed: {' '.join(str(e).split())[:400]}") from e
        for tensor in graph.outputs:
            if tensor.name not in made or np.shape(made[tensor.name]) != tensor.shape:
                found = {name: list(np.shape(value)) for name, value in made.items()}
                raise BundleError(f"{graph.file} gave {found}; the manifest says {tensor.name} {list(tensor.shape)}")
            tensors[tensor.name] = np.asarray(made[tensor.name], dtype=tensor.dtype)
