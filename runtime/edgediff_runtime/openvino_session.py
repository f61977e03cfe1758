"""OpenVINO behind the loop's `Session`: the bundle's own models for it, or its ONNX graphs, on its CPU plugin."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import LOCAL_DIR, Bundle
from edgediff_runtime.errors import BundleError, RequestError, one_line
from edgediff_runtime.manifest import Graph
from edgediff_runtime.tensor_check import UNTOLD, Found, check_tensors

Array = npt.NDArray[Any]
# OpenVINO's names of the precisions it computes in; the graphs' inputs and outputs stay as they are.
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
# A graph and the shapes of its inputs, for which it is compiled.
_Key = tuple[str, tuple[tuple[int, ...], ...]]
# For how many shapes a graph stays compiled: with guidance, without, and the previous call's.
KEPT = 4
TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}


class OpenVinoSession:
    """Runs a bundle in OpenVINO: its models in IR where it has them, else its ONNX graphs.

    Its CPU plugin is slower on symbolic shapes: a graph is compiled for all shapes that it is given, of which the last
    `KEPT` are kept. Tensors are numpy arrays. One object may serve several threads.
    """

    batch: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "fp32",
        threads: int | None = None,
        component: str = "unet",
        cache: Path | None = None,
    ) -> None:
        """Checks and reads the graphs, to compute in one of `PRECISIONS`; compiled once the shapes are known.

        With a folder as `cache`, OpenVINO keeps compiled graphs there.
        """
        if precision not in PRECISIONS:
            raise RequestError(f"no precision {precision!r}; choices: {', '.join(PRECISIONS)}")
        try:
            import openvino as ov
        except ImportError as e:
            raise RequestError("backend 'openvino' needs OpenVINO, which is not installed; pip install openvino") from e
        self._core = ov.Core()
        # The precision is a hint: a processor without bf16 ignores it silently.
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RequestError(
                "backend 'openvino-bf16' needs a processor with bf16, which this one lacks; take 'openvino'"
            )
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            self._settings["CACHE_DIR"] = os.fspath(cache)
        loaded = bundle.manifest.target("openvino", "onnx").component(component)
        self.graphs, self._has_int4 = loaded.graphs, "int4" in loaded.weights
        with bundle.hold(self.graphs):
            self._models = {graph.name: self._read(bundle, graph) for graph in self.graphs if graph.file is not None}
        self._compiled: OrderedDict[_Key, Any] = OrderedDict()
        self._compiling = threading.Lock()
        self._requests = threading.local()

    def put(self, array: Array) -> Array:
        """Takes an array as it is."""
        return array

    def get(self, value: Array) -> Array:
        """Gives a tensor back as it is: each run makes new ones."""
        return value

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on tensors by name and adds its outputs."""
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        shapes = tuple(feeds[tensor.name].shape for tensor in graph.inputs)
        # A request holds the tensors of one run: each thread has its own.
        known: OrderedDict[_Key, Any] = self._requests.__dict__.setdefault("known", OrderedDict())
        request = known.get((graph.name, shapes))
        if request is None:
            request = self._compile(graph, shapes).create_infer_request()
        self._keep(known, (graph.name, shapes), request)
        try:
            made = request.infer(feeds, share_inputs=True, share_outputs=True)
        except RuntimeError as e:
            raise RequestError(f"{graph.name} cannot run: {one_line(e)}; ask for fewer images at once") from e
        # The outputs are in the request's own memory, which the next run overwrites.
        tensors.update((tensor.name, np.array(made[tensor.name])) for tensor in graph.outputs)

    def _read(self, bundle: Bundle, graph: Graph) -> Any:
        """Reads a graph and checks it against the manifest."""
        try:
            # IR models share one file of weights; ONNX graphs name their own.
            is_ir = str(graph.file).endswith(".xml")
            weights = [os.fspath(bundle.path / name) for name in graph.external_data] if is_ir else []
            model = self._core.read_model(os.fspath(bundle.path / str(graph.file)), *weights)
        except RuntimeError as e:
            linked = next((name for name in graph.external_data if (bundle.path / name).is_symlink()), None)
            if linked is not None:
                said = f"{linked} is a link, which OpenVINO does not follow"
                raise BundleError(f"{said}; {LOCAL_DIR}, or take backend 'onnxruntime'") from e
            if self._has_int4 and not is_ir:
                raise BundleError(
                    f"{graph.file} has weights in int4, which OpenVINO does not read from ONNX; take backend "
                    "'onnxruntime', or export with --target openvino --weights int4"
                ) from e
            what = f"{graph.file} cannot be read by OpenVINO: {one_line(e)}"
            raise BundleError(f"{what}; update openvino or export again") from e
        check_tensors(graph, _found(model.inputs), _found(model.outputs))
        return model

    def _compile(self, graph: Graph, shapes: tuple[tuple[int, ...], ...]) -> Any:
        with self._compiling:
            found = self._compiled.get((graph.name, shapes))
            if found is None:
                try:
                    model = self._models[graph.name].clone()
                    model.reshape({t.name: [*shape] for t, shape in zip(graph.inputs, shapes, strict=True)})
                    found = self._core.compile_model(model, "CPU", self._settings)
                except RuntimeError as e:
                    what = f"{graph.file} cannot be compiled by OpenVINO: {one_line(e)}"
                    raise BundleError(f"{what}; update openvino or export again") from e
            self._keep(self._compiled, (graph.name, shapes), found)
            return found

    def _keep(self, known: OrderedDict[_Key, Any], key: _Key, value: Any) -> None:
        """Remembers what was used last, and forgets what was not used for longest."""
        known[key] = value
        known.move_to_end(key)
        while len(known) > KEPT * len(self.graphs):
            known.popitem(last=False)


def _found(ports: Any) -> list[Found]:
    found = []
    for port in ports:
        dtype, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
        sizes = None if shape.rank.is_dynamic else tuple(UNTOLD if n.is_dynamic else n.get_length() for n in shape)
        found.append(Found(frozenset(port.get_names()), TYPES.get(dtype, dtype), sizes))
    return found
