"""Sessions: what runs a bundle's graphs, behind one interface.

The loop knows tensors only by name and never looks into them. A session keeps them in its backend's own form, so that
the cache and the skip connections go from graph to graph without a copy through numpy.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.coreml_session import CoreMLSession
from edgediff_runtime.errors import RequestError
from edgediff_runtime.litert_session import LiteRtSession
from edgediff_runtime.manifest import Graph
from edgediff_runtime.openvino_session import OpenVinoSession
from edgediff_runtime.ort_bound_session import OrtBoundSession
from edgediff_runtime.ort_session import OrtSession

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
        """Runs a graph on the named tensors and adds its outputs; a RequestError or BundleError where it fails."""
        ...


# The targets whose graphs a backend runs, the best first.
TARGETS_OF = {
    "onnxruntime": ("onnx",),
    "onnxruntime-cuda": ("onnx",),
    "openvino": ("openvino", "onnx"),
    "openvino-bf16": ("openvino", "onnx"),
    "coreml": ("coreml",),
    "litert": ("litert",),
}
BACKENDS = tuple(TARGETS_OF)


def open_session(
    bundle: Bundle,
    backend: str = "onnxruntime",
    compute_units: str = "all",
    threads: int | None = None,
    component: str = "unet",
    cache: Path | None = None,
    low_memory: bool = False,
) -> Session:
    """Opens a component of a bundle in a backend.

    Args:
        compute_units: What Core ML may use: ``all``, ``cpu_only``, ``cpu_and_gpu`` or ``cpu_and_ne``.
        threads: How many to use on the CPU; None takes the backend's own choice. Core ML has no such choice.
        cache: A folder in which the backend keeps graphs as it optimized them for this machine; not Core ML.
        low_memory: Keep weights of fewer bits as they are stored, where ONNX Runtime can, and make numbers of them in
            each run.

    Raises:
        BundleError: The backend cannot load the bundle.
        RequestError: The backend is unknown or not available on this machine, or `threads` is not above 0.
    """
    check_backend(backend)
    check_threads(threads)
    if backend == "coreml":
        return CoreMLSession(bundle, compute_units, component)
    refuse_compute_units(backend, compute_units)
    if backend == "litert":
        return LiteRtSession(bundle, threads, component, cache)
    if backend == "onnxruntime":
        return OrtSession(bundle, threads, component, cache, low_memory)
    if backend == "onnxruntime-cuda":
        return OrtBoundSession(bundle, "cuda", threads, component)
    return OpenVinoSession(bundle, "fp32" if backend == "openvino" else "bf16", threads, component, cache)


def check_backend(backend: object) -> None:
    """Refuses a backend that the runtime does not have."""
    if backend not in BACKENDS:
        raise RequestError(f"no backend {backend!r}; choices: {', '.join(BACKENDS)}")


def check_cache(cache: Path | None) -> None:
    """Refuses a cache that is no folder, nor can become one."""
    if cache is not None and cache.exists() and not cache.is_dir():
        raise RequestError(f"cache {cache} is a file; expected a folder")


def refuse_compute_units(backend: str, compute_units: str) -> None:
    """Refuses compute units other than ``all`` for a backend that is not Core ML."""
    if compute_units != "all":
        raise RequestError(f"compute units {compute_units!r} are for backend 'coreml'; leave them out with {backend!r}")


def check_threads(threads: object) -> None:
    """Refuses a number of threads that is neither None nor a whole number above 0."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise RequestError(f"threads is {threads!r}; expected a whole number above 0")
