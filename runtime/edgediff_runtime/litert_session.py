"""LiteRT behind the loop's `Session`: a component's .tflite file, on the CPU through XNNPACK.

What a graph gives stays in LiteRT's own buffers, and another graph takes it from there: the cache and the skip
connections are not copied.
"""

import atexit
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError, RequestError, one_line
from edgediff_runtime.manifest import Graph, Tensor
from edgediff_runtime.ort_session import cores
from edgediff_runtime.stderr import silent
from edgediff_runtime.tensor_check import Found, check_tensors

Array = npt.NDArray[Any]
INSTALL = "pip install ai-edge-litert"
OLDEST = "2.3"


@dataclass(frozen=True)
class Held:
    """A tensor that a graph gave, in a buffer of LiteRT's."""

    buffer: Any
    tensor: Tensor


class LiteRtSession:
    """Runs a component's .tflite file, a signature for each graph.

    One object may serve several threads, which take turns: signatures of one model share their memory.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None = None, component: str = "unet", cache: Path | None = None
    ) -> None:
        """Checks and opens a component's file; `threads` None takes as many as the process has cores, LiteRT one.

        With a folder as `cache`, XNNPACK keeps the weights there as it packed them for this processor.
        """
        loaded = bundle.manifest.target("litert").component(component)
        self.graphs = loaded.graphs
        self.batch = loaded.batch
        every = [graph for graph in loaded.every_graph if graph.file is not None]
        (file,) = {str(graph.file) for graph in every}
        path = bundle.file(file)
        kept = None if cache is None else cache / f"{bundle.manifest.files[file].sha256[:32]}.xnnpack"
        self._model = _open(path, threads, kept)
        for graph in every:
            _check(graph, self._model)
        self._inputs: dict[tuple[str, str], Any] = {}
        self._running = threading.Lock()

    def put(self, array: Array) -> Any:
        """Takes an array as it is: which buffer it goes to depends on the graph."""
        return array

    def get(self, value: Any) -> Array:
        """Copies a tensor out of its buffer."""
        if not isinstance(value, Held):
            array: Array = value
            return array
        with self._running:
            shape = tuple(map(int, value.tensor.shape))
            found: Array = value.buffer.read(int(np.prod(shape)), np.dtype(value.tensor.dtype)).reshape(shape)
        return found

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on tensors by name and adds its outputs; these stay in LiteRT's buffers."""
        signature = str(graph.function)
        with self._running:
            try:
                given = {t.name: self._given(signature, t, tensors[t.name]) for t in graph.inputs}
                made = {t.name: self._model.create_output_buffer_by_name(signature, t.name) for t in graph.outputs}
                self._model.run_by_name(signature, given, made)
            except RuntimeError as e:
                raise BundleError(f"{graph.file}: {signature} failed: {one_line(e)}") from e
        tensors.update((tensor.name, Held(made[tensor.name], tensor)) for tensor in graph.outputs)

    def _given(self, signature: str, tensor: Tensor, value: Any) -> Any:
        """The buffer that a graph reads a tensor from: another graph's, or its own, into which an array is copied."""
        if isinstance(value, Held):
            return value.buffer
        key = signature, tensor.name
        if key not in self._inputs:
            self._inputs[key] = self._model.create_input_buffer_by_name(*key)
        self._inputs[key].write(np.ascontiguousarray(value))
        return self._inputs[key]


def _open(path: Path, threads: int | None, kept: Path | None) -> Any:
    """Opens a file on the CPU."""
    try:
        with silent():
            import ai_edge_litert  # noqa: F401
            from ai_edge_litert.compiled_model import CompiledModel
            from ai_edge_litert.hardware_accelerator import HardwareAccelerator
            from ai_edge_litert.interpreter import Interpreter, OpResolverType
            from ai_edge_litert.options import Options
    except ImportError as e:
        missing = "is not installed" if e.name == "ai_edge_litert" else f"is older than {OLDEST}"
        raise RequestError(f"backend 'litert' needs ai-edge-litert, which {missing}; {INSTALL}") from e
    options = Options.create()
    options.hardware_accelerators = HardwareAccelerator.CPU
    options.cpu_options.num_threads = cores() if threads is None else threads
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        options.cpu_options.xnnpack_weight_cache_path = os.fspath(kept)
    try:
        with silent():
            # This one checks the file's tables; CompiledModel takes them as they are, and a truncated file crashed it.
            Interpreter(os.fspath(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
            return CompiledModel.from_file(os.fspath(path), options=options, environment=_environment())
    except (RuntimeError, ValueError) as e:
        raise BundleError(f"{path.name} cannot be loaded by LiteRT: {one_line(e)}; export again") from e


@cache
def _environment() -> Any:
    """The one environment of the process, and a second that LiteRT makes for buffers: both print at their end too."""
    from ai_edge_litert.environment import Environment
    from ai_edge_litert.tensor_buffer import TensorBuffer

    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    TensorBuffer.create_from_host_memory(np.zeros(64, np.float32)).write(np.zeros(64, np.float32))
    return Environment.create()


def _check(graph: Graph, model: Any) -> None:
    """Checks a signature's tensors against the manifest."""
    known = model.get_signature_list()
    if graph.function not in known:
        raise BundleError(f"{graph.file} has no signature {graph.function!r}; it has: {', '.join(known)}")
    sides = []
    for said, details in (
        (graph.inputs, model.get_input_tensor_details(graph.function)),
        (graph.outputs, model.get_output_tensor_details(graph.function)),
    ):
        order = [tensor.name for tensor in said]
        # A signature's tensors have names and no order.
        named = sorted(details, key=lambda name: order.index(name) if name in order else len(order))
        sides.append([_found(name, details[name]) for name in named])
    check_tensors(graph, *sides)


def _found(name: str, detail: Any) -> Found:
    return Found(frozenset({name}), np.dtype(detail["dtype"]).name, tuple(map(int, detail["shape"])))
