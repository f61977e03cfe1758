"""Sessions: what runs a bundle's graphs, behind one interface.

The loop knows tensors only by name and never looks into them. A session keeps them in its backend's own form, so that
the cache and the skip connections go from graph to graph without a copy through numpy.
"""

import os
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.coreml_session import CoreMLSession
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import Graph
from edgediff_runtime.openvino_session import OpenVinoSession

Array = npt.NDArray[Any]


class Session(Protocol):
    """Runs graphs on tensors that it holds in its own form.

    Attributes:
        graphs: What it runs, in the order of a step. Tensors are handed to it in the dtypes that these declare.
        batch: Rows that each graph takes, or None where any number will do.
    """

    graphs: tuple[Graph, ...]
    batch: int | None

    def put(self, array: Array) -> Any:
        """Takes an array into the backend's form; the array is not changed afterwards."""
        ...

    def get(self, value: Any) -> Array:
        """Gives a tensor back as an array of its own."""
        ...

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on the named tensors and puts its outputs among them."""
        ...


ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}


class OrtSession:
    """ONNX Runtime on the CPU.

    One object may serve several threads: it holds the loaded graphs and nothing of any generation.

    Attributes:
        graphs: The bundle's ONNX graphs.
        batch: None: they have a symbolic batch.
    """

    batch: int | None = None

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Checks and loads the ONNX graphs of a bundle.

        Args:
            bundle: The bundle.
            threads: Of each graph; as many as there are cores where None.

        Raises:
            BundleError: A graph is damaged, cannot be loaded, or has other inputs or outputs than the manifest says.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Each graph has threads of its own, which wait awake after a run: the next graph would run against them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        self._sessions: dict[str, Any] = {}
        self._outputs: dict[str, list[str]] = {}
        checked: set[str] = set()
        self.graphs = bundle.manifest.target("onnx").graphs
        for graph in self.graphs:
            if graph.file is None:
                continue
            if graph.file not in checked:
                # ONNX Runtime reads whatever external data a graph names within its folder: all of it is checked.
                bundle.file(graph.file)
                checked |= bundle.folder(str(PurePosixPath(graph.file).parent))
            if graph.external_data is not None and graph.external_data not in checked:
                bundle.file(graph.external_data)
            try:
                file = os.fspath(bundle.path / graph.file)
                session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            except Exception as e:  # onnxruntime's own errors share no base class
                raise BundleError(f"{graph.file} cannot be loaded: {' '.join(str(e).split())[:400]}") from e
            _check_tensors(graph, session)
            self._sessions[graph.name] = session
            self._outputs[graph.name] = [tensor.name for tensor in graph.outputs]

    def put(self, array: Array) -> Any:
        """Wraps an array without a copy.

        Args:
            array: C-contiguous.

        Returns:
            An OrtValue on the array's memory.
        """
        return self._from_numpy(array)

    def get(self, value: Any) -> Array:
        """Copies a tensor out.

        Args:
            value: An OrtValue.

        Returns:
            A numpy array.
        """
        array: Array = value.numpy()
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph; inputs and outputs stay OrtValues.

        Args:
            graph: One of the bundle's.
            tensors: By name; the outputs are added.
        """
        names = self._outputs[graph.name]
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        tensors.update(zip(names, self._sessions[graph.name].run_with_ort_values(names, feeds), strict=True))


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
            # A size of the graph's that is no number is symbolic, or was not inferred.
            fits = len(other.shape) == len(tensor.shape) and all(
                size == there or not isinstance(there, int)
                for size, there in zip(tensor.shape, other.shape, strict=True)
            )
            if not fits or other.type != ORT_TYPES[tensor.dtype]:
                raise BundleError(
                    f"{graph.file} has {tensor.name} as {other.type} {other.shape}; "
                    f"the manifest says {tensor.dtype} {list(tensor.shape)}"
                )


BACKENDS = ("onnxruntime", "openvino", "openvino-bf16", "coreml")


def open_session(
    bundle: Bundle, backend: str = "onnxruntime", compute_units: str = "all", threads: int | None = None
) -> Session:
    """Opens a bundle in a backend.

    Args:
        bundle: The bundle.
        backend: One of `BACKENDS`.
        compute_units: What Core ML may use: ``all``, ``cpu_only``, ``cpu_and_gpu`` or ``cpu_and_ne``.
        threads: Of each graph on the CPU; the backend's own choice where None. Core ML has no such choice.

    Returns:
        The session.

    Raises:
        BundleError: The backend cannot load the bundle.
        RequestError: The backend is unknown, or not to be had on this machine.
    """
    if backend == "coreml":
        return CoreMLSession(bundle, compute_units)
    refuse_compute_units(backend, compute_units)
    if backend == "onnxruntime":
        return OrtSession(bundle, threads)
    if backend in ("openvino", "openvino-bf16"):
        return OpenVinoSession(bundle, "fp32" if backend == "openvino" else "bf16", threads)
    raise RequestError(f"no backend {backend!r}; choices: {', '.join(BACKENDS)}")


def refuse_compute_units(backend: str, compute_units: str) -> None:
    """Refuses a choice of compute units where there is none.

    Args:
        backend: Any but ``coreml``.
        compute_units: What was asked for.

    Raises:
        RequestError: It is not ``all``.
    """
    if compute_units != "all":
        raise RequestError(f"compute units {compute_units!r} are Core ML's; backend {backend!r} has no choice of them")
