"""ONNX Runtime with every tensor bound to one device's memory, for GPUs.

A tensor on the CPU is copied to the GPU and back in every run. Here the cache and the skip connections stay on the
device; only the sample, the conditioning and the result are copied.
"""

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.manifest import Graph
from edgediff_runtime.ort_options import session_options
from edgediff_runtime.ort_session import CPU, load_graphs

Array = npt.NDArray[Any]

CUDA = "CUDAExecutionProvider"
# ONNX Runtime's providers of each device, by preference. TF32 would round an fp32 graph's matmul inputs to ten bits.
PROVIDERS: dict[str, tuple[Any, ...]] = {"cpu": (CPU,), "cuda": ((CUDA, {"use_tf32": "0"}), CPU)}


class OrtBoundSession:
    """ONNX Runtime on tensors that stay in a device's memory.

    One object may serve several threads: it holds the loaded graphs and nothing of any generation. A tensor is an
    OrtValue on the device. All rows go through a graph together.
    """

    batch: int | None = None

    def __init__(
        self, bundle: Bundle, device: str = "cuda", threads: int | None = None, component: str = "unet"
    ) -> None:
        """Checks and loads a component's ONNX graphs on one of `PROVIDERS`; of several NVIDIA GPUs on the first."""
        import onnxruntime as ort

        if device not in PROVIDERS:
            raise RequestError(f"no device {device!r}; choices: {', '.join(PROVIDERS)}")
        log = _find_cuda() if device == "cuda" else ""
        opened = bundle.manifest.target("onnx").component(component)
        self.graphs = opened.graphs
        self.device = device
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        self._sessions: dict[str, Any] = {}
        options = session_options(opened.dtype == "int8", threads, bool(opened.weights))
        with bundle.hold(self.graphs):
            for graph in self.graphs:
                loaded = load_graphs(bundle, (graph,), options, PROVIDERS[device])
                # ONNX Runtime continues without a provider whose libraries cannot be loaded.
                if device == "cuda" and any(CUDA not in each.get_providers() for each in loaded.values()):
                    raise RequestError(
                        "backend 'onnxruntime-cuda' needs an NVIDIA GPU, and the libraries of CUDA and cuDNN that "
                        f"onnxruntime-gpu names; ONNX Runtime could not start there{f': {log}' if log else ''}"
                    )
                self._sessions |= loaded

    def put(self, array: Array) -> Any:
        """Copies an array to the device; on the CPU it is wrapped as it is."""
        return self._from_numpy(np.ascontiguousarray(array), self.device, 0)

    def get(self, value: Any) -> Array:
        """Copies a tensor from the device."""
        array: Array = value.numpy()
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on tensors by name and adds its outputs; all stay on the device."""
        session = self._sessions[graph.name]
        binding = session.io_binding()
        for tensor in graph.inputs:
            binding.bind_ortvalue_input(tensor.name, tensors[tensor.name])
        for tensor in graph.outputs:
            binding.bind_output(tensor.name, self.device, 0)
        try:
            session.run_with_iobinding(binding)
        except Exception as e:  # onnxruntime's own errors share no base class
            raise RequestError(f"{graph.name} cannot run on {self.device}: {one_line(e)}") from e
        tensors.update(zip((tensor.name for tensor in graph.outputs), binding.get_outputs(), strict=True))


def _find_cuda() -> str:
    """Loads the libraries of CUDA and cuDNN that pip installed; returns what ONNX Runtime printed."""
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        raise RequestError(
            "backend 'onnxruntime-cuda' needs an NVIDIA GPU and an ONNX Runtime built for CUDA, which this one is not; "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    with redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    return " ".join(said.getvalue().split())[:300]
