"""The backends that are timed: what each needs, and how a bundle is opened in it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from edgediff.errors import EdgediffError, UnsupportedError
from edgediff.targets.backends import open_session
from edgediff.verify.source import open_source
from edgediff_runtime import Bundle, Manifest
from edgediff_runtime.manifest import File, Graph, Target, share_rows
from edgediff_runtime.ort_bound_session import CUDA
from edgediff_runtime.sessions import Session

# A result in bf16 is held to less than the bundle's own floor, which is for fp32.
BF16_DB = 35.0


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle.

    Attributes:
        name: As everywhere.
        targets: Whose graphs it runs, the first of them that a bundle has; none where it runs the source.
        package: What must be installed.
        install: The command that installs it.
        floor_db: What its output is held to; None takes the floor of the bundle's target.
        provider: Which of ONNX Runtime's execution providers must be there too.
        on_cpu: Whether it computes on the CPU, whose peak is measured.
    """

    name: str
    targets: tuple[str, ...]
    package: str
    install: str
    floor_db: float | None = None
    provider: str | None = None
    on_cpu: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether its package is there; not whether it works here."""
        if find_spec(self.package) is None:
            return False
        if self.provider is None:
            return True
        import onnxruntime as ort

        return self.provider in ort.get_available_providers()

    def target(self, manifest: Manifest) -> str | None:
        """Which of a bundle's targets it runs.

        Args:
            manifest: The bundle's.

        Returns:
            The target's name; None where it runs none of them.
        """
        there = {target.target for target in manifest.targets}
        return next((name for name in self.targets if name in there), None)


# Both have a package of the same name: one takes the other's place.
INSTALL_CUDA = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
BACKENDS = (
    Backend("torch", (), "torch", 'pip install "edgediff[export]"'),
    Backend("torch-compile", (), "torch", 'pip install "edgediff[export]"'),
    Backend("onnxruntime", ("onnx",), "onnxruntime", "pip install edgediff"),
    Backend("onnxruntime-cuda", ("onnx",), "onnxruntime", INSTALL_CUDA, provider=CUDA, on_cpu=False),
    Backend("openvino", ("openvino", "onnx"), "openvino", 'pip install "edgediff[bench]"'),
    Backend("openvino-bf16", ("openvino", "onnx"), "openvino", 'pip install "edgediff[bench]"', BF16_DB),
    Backend("executorch", ("executorch",), "executorch", 'pip install "edgediff[executorch]"'),
    Backend("coreml", ("coreml",), "coremltools", 'pip install "edgediff[export]", on macOS', on_cpu=False),
    Backend("mil-reference", ("coreml",), "coremltools", 'pip install "edgediff[export]"'),
)
# Evaluated in torch, to be right and not to be fast: timed where it is asked for by name.
NOT_BY_DEFAULT = ("mil-reference",)


class Whole(msgspec.Struct, frozen=True):
    """Where the undivided UNet lies in ONNX.

    Attributes:
        folder: Its directory.
        graph: As the manifest would list it.
        files: Size and hash of each file in the directory.
    """

    folder: str
    graph: Graph
    files: dict[str, File]


def named(name: str) -> Backend:
    """Finds a backend.

    Args:
        name: Its name.

    Returns:
        The backend.

    Raises:
        UnsupportedError: There is none; the choices are named.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise UnsupportedError(f"no backend {name!r}; choices: {', '.join(backend.name for backend in BACKENDS)}")


def opened(
    bundle: Bundle, backend: Backend, threads: int | None, undivided: bool = False, whole: Whole | None = None
) -> Session:
    """Opens a bundle, or the undivided UNet that it was made of.

    Args:
        bundle: The bundle.
        backend: Where.
        threads: How many may be at work; the backend's own choice where None.
        undivided: Whether to open the undivided UNet in the place of the bundle's graphs.
        whole: That in ONNX; backends that run the source do without.

    Returns:
        The session.

    Raises:
        BundleError: The backend cannot load the graphs.
        RequestError: The backend is not to be had on this machine.
        UnsupportedError: The source is not at hand.
    """
    if not backend.targets:
        return _torch(bundle.manifest, compile_parts=backend.name == "torch-compile", undivided=undivided)
    if whole is not None:
        bundle = Bundle(Path(whole.folder), _with_whole(bundle.manifest, whole))
    return open_session(bundle, backend.name, threads=threads)


def _with_whole(manifest: Manifest, whole: Whole) -> Manifest:
    """A manifest of the undivided UNet alone."""
    target: Target = msgspec.structs.replace(manifest.target("onnx"), graphs=(whole.graph,))
    return msgspec.structs.replace(manifest, targets=(target,), files=whole.files)


def _torch(manifest: Manifest, compile_parts: bool, undivided: bool) -> Session:
    from edgediff.models.graphs import graph_list
    from edgediff.models.part import Part
    from edgediff.models.torch_session import TorchSession
    from edgediff.models.undivided import NAME, Undivided, undivided_graph

    found, reason = open_source(manifest)
    if found is None:
        raise UnsupportedError(f"{reason}; torch runs the model that the bundle was made of")
    model, divided = found
    graphs = graph_list(divided, model)
    parts: dict[str, Part] = divided.parts
    if undivided:
        parts = {NAME: Undivided(model.unet, divided.inputs)}
        graphs = (undivided_graph(graphs, divided.inputs),)
    session = TorchSession(parts, graphs)
    if compile_parts:
        import torch

        compiler: Callable[..., Any] = torch.compile
        session.parts = {name: compiler(part) for name, part in parts.items()}
    return session


def export_undivided(bundle: Bundle, inputs: "dict[str, Any]", folder: Path) -> Whole:
    """Exports the undivided UNet of a bundle's source to ONNX, as the bundle's graphs were.

    Args:
        bundle: The bundle.
        inputs: Real inputs of a full step by name, for tracing.
        folder: An empty directory.

    Returns:
        Where it lies.

    Raises:
        UnsupportedError: The source is not at hand, or cannot be exported.
    """
    try:
        from edgediff.bundle.files import list_files
        from edgediff.models.graphs import graph_list
        from edgediff.models.undivided import NAME, Undivided, undivided_graph
        from edgediff.targets.onnx import OnnxConfig
        from edgediff.targets.onnx.write_onnx import write_graph
    except ModuleNotFoundError as e:
        raise UnsupportedError(f"exporting the undivided UNet needs {e.name}") from e
    found, reason = open_source(bundle.manifest)
    if found is None:
        raise UnsupportedError(reason)
    model, divided = found
    file = f"onnx/{NAME}.onnx"
    (folder / "onnx").mkdir()
    graph = undivided_graph(graph_list(divided, model), divided.inputs, file)
    settings = msgspec.convert(bundle.manifest.config["onnx"], OnnxConfig)
    given = {tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in graph.inputs}
    share = share_rows(bundle.manifest.target("onnx").graphs)
    try:
        done = write_graph(Undivided(model.unet, divided.inputs), graph, given, folder / file, settings, share)
    except EdgediffError as e:
        raise UnsupportedError(f"the undivided UNet cannot be exported: {e}") from e
    beside = None if done.external_data is None else f"onnx/{done.external_data}"
    graph = msgspec.structs.replace(graph.with_shared_rows() if done.shares_rows else graph, external_data=beside)
    return Whole(str(folder), graph, list_files(folder))
