"""ExecuTorch behind the loop's `Session`: a bundle's program on its own runtime, through its Python bindings."""

import os
from typing import Any

import torch

from edgediff.extras import quiet
from edgediff.models.torch_session import TorchTensors
from edgediff.targets.executorch.import_executorch import import_executorch
from edgediff_runtime import Bundle, BundleError
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import Graph

# ExecuTorch's numbers of scalar types.
DTYPES = {4: "int64", 6: "float32"}


class ExecuTorchSession(TorchTensors):
    """Runs a bundle's ExecuTorch program. Outputs are copies: methods of a program share their memory."""

    def __init__(self, bundle: Bundle, threads: int | None = None, component: str = "unet") -> None:
        """Checks and loads a component's program; `threads` are of the whole process, ExecuTorch's choice if None."""
        loaded = bundle.manifest.target("executorch").component(component)
        self.graphs = loaded.graphs
        self.batch = loaded.batch
        lib = import_executorch("executorch.extension.pybindings.portable_lib", "running an ExecuTorch program")
        self._runtime = import_executorch("executorch.runtime", "running an ExecuTorch program").Runtime.get()
        if threads is not None:
            lib._unsafe_reset_threadpool(threads)
        self._bundle = bundle
        self._programs: dict[str, Any] = {}
        self._methods: dict[str, Any] = {}
        for graph in self.graphs:
            if graph.file is not None:
                self._method(graph)

    def _method(self, graph: Graph) -> Any:
        """A graph's method; one of a further size is loaded when it is first run."""
        if graph.key not in self._methods:
            file = str(graph.file)
            try:
                with quiet():
                    if file not in self._programs:
                        self._programs[file] = self._runtime.load_program(os.fspath(self._bundle.file(file)))
                    method = self._programs[file].load_method(graph.function)
            except (RuntimeError, KeyError) as e:
                raise BundleError(f"{file} cannot be loaded: {one_line(e)}") from e
            _check_method(graph, method.metadata)
            self._methods[graph.key] = method
        return self._methods[graph.key]

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph."""
        try:
            made = self._method(graph).execute([tensors[tensor.name] for tensor in graph.inputs])
        except RuntimeError as e:
            raise BundleError(f"{graph.file}: {graph.function} failed: {one_line(e)}") from e
        tensors.update((tensor.name, value) for tensor, value in zip(graph.outputs, made, strict=True))


def _check_method(graph: Graph, metadata: Any) -> None:
    """Checks a method's inputs and outputs, which have an order and no names, against the manifest."""
    for kind, said, count, meta in (
        ("inputs", graph.inputs, metadata.num_inputs(), metadata.input_tensor_meta),
        ("outputs", graph.outputs, metadata.num_outputs(), metadata.output_tensor_meta),
    ):
        found = [(DTYPES.get(meta(i).dtype(), "another type"), tuple(meta(i).sizes())) for i in range(count)]
        want = [(tensor.dtype, tensor.shape) for tensor in said]
        if found != want:
            raise BundleError(f"{graph.file}: {graph.function} has the {kind} {found}; the manifest says {want}")
