"""Core ML behind the loop's `Session`: Apple's own runtime, on macOS."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError, RequestError, one_line
from edgediff_runtime.manifest import Graph

Array = npt.NDArray[Any]
Features = Mapping[str, tuple[str, tuple[Any, ...]]]

# FeatureTypes.proto's ArrayDataType.
ARRAY_TYPES = {65552: "float16", 65568: "float32", 131104: "int32"}
COMPUTE_UNITS = ("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne")


class CoreMLSession:
    """Runs a bundle's Core ML packages with ``MLModel.predict``.

    Tensors are numpy arrays: predictions go through them anyway. One object may serve several threads.
    """

    def __init__(self, bundle: Bundle, compute_units: str = "all", component: str = "unet") -> None:
        """Checks and loads the packages of a component; `compute_units` is one of `COMPUTE_UNITS`."""
        if compute_units not in COMPUTE_UNITS:
            raise RequestError(f"no compute units {compute_units!r}; choices: {', '.join(COMPUTE_UNITS)}")
        if sys.platform != "darwin":
            raise RequestError(
                "backend 'coreml' needs macOS, which this machine does not run; --backend mil-reference evaluates "
                "the same packages in torch"
            )
        loaded = bundle.manifest.target("coreml").component(component)
        with quiet():
            try:
                import coremltools as ct
            except ImportError as e:
                raise RequestError(
                    "backend 'coreml' needs coremltools, which is not installed; pip install coremltools"
                ) from e
        self.graphs = loaded.graphs
        self.batch = loaded.batch
        self._bundle: Bundle = bundle
        self._load: Callable[[str, str | None], Any] = lambda path, function: ct.models.MLModel(
            path, compute_units=ct.ComputeUnit[compute_units.upper()], function_name=function
        )
        self._models: dict[str, Any] = {}
        self._checked: set[str] = set()
        for graph in self.graphs:
            if graph.file is not None:
                self._model(graph)

    def _model(self, graph: Graph) -> Any:
        """A graph's model; one of a further size is loaded when it is first run."""
        if graph.key in self._models:
            return self._models[graph.key]
        file = str(graph.file)
        if file not in self._checked:
            self._bundle.folder(file)
            self._checked.add(file)
        try:
            with quiet():
                model = self._load(os.fspath(self._bundle.path / file), graph.function)
        except Exception as e:  # coremltools' errors share no base class
            raise BundleError(f"{file} cannot be loaded: {one_line(e)}") from e
        _check_tensors(graph, model.get_spec())
        # coremltools also opens what this system cannot load, and fails at the first prediction.
        if model.__proxy__ is None:
            why = getattr(model, "_framework_error", None) or "the package is newer than this system's Core ML"
            raise RequestError(f"{file} cannot be loaded by Core ML here: {one_line(why)}")
        self._models[graph.key] = model
        return model

    def put(self, array: Array) -> Any:
        """Takes an array as it is."""
        return array

    def get(self, value: Any) -> Array:
        """Gives an array back as it is: predictions make new ones."""
        array: Array = value
        return array

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph on tensors by name and adds its outputs, in the dtypes that the manifest declares."""
        feeds = {tensor.name: tensors[tensor.name] for tensor in graph.inputs}
        model = self._model(graph)
        try:
            made = model.predict(feeds)
        except Exception as e:
            raise BundleError(f"{graph.file}: the prediction failed: {one_line(e)}") from e
        for tensor in graph.outputs:
            name = tensor.stored_name
            if name not in made or np.shape(made[name]) != tensor.shape:
                found = {name: list(np.shape(value)) for name, value in made.items()}
                raise BundleError(
                    f"{graph.file} gave {found}; the manifest says {name} {list(tensor.shape)}; export again"
                )
            tensors[tensor.name] = np.asarray(made[name], dtype=tensor.dtype)


def _check_tensors(graph: Graph, spec: Any) -> None:
    """Checks what a package says of a function against the manifest."""
    described = spec.description
    if graph.function is not None:
        named = {function.name: function for function in described.functions}
        if graph.function not in named:
            raise BundleError(f"{graph.file} has no function {graph.function!r}; choices: {', '.join(named)}")
        described = named[graph.function]

    def features(found: Any) -> Features:
        arrays = {feature.name: feature.type.multiArrayType for feature in found}
        return {name: (ARRAY_TYPES.get(a.dataType, str(a.dataType)), tuple(a.shape)) for name, a in arrays.items()}

    check_features(graph, features(described.input), features(described.output))


def check_features(graph: Graph, inputs: Features, outputs: Features) -> None:
    """Checks a package's tensors, dtype and shape by name, against the manifest's graph.

    Core ML needs no shape of outputs: none, (), fits any.
    """
    for said, found in ((graph.inputs, inputs), (graph.outputs, outputs)):
        named = {tensor.stored_name: tensor for tensor in said}
        want = {n: (t.dtype, t.shape if found.get(n, ("", t.shape))[1] else ()) for n, t in named.items()}
        if want != dict(found):
            raise BundleError(f"{graph.file} has {_spell(found)}; the manifest says {_spell(want)}; export again")


def _spell(tensors: Features) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in sorted(tensors.items())) or "nothing"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps coremltools' log lines and warnings off the screen while the block runs: what fails is raised."""
    logger = logging.getLogger("coremltools")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
