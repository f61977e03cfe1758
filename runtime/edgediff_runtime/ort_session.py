"""ONNX Runtime behind the session's interface.

Its threads share each operation of a graph between them and meet after every one, which a small graph spends much of
its time on. Rows do not look at each other, so where there are equally many for every thread each takes its own
through the whole graph, alone; where there are not, all threads share the graph. Each way is a graph of its own in
memory: the manifest says whether that is worth it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import IMAGES, Graph
from edgediff_runtime.ort_options import session_options

Array = npt.NDArray[Any]

# ONNX Runtime's execution provider.
CPU = "CPUExecutionProvider"
ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}


class OrtSession:
    """ONNX Runtime on the CPU.

    One object may serve several threads: it holds the loaded graphs and nothing of any generation. A tensor is an
    OrtValue, or a tuple of them where each thread has its own rows.

    Attributes:
        graphs: The bundle's ONNX graphs.
        batch: None: they have a symbolic batch.
        threads: How many may be at work.
    """

    batch: int | None = None

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Checks and loads the ONNX graphs of a bundle.

        Args:
            bundle: The bundle.
            threads: How many may be at work; as many as the process has cores where None.

        Raises:
            BundleError: A graph is damaged, cannot be loaded, or has other inputs or outputs than the manifest says.
        """
        import onnxruntime as ort

        target = bundle.manifest.target("onnx")
        self.graphs = target.graphs
        self.threads = _cores() if threads is None else threads
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        self._outputs = {graph.name: [tensor.name for tensor in graph.outputs] for graph in self.graphs}
        self._workers = ThreadPoolExecutor(max(self.threads - 1, 1), "rows")
        apart = target.settings.rows_apart and self.threads > 1
        with bundle.hold(self.graphs):
            self._shared = load_graphs(bundle, self.graphs, session_options(target.settings, threads))
            self._apart = load_graphs(bundle, self.graphs, session_options(target.settings, 1)) if apart else None

    def put(self, array: Array) -> Any:
        """Wraps an array without a copy.

        Args:
            array: C-contiguous, rows first.

        Returns:
            An OrtValue on the array's memory, or one for each thread's rows where all have as many.
        """
        each, left = divmod(len(array), self.threads)
        if self._apart is None or left:
            return self._from_numpy(array)
        return tuple(self._from_numpy(array[i * each : (i + 1) * each]) for i in range(self.threads))

    def get(self, value: Any) -> Array:
        """Copies a tensor out.

        Args:
            value: What `put` or `run` gave.

        Returns:
            A numpy array.
        """
        array: Array = np.concatenate([each.numpy() for each in value]) if isinstance(value, tuple) else value.numpy()
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph; inputs and outputs stay OrtValues.

        Args:
            graph: One of the bundle's.
            tensors: By name; the outputs are added.
        """
        names = self._outputs[graph.name]
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        if not any(isinstance(value, tuple) for value in feeds.values()):
            session = self._shared[graph.name]
            tensors.update(zip(names, session.run_with_ort_values(names, feeds), strict=True))
            return
        assert self._apart is not None
        session = self._apart[graph.name]

        def run_rows(i: int) -> Any:
            # What has no rows (the timestep) is the same for all.
            mine = {name: value[i] if isinstance(value, tuple) else value for name, value in feeds.items()}
            return session.run_with_ort_values(names, mine)

        others = [self._workers.submit(run_rows, i) for i in range(1, self.threads)]
        made = [run_rows(0), *(other.result() for other in others)]
        tensors.update(zip(names, zip(*made, strict=True), strict=True))


def load_graphs(
    bundle: Bundle, graphs: tuple[Graph, ...], options: Any, providers: tuple[Any, ...] = (CPU,)
) -> dict[str, Any]:
    """Loads graphs and holds them to the manifest.

    Args:
        bundle: The bundle.
        graphs: Of it.
        options: ONNX Runtime's.
        providers: Its execution providers, the one that is wanted first.

    Returns:
        A session of ONNX Runtime for each graph that has a file, by the graph's name.

    Raises:
        BundleError: One cannot be loaded, or has other inputs or outputs than the manifest says.
    """
    import onnxruntime as ort

    sessions = {}
    for graph in graphs:
        if graph.file is not None:
            try:
                file = os.fspath(bundle.path / graph.file)
                # Its own fallback, to the CPU, would be printed, and take the user's choice for another.
                session = ort.InferenceSession(file, options, providers=list(providers), enable_fallback=0)
            except Exception as e:  # onnxruntime's own errors share no base class
                raise BundleError(f"{graph.file} cannot be loaded: {' '.join(str(e).split())[:400]}") from e
            _check_tensors(graph, session)
            sessions[graph.name] = session
    return sessions


def _cores() -> int:
    """How many cores the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_tensors(graph: Graph, session: Any) -> None:
    for kind, said, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        if [tensor.name for tensor in said] != [tensor.name for tensor in found]:
            raise BundleError(
                f"{graph.file} has the {kind} {', '.join(t.name for t in found)}; "
                f"the manifest says {', '.join(t.name for t in said)}"
            )
        for tensor, other in zip(said, found, strict=True):
            # A size of the graph's that is no number is symbolic, or was not inferred. One symbol means something: rows
            # that such a graph shares, no other can.
            fits = len(other.shape) == len(tensor.shape) and all(
                size == there or (not isinstance(there, int) and IMAGES not in (size, there))
                for size, there in zip(tensor.shape, other.shape, strict=True)
            )
            if not fits or other.type != ORT_TYPES[tensor.dtype]:
                raise BundleError(
                    f"{graph.file} has {tensor.name} as {other.type} {other.shape}; "
                    f"the manifest says {tensor.dtype} {list(tensor.shape)}"
                )
