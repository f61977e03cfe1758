"""Core ML: ML Programs in .mlpackage directories, of fixed shapes, made and evaluated on any machine."""

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
import numpy as np

from edgediff.config.floors import VerifyConfig
from edgediff.config.sizes import PictureSizes
from edgediff.errors import ConfigError
from edgediff.extras import needing
from edgediff.targets.base import (
    PRECISIONS,
    Backend,
    ComponentJob,
    HalfConstants,
    Job,
    Layout,
    Outline,
    Precision,
    Sizes,
    Target,
    batch_check,
    fixed,
    is_outside,
)
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m

if TYPE_CHECKING:
    from edgediff.bundle.rows import Finding
    from edgediff_runtime.sessions import Session

DeploymentTarget = Literal["iOS16", "iOS17", "iOS18"]
UNET = "coreml/Unet.mlpackage"
# Apple's names of the components' packages, and such of those that its pipeline does not have.
PACKAGES = {
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
    "preview_decoder": "PreviewDecoder",
    "t2i_adapter": "T2IAdapter",
}
IDS = "input_ids"
DEVICE, EVALUATOR = "coreml", "mil-reference"
# Floors of Apple's runtime, whatever the recipe asks of the evaluator: it may add in fp16.
DEVICE_DB, DEVICE_TRAJECTORY_DB = 45.0, 35.0
# The system whose packages hold several functions over weights stored once.
SEVERAL_FUNCTIONS = "iOS18"
# Systems whose programs have attention as one op, which has no scale of its own.
FUSED_ATTENTION = ("iOS18",)


class CoreMLConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the Core ML packages (ML Programs) are written.

    Attributes:
        dtype: Precision of weights, features and arithmetic. The timestep's path through sine and cosine, the sample
            and the output stay fp32 in either.
        deployment_target: Oldest system that is to run them. The ``pair`` layout needs iOS18's multifunction packages.
        batch: Rows of each graph, which is fixed throughout; None takes 2 where the operating point is guided (the
            unconditional and the conditional row of an image), 1 where it is not.
        weights: What the weights of every component are stored in: ``int8`` (a scale for each output channel),
            ``palette8``, 6, 4, 3 or 2 (a table of numbers for each weight; below 8 bits, the smallest tenth in int8),
            or a plan of weights, a file. None leaves them in `dtype`.
    """

    dtype: Precision = "fp16"
    deployment_target: DeploymentTarget = "iOS18"
    batch: int | None = None
    layout: Layout | None = None
    weights: str | None = None


class CoreMLTarget(Target):
    """ML Programs: evaluated by `mil` on any machine, run by Apple's runtime on a Mac."""

    name, title, files = "coreml", "Core ML", "Core ML packages"
    config = CoreMLConfig
    packages: ClassVar[Mapping[str, str]] = {"coremltools": "9.0"}
    backends = (
        # Evaluated in torch, for checking and not for speed.
        Backend(
            EVALUATOR,
            ("coreml",),
            ("torch", "coremltools"),
            'pip install "edgediff[export]"',
            "verify Core ML packages (mil-reference)",
            is_own=True,
            by_default=False,
        ),
        Backend(
            DEVICE,
            ("coreml",),
            ("coremltools",),
            'pip install "edgediff[export]", on macOS',
            "run Core ML packages on Apple's runtime",
            only_mac=True,
            on_cpu=False,
        ),
    )
    precisions = PRECISIONS
    weight_formats = ("int8", "palette8", "palette6", "palette4", "palette3", "palette2")
    accelerators = ("ane",)
    lends_session = True

    def check(self, config: CoreMLConfig, layout: Layout) -> None:
        """Checks the batch, and that the system can load several functions in one package."""
        batch_check(self, config.batch)
        if layout == "pair" and config.deployment_target != SEVERAL_FUNCTIONS:
            raise ConfigError(
                f"layout pair needs Core ML packages of several functions, which {config.deployment_target} cannot "
                f"load; expected 'coreml.deployment_target' {SEVERAL_FUNCTIONS}, or layout split"
            )

    def check_sizes(self, config: CoreMLConfig, sizes: PictureSizes) -> None:
        """Checks that sizes are named, and that the system can load a function for each."""
        super().check_sizes(config, sizes)
        if len(sizes.named) > 1 and config.deployment_target != SEVERAL_FUNCTIONS:
            raise ConfigError(
                f"'sizes' has {len(sizes.named)} sizes, which take Core ML packages of several functions; "
                f"{config.deployment_target} cannot load those; expected 'coreml.deployment_target' "
                f"{SEVERAL_FUNCTIONS}, or one size"
            )

    def default_layout(self, config: CoreMLConfig, mask: tuple[bool, ...]) -> Layout:
        """``split``, which every system loads."""
        return "split"

    def require(self) -> None:
        """Imports coremltools."""
        from edgediff.mil.coremltools_quiet import import_coremltools

        import_coremltools("exporting to Core ML")

    def describe(self, outline: Outline, config: CoreMLConfig) -> m.Target:
        """Graphs of fixed shapes: features in the graph's dtype, int32 in the place of int64.

        Each is a package; functions of one in the layout ``pair``, and where the undivided step is beside them, whose
        weights are theirs.
        """
        from edgediff.targets.coreml.swift_pipeline import undivided_graph
        from edgediff.targets.layout import pack

        batch = outline.rows if config.batch is None else config.batch
        graphs = []
        for graph in pack(outline.parts, outline.divided, outline.layout):
            inputs, outputs = (_typed(fixed(side, batch), config.dtype) for side in (graph.inputs, graph.outputs))
            graphs.append(msgspec.structs.replace(graph, inputs=inputs, outputs=outputs))
        model = undivided_graph(graphs, UNET) if config.deployment_target == SEVERAL_FUNCTIONS else None
        is_one = outline.layout == "pair" or model is not None or bool(outline.sizes.further)
        placed = tuple(_placed(graph, is_one) if graph.file is not None else graph for graph in graphs)
        unet = msgspec.structs.replace(outline.sizes.each(outline.unet(placed, config.dtype, batch)), model=model)
        return m.CoreMLTarget({"unet": unet}, config.deployment_target, specification_version=0)

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: VerifyConfig, config: CoreMLConfig, sizes: Sizes
    ) -> m.Component | None:
        """One package of one row, named as Apple's Swift pipeline calls it; a function for each of several sizes."""
        from edgediff.targets.coreml.swift_pipeline import encoder_names

        inputs, outputs = (_typed(fixed(side, 1), config.dtype) for side in (graph.inputs, graph.outputs))
        inputs = tuple(msgspec.structs.replace(t, dtype="float32") if t.name == IDS else t for t in inputs)
        # A package has no dots in names.
        names = {t.name: t.name.replace(".", "_") for t in outputs if "." in t.name} | encoder_names(outputs)
        outputs = tuple(msgspec.structs.replace(t, stored_as=names.get(t.name)) for t in outputs)
        file = f"coreml/{PACKAGES[graph.name]}.mlpackage"
        several = bool(sizes.further) and bool(graph.maps)
        function = graph.name if several else None
        graph = msgspec.structs.replace(graph, file=file, inputs=inputs, outputs=outputs, function=function)
        return sizes.each(m.Component(stage, config.dtype, 1, verify.floors(config.dtype), (graph,)))

    def tokenizer_files(self, tokenizer: str) -> Mapping[str, str]:
        """The vocabulary and the merges lie where Apple's pipeline reads them.

        They lie there once: its two tokenizers of SDXL, which differ in the token that pads, read the same files.
        """
        return {**super().tokenizer_files(tokenizer), "vocab.json": "vocab.json", "merges.txt": "merges.txt"}

    def essence(self, entry: Any) -> m.Target:
        """Without the specification version, which the converter decides."""
        return super().essence(msgspec.structs.replace(entry, specification_version=0))

    def asks_for(self, entry: Any) -> str:
        """The oldest system."""
        return str(entry.deployment_target)

    def run_hint(self, entry: Any) -> str:
        """The two backends that run packages, and the oldest system."""
        return (
            f"Core ML packages for {entry.deployment_target} and later: `edgediff run . -o out.png` with "
            f"`--backend {DEVICE}` on a Mac, with `--backend {EVALUATOR}` elsewhere."
        )

    def write(self, job: Job) -> m.Target:
        """Converts each graph, and joins those of one package; the undivided step is its default function."""
        from edgediff.targets.coreml.swift_pipeline import SwiftStep
        from edgediff.targets.coreml.write_coreml import write_coreml

        unet, modules = job.target.unet, dict(job.modules)
        graphs = unet.every_graph
        if unet.model is not None:
            full = [modules[graph.name] for graph in unet.graphs if graph.runs(full=True)]
            modules[unet.model.name] = SwiftStep(unet.model, full)
            graphs = (unet.model, *graphs)
        version = write_coreml(job.folder, graphs, modules, job.config, job.say, weights=job.weights)
        return msgspec.structs.replace(job.target, specification_version=version)

    def write_component(self, job: ComponentJob) -> m.Component:
        """Converts the component's graph."""
        from edgediff.targets.coreml.swift_pipeline import FloatIds
        from edgediff.targets.coreml.write_coreml import write_coreml

        part = FloatIds(job.part) if IDS in job.part.inputs else job.part
        write_coreml(
            job.folder, job.component.every_graph, {job.name: part}, job.config, job.say, job.name, job.weights
        )
        return job.component

    def usual_backend(self) -> str | None:
        """Apple's runtime on a Mac; elsewhere none, since the evaluator is for checking."""
        return DEVICE if sys.platform == "darwin" else None

    def open_session(self, bundle: Bundle, backend: str, threads: int | None, component: str = "unet") -> "Session":
        """Opens the evaluator."""
        with needing(self.extra, "evaluating Core ML packages"):
            from edgediff.targets.coreml.mil_session import MilSession
        return MilSession(bundle, threads, component)

    def half_constants(self, entry: Any) -> HalfConstants:
        """Attention's scale is none where attention is one op."""
        return half_constants(entry.deployment_target)

    def floors_on(self, backend: str, floors: m.Floors) -> m.Floors:
        """Lower ones for Apple's runtime."""
        if backend != DEVICE:
            return floors
        return msgspec.structs.replace(
            floors,
            graph=min(floors.graph, DEVICE_DB),
            composed=min(floors.composed, DEVICE_DB),
            trajectory=min(floors.trajectory, DEVICE_TRAJECTORY_DB),
        )

    def unrounded(
        self, bundle: Bundle, backend: str, session: Any, component: str = "unet"
    ) -> "contextlib.AbstractContextManager[Session] | None":
        """The evaluator can leave rounding out."""
        return session.unrounded() if backend == EVALUATOR else None

    def findings(
        self, bundle: Bundle, session: Any, graph: m.Graph, inputs: Mapping[str, np.ndarray]
    ) -> "tuple[Finding, ...]":
        """Overflow and headroom along one evaluation."""
        from edgediff.targets.coreml.headroom import findings

        return tuple(
            msgspec.structs.replace(finding, graph=graph.name)
            for finding in findings(session.functions[graph.key], inputs)
        )

    def operations(self, bundle: Bundle, graph: m.Graph) -> list[Any]:
        """Reads the operations of the graph's function."""
        with needing(self.extra, "reading an ML Program"):
            from edgediff.targets.coreml.mil_operations import read_mlprogram

        bundle.folder(str(graph.file))
        return read_mlprogram(bundle.path / str(graph.file), graph.function)


def _placed(graph: m.Graph, is_one: bool) -> m.Graph:
    """A graph in a package of its own, or as a function of the UNet's one package."""
    if is_one:
        return msgspec.structs.replace(graph, file=UNET, function=graph.name)
    return msgspec.structs.replace(graph, file=f"coreml/{graph.name}.mlpackage")


def half_constants(deployment_target: str) -> HalfConstants:
    """How the programs of a system hold numbers in fp16."""
    return HalfConstants("exact" if deployment_target in FUSED_ATTENTION else "rounded")


def _typed(tensors: tuple[m.Tensor, ...], dtype: str) -> tuple[m.Tensor, ...]:
    def element(tensor: m.Tensor) -> Any:
        if tensor.dtype == "int64":
            return "int32"
        return "float16" if dtype == "fp16" and not is_outside(tensor) else tensor.dtype

    return tuple(msgspec.structs.replace(tensor, dtype=element(tensor)) for tensor in tensors)


TARGET = CoreMLTarget()
