"""OpenVINO behind the loop's `Session`: the bundle's ONNX graphs on its CPU plugin."""

import os
import threading
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import Graph

Array = npt.NDArray[Any]
# OpenVINO's names of what it computes in; the graphs' own inputs and outputs stay as they are.
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoSession:
    """Runs a bundle's ONNX graphs in OpenVINO.

    Its CPU plugin is slower on symbolic shapes: a graph is compiled anew for each number of rows that it meets. Tensors
    are numpy arrays. One object may serve several threads.

    Attributes:
        graphs: The bundle's ONNX graphs.
        batch: None: any number of rows.
    """

    batch: int | None = None

    def __init__(self, bundle: Bundle, precision: str = "fp32", threads: int | None = None) -> None:
        """Checks the ONNX graphs of a bundle; they are read and compiled when the number of rows is known.

        Args:
            bundle: The bundle.
            precision: What to compute in, one of `PRECISIONS`.
            threads: Threads of each graph; OpenVINO's choice where None.

        Raises:
            RequestError: OpenVINO is not installed, or the precision is unknown, or not to be had here.
            BundleError: A graph is damaged.
        """
        if precision not in PRECISIONS:
            raise RequestError(f"no precision {precision!r}; choices: {', '.join(PRECISIONS)}")
        try:
            import openvino as ov
        except ImportError as e:
            raise RequestError("backend 'openvino' needs OpenVINO: pip install openvino") from e
        self._core = ov.Core()
        # The precision is a hint, which a processor without bf16 would not take, and not say so.
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RequestError("backend 'openvino-bf16' needs a processor with bf16; this one has none")
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self.graphs = bundle.manifest.target("onnx").graphs
        self._files: dict[str, str] = {}
        self._compiled: dict[tuple[str, int], Any] = {}
        self._compiling = threading.Lock()
        self._requests = threading.local()
        for graph in self.graphs:
            if graph.file is not None:
                bundle.file(graph.file)
                bundle.folder(str(PurePosixPath(graph.file).parent))
                self._files[graph.name] = os.fspath(bundle.path / graph.file)

    def put(self, array: Array) -> Array:
        """Takes an array as it is."""
        return array

    def get(self, value: Array) -> Array:
        """Gives a tensor back as it is: each run makes new ones."""
        return value

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph.

        Args:
            graph: One of the bundle's.
            tensors: By name; the outputs are added.

        Raises:
            BundleError: OpenVINO cannot compile the graph.
        """
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        rows = next((len(feeds[tensor.name]) for tensor in graph.inputs if tensor.shape[:1] == ("batch",)), 1)
        # A request holds the tensors of one run: each thread has its own.
        known: dict[tuple[str, int], Any] = self._requests.__dict__.setdefault("known", {})
        request = known.get((graph.name, rows))
        if request is None:
            request = known[graph.name, rows] = self._compile(graph, rows).create_infer_request()
        made = request.infer(feeds, share_inputs=True, share_outputs=True)
        # What came out is the request's own memory, which the next run writes over.
        tensors.update((tensor.name, np.array(made[tensor.name])) for tensor in graph.outputs)

    def _compile(self, graph: Graph, rows: int) -> Any:
        with self._compiling:
            found = self._compiled.get((graph.name, rows))
            if found is None:
                try:
                    model = self._core.read_model(self._files[graph.name])
                    model.reshape(
                        {
                            tensor.name: [rows if size == "batch" else size for size in tensor.shape]
                            for tensor in graph.inputs
                        }
                    )
                    found = self._core.compile_model(model, "CPU", self._settings)
                except RuntimeError as e:
                    said = " ".join(str(e).split())[:400]
                    raise BundleError(f"{graph.file} cannot be compiled by OpenVINO: {said}") from e
                self._compiled[graph.name, rows] = found
            return found
