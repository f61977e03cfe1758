"""ONNX Runtime behind the session's interface.

Its threads share each operation of a graph and synchronize after every one, which takes much of a small graph's time.
Rows are independent, but in graphs that inject, so where every thread gets equally many, each runs its own rows
through the whole graph. That needs the graphs in memory a second time, so only small graphs are loaded twice, when such
rows first come.
"""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError, RequestError, one_line
from edgediff_runtime.manifest import Graph, injects
from edgediff_runtime.ort_cache import load_cached
from edgediff_runtime.ort_options import options_key, session_options
from edgediff_runtime.tensor_check import Found, check_tensors

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)

# ONNX Runtime's execution provider.
CPU = "CPUExecutionProvider"
# With a row for each of two threads, each alone, a cached step of SD v1.5, 3.4 GB, takes 0.96 of the time, a full one
# 0.98: not worth the weights in memory twice.
APART_BYTES = 2**26
ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class OrtSession:
    """ONNX Runtime on the CPU.

    One object may serve several threads: it holds the loaded graphs and nothing of any generation. A tensor is an
    OrtValue, or a tuple of them where each thread has its own rows.
    """

    batch: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        component: str = "unet",
        cache: Path | None = None,
        low_memory: bool = False,
    ) -> None:
        """Checks and loads a component's ONNX graphs; `threads` None takes as many as the process has cores.

        With a folder as `cache`, what ONNX Runtime makes of them is kept there, and opened the next time. With
        `low_memory`, weights in fewer bits stay so in memory.
        """
        import onnxruntime as ort

        loaded = bundle.manifest.target("onnx").component(component)
        self.graphs = loaded.graphs
        self.threads = cores() if threads is None else threads
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        self._outputs = {graph.name: [tensor.name for tensor in graph.outputs] for graph in self.graphs}
        self._workers = ThreadPoolExecutor(max(self.threads - 1, 1), "rows")
        self._bundle, self._int8, self._stored = bundle, loaded.dtype == "int8", bool(loaded.weights)
        self._cache, self._low_memory = cache, low_memory
        # Where graphs take a sample once for each image, a thread might get one row's sample and another's condition.
        together = injects(self.graphs) or any(graph.shares_rows for graph in self.graphs)
        self._may_divide = self.threads > 1 and not together and weight_bytes(bundle, self.graphs) <= APART_BYTES
        self._apart: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._shared = self._load(threads)

    def _load(self, threads: int | None) -> dict[str, Any]:
        def options() -> Any:
            return session_options(self._int8, threads, self._stored, self._low_memory)

        # Read again from a file, a graph makes all its weights early and holds them; it opens within a second anyway.
        if self._cache is not None and not (self._stored and self._low_memory):
            settings = options_key(self._int8, self._stored)
            return load_cached(self._bundle, self.graphs, options, open_graph, self._cache, settings)
        with self._bundle.hold(self.graphs):
            return load_graphs(self._bundle, self.graphs, options())

    def put(self, array: Array) -> Any:
        """Wraps a C-contiguous array, rows first, without a copy: one OrtValue, or one for each thread's rows."""
        if not array.ndim:
            return self._from_numpy(array)
        each, left = divmod(len(array), self.threads)
        if left or not each or not self._can_divide():
            return self._from_numpy(array)
        return tuple(self._from_numpy(array[i * each : (i + 1) * each]) for i in range(self.threads))

    def _can_divide(self) -> bool:
        """Whether rows may go to threads of their own; their graphs are loaded when this is first asked."""
        with self._loading:
            if self._may_divide and not self._apart:
                try:
                    self._apart = self._load(1)
                except BundleError as e:
                    # The bundle was moved or deleted while it is open: the graphs that are loaded do without.
                    log.info("all rows go through the graphs together: %s", e)
                    self._may_divide = False
            return self._may_divide

    def get(self, value: Any) -> Array:
        """Copies a tensor out."""
        array: Array = np.concatenate([each.numpy() for each in value]) if isinstance(value, tuple) else value.numpy()
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on tensors by name and adds its outputs; all stay OrtValues."""
        names = self._outputs[graph.name]
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        if not any(isinstance(value, tuple) for value in feeds.values()):
            made = _run(self._shared[graph.name], graph, names, feeds)
            tensors.update(zip(names, made, strict=True))
            return
        session = self._apart[graph.name]

        def run_rows(i: int) -> Any:
            # Inputs without rows (the timestep) are the same for all.
            mine = {name: value[i] if isinstance(value, tuple) else value for name, value in feeds.items()}
            return _run(session, graph, names, mine)

        others = [self._workers.submit(run_rows, i) for i in range(1, self.threads)]
        rows = [run_rows(0), *(other.result() for other in others)]
        tensors.update(zip(names, zip(*rows, strict=True), strict=True))


def _run(session: Any, graph: Graph, names: list[str], feeds: dict[str, Any]) -> Any:
    try:
        return session.run_with_ort_values(names, feeds)
    except Exception as e:  # onnxruntime's own errors share no base class
        raise RequestError(f"{graph.name} cannot run: {one_line(e)}; ask for fewer images at once") from e


def load_graphs(
    bundle: Bundle, graphs: tuple[Graph, ...], options: Any, providers: tuple[Any, ...] = (CPU,)
) -> dict[str, Any]:
    """Loads and checks the graphs that have a file: sessions of ONNX Runtime by the graphs' names.

    Raises:
        BundleError: One cannot be loaded, or has other inputs or outputs than the manifest says.
    """
    return {
        graph.name: open_graph(graph, os.fspath(bundle.path / graph.file), options, providers)
        for graph in graphs
        if graph.file is not None
    }


def open_graph(graph: Graph, file: str, options: Any, providers: tuple[Any, ...] = (CPU,)) -> Any:
    """Loads a graph from a file and checks it: ONNX Runtime's session; a BundleError where it cannot be."""
    import onnxruntime as ort

    try:
        # ONNX Runtime's own fallback to the CPU would print, and ignore the user's choice.
        session = ort.InferenceSession(file, options, providers=list(providers), enable_fallback=0)
    except Exception as e:  # onnxruntime's own errors share no base class
        raise BundleError(f"{graph.file} cannot be loaded: {one_line(e)}; update onnxruntime or export again") from e
    check_tensors(graph, _found(session.get_inputs()), _found(session.get_outputs()))
    return session


def weight_bytes(bundle: Bundle, graphs: tuple[Graph, ...]) -> int:
    """Bytes of the files that graphs lie in; what they share counts once."""
    names = {name for graph in graphs for name in graph.files}
    return sum(bundle.manifest.files[name].size for name in names if name in bundle.manifest.files)


def cores() -> int:
    """How many cores the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _found(values: Any) -> list[Found]:
    return [Found(frozenset({v.name}), ORT_TYPES.get(v.type, v.type), tuple(v.shape)) for v in values]
