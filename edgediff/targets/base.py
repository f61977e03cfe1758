"""What a target is: a file format that graphs are written in. Each is a folder beside this file, and says all of it.

A target's folder imports nothing heavy until it writes, opens or reads a graph: recipes and the command line ask the
table of targets on installations that have none of the converters.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import msgspec
import numpy as np

from edgediff.config.floors import VerifyConfig
from edgediff.config.sizes import PictureSizes
from edgediff.errors import ConfigError, MissingExtraError, UnsupportedError
from edgediff_runtime import RequestError
from edgediff_runtime import manifest as m
from edgediff_runtime.errors import one_line

if TYPE_CHECKING:
    from edgediff.bundle.reference import Reference
    from edgediff.bundle.rows import Finding
    from edgediff.models.clockwork import SplitUNet
    from edgediff.models.part import Part
    from edgediff.models.stored_weights import StoredWeights
    from edgediff.models.weight_formats import Scales
    from edgediff.targets.operations import Op
    from edgediff_runtime import Bundle, EdgePipeline
    from edgediff_runtime.sessions import Session

Layout = Literal["split", "pair"]
Precision = Literal["fp16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Say = Callable[[str], None]
# The largest number that fp16 holds.
LARGEST_HALF = 65504.0
# What stays fp32 in fp16 graphs: the sample, and whatever comes from outside of the model. Sizes and times in the
# thousands lose their fractions in fp16, and a cast in the graph costs less than one by every caller.
OUTSIDE = (
    "sample", "out_sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "class_labels",
    "timestep_cond", "latent_sample", "latent_parameters",
)  # fmt: skip


def is_outside(tensor: m.Tensor) -> bool:
    """Whether a tensor stays what it is in fp16 graphs: fp32, or whole numbers, as those of rows are."""
    return (
        "int" in tensor.dtype
        or tensor.name in OUTSIDE
        or tensor.name.startswith((m.CONTROL_IMAGE, m.CONTROL_SCALE, m.T2I_ADAPTER))
    )


@dataclass(frozen=True)
class HalfConstants:
    """How the fp16 graphs of a target hold the numbers that a module's code holds.

    Attributes:
        attention_scale: ``rounded`` as a constant of its own; ``root`` as its square root, which queries and keys are
            multiplied by; ``exact`` where attention is one operation that has no such constant.
        rounds_epsilon: Whether a norm's epsilon is a constant, and no attribute of the operation.
        divides: Whether a division by a number stays one; else it is a multiplication by the inverse.
    """

    attention_scale: Literal["exact", "rounded", "root"] = "rounded"
    rounds_epsilon: bool = True
    divides: bool = False


class CalibratedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a target in int8 is quantized by.

    Attributes:
        quantize_nbits: 8 gives convolutions and matmuls int8 weights and inputs, with ranges measured along whole
            trajectories; everything between them stays fp32. None leaves all of it fp32.
        calibration_images: How many images those trajectories are of.
    """

    quantize_nbits: Literal[8] | None = None
    calibration_images: int = 4


class Int8Config(CalibratedConfig, frozen=True):
    """The same for ONNX and what is made of it.

    Attributes:
        quantize_attention: Also quantize the matmuls of attention over many keys, which is decomposed for it.
            ONNX Runtime has no kernels for them and computes its own operator faster.
    """

    quantize_attention: bool = False


@dataclass(frozen=True)
class Sizes:
    """Heights and widths of latents.

    Attributes:
        usual: What the evidence's trajectory is of.
        further: What graphs take too; where there are any, graphs that can take any size do.
        pixels: Pixels of a side for one of the latent.
    """

    usual: tuple[int, int]
    further: tuple[tuple[int, int], ...] = ()
    pixels: int = 1

    def any_size(self, graphs: Iterable[m.Graph]) -> tuple[m.Graph, ...]:
        """Graphs for the usual size, or for any where there are further ones."""
        return tuple(graph.of_any_size(*self.usual) if self.further else graph for graph in graphs)

    def each(self, component: m.Component) -> m.Component:
        """A component whose graphs take the usual size, with a function beside each of them for every further one."""
        if not component.has_size:
            return component
        return msgspec.structs.replace(component, further=tuple(self._at(component.graphs, *s) for s in self.further))

    def _at(self, graphs: Iterable[m.Graph], height: int, width: int) -> m.Sized:
        found, picture = [], f"{self.pixels * width}x{self.pixels * height}"
        for graph in graphs:
            function = None if graph.function is None else f"{graph.function}_{picture}"
            found.append(msgspec.structs.replace(graph.of_any_size(*self.usual).at(height, width), function=function))
        return m.Sized(height, width, tuple(found))


@dataclass(frozen=True)
class Outline:
    """What a target's entry in the manifest follows from.

    Attributes:
        rows: Rows of one image: 2 where the operating point is guided.
    """

    parts: tuple[m.Graph, ...]
    divided: "SplitUNet"
    layout: Layout
    rows: int
    verify: VerifyConfig
    sizes: Sizes

    def unet(self, graphs: tuple[m.Graph, ...], dtype: Any, batch: int | None) -> m.Component:
        """The UNet's entry, with these graphs and the floors that go with a dtype."""
        return m.Component("step", dtype, batch, self.verify.floors(dtype), graphs, self.layout)


@dataclass(frozen=True)
class Job:
    """What a target's graphs are written from.

    Attributes:
        folder: The bundle that is being written.
        target: The target's entry in the draft of the manifest.
        pipe: A pipeline over torch, for further trajectories.
        config: The target's section of the recipe.
        traces: A folder for traced graphs, which further targets of the recipe are made of too; None where none is.
        weights: What the UNet's and the adaptor's weights are stored as; None leaves all as they are.
    """

    folder: Path
    target: m.Target
    unet_config: dict[str, Any]
    modules: "Mapping[str, Part]"
    reference: "Reference"
    pipe: "EdgePipeline"
    config: Any
    verify: VerifyConfig
    say: Say
    traces: Path | None = None
    weights: "StoredWeights | None" = None

    def examples(self) -> dict[str, dict[str, np.ndarray]]:
        """Real inputs of each graph that has a file, by the graph's name.

        Raises:
            ConfigError: The clock never runs one of them.
        """
        from edgediff.bundle.reference import recorded_inputs

        written = [graph for graph in self.target.unet.graphs if graph.file is not None]
        examples = {graph.name: recorded_inputs(self.reference, graph) for graph in written}
        for name, inputs in examples.items():
            if not inputs:
                raise ConfigError(
                    f"{name}: clock {self.pipe.manifest.operating_point.clock} never runs it, so there is nothing to "
                    f"export it to {self.target.target} with; choose a clock with a cached step, or adaptor identity"
                )
        return examples


@dataclass(frozen=True)
class ComponentJob:
    """What a component beside the UNet is written from.

    Attributes:
        folder: The bundle that is being written.
        component: Its entry in the draft of the manifest.
        part: Its module in torch.
        inputs: Real inputs by name, some rows of them.
        settings: Its configuration, as diffusers or transformers saves it.
        config: The target's section of the recipe.
        traces: A folder of traced graphs that several targets are made of; None where one target is.
        weights: What its weights are stored as; None leaves all as they are.
    """

    folder: Path
    name: str
    component: m.Component
    part: "Part"
    inputs: "Mapping[str, np.ndarray]"
    settings: dict[str, Any]
    config: Any
    say: Say
    traces: Path | None = None
    weights: "StoredWeights | None" = None


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle.

    Attributes:
        targets: Whose graphs it runs, the first of them that a bundle has; none where it runs the source.
        packages: What must be installed, by the names that pip and Python share.
        install: The command that installs it.
        does: What `edgediff doctor` calls it; left out, that is made of the target and the name.
        is_own: Whether the target opens it, by `open_session`, and not the runtime.
        verifies: Whether verification runs the target's graphs in it.
        floor_db: The least PSNR of a step in `edgediff bench`; None takes the floor of the bundle's target.
        provider: Which of ONNX Runtime's execution providers must be available too.
        only_mac: Whether it runs on macOS alone.
        on_cpu: Whether it computes on the CPU, whose peak is measured.
        by_default: Whether it is timed where no backend is named.
        in_browser: Whether a browser runs it: in processes of its own, and never the undivided UNet.
    """

    name: str
    targets: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    does: str = ""
    is_own: bool = False
    verifies: bool = True
    floor_db: float | None = None
    provider: str | None = None
    only_mac: bool = False
    on_cpu: bool = True
    by_default: bool = True
    in_browser: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its packages are installed; not whether it works here."""
        return all(find_spec(package) is not None for package in self.packages) and self.has_provider

    @property
    def has_provider(self) -> bool:
        """Whether the installed ONNX Runtime has the provider that this one asks for."""
        if self.provider is None:
            return True
        import onnxruntime as ort

        return self.provider in ort.get_available_providers()

    def target(self, manifest: m.Manifest) -> str | None:
        """Which of a bundle's targets it runs; None where it runs none of them."""
        there = {target.target for target in manifest.targets}
        return next((name for name in self.targets if name in there), None)


class Target(ABC):
    """One file format.

    Attributes:
        files: What its files are called in messages.
        config: Its section of a recipe.
        packages: What has to be installed to write it, by the names that pip knows, in the versions of the tests.
        backends: What is made to run its graphs. Verification takes them in this order, and one must have measured.
        tools_to_run: The packages whose versions a verification records.
        precisions: Of its components, where nothing is quantized.
        weight_formats: What its weights can be stored in, beside the precision of a component.
        int4_scales: Where int4 has its scales.
        takes_any_size: Whether one graph of it can take latents of any size.
        lends_session: Whether `unrounded` and `findings` need the component's session. Where not, it is let go of
            before: a large model is not in memory twice.
        takes_traces: Whether its graphs are made of torch's ONNX export; several such targets share what is traced.
        accelerators: What the placement lint knows of that runs its graphs, as `edgediff.inspect.placement` names them.
    """

    name: str
    title: str
    files: str
    config: type[msgspec.Struct]
    extra: str = "export"
    packages: ClassVar[Mapping[str, str]]
    backends: tuple[Backend, ...]
    tools_to_run: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ("fp32",)
    weight_formats: tuple[m.WeightFormat, ...] = ()
    int4_scales: "Scales" = "blocks"
    takes_any_size: bool = False
    lends_session: bool = False
    takes_traces: bool = False
    accelerators: tuple[str, ...] = ()

    @property
    def verifiers(self) -> tuple[str, ...]:
        """Names of the backends that verification runs its graphs in."""
        return tuple(backend.name for backend in self.backends if backend.verifies)

    @property
    def own_backends(self) -> tuple[str, ...]:
        """Names of the backends that the runtime does not have."""
        return tuple(backend.name for backend in self.backends if backend.is_own)

    # The recipe

    @abstractmethod
    def check(self, config: Any, layout: Layout) -> None:
        """Checks what types cannot in the target's section of a recipe.

        Raises:
            ConfigError: With the field, its value and what is expected.
        """

    def check_sizes(self, config: Any, sizes: PictureSizes) -> None:
        """Checks that graphs of the format can take the sizes of a recipe; a ConfigError says which they can."""
        if sizes.takes_any and not self.takes_any_size:
            raise ConfigError(
                f"'sizes' has any, and graphs of {self.title} take fixed sizes; name them: --size 512x512 --size "
                f"512x768, or leave target {self.name} out"
            )

    def default_layout(self, config: Any, mask: tuple[bool, ...]) -> Layout:
        """The layout where the recipe names none: the faster one that the clock allows."""
        return "split" if all(mask) else "pair"

    @abstractmethod
    def require(self) -> None:
        """Imports what writing needs.

        Raises:
            MissingExtraError: It is not installed.
        """

    # The manifest

    @abstractmethod
    def describe(self, outline: Outline, config: Any) -> m.Target:
        """The target's entry in the manifest before any file exists."""

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: VerifyConfig, config: Any, sizes: Sizes
    ) -> m.Component | None:
        """A component's entry in the manifest before its file exists; None where the format has the UNet alone.

        Args:
            graph: Its inputs and outputs in fp32, for the usual size, with a symbolic batch; its name is the
                component's.
        """
        return None

    def pipeline_folder(self, entry: Any) -> str | None:
        """Where model_index.json and the tokenizers of a whole pipeline lie; None where the format has none."""
        return None

    def tokenizer_files(self, tokenizer: str) -> Mapping[str, str]:
        """Where files of a tokenizer lie in the target's folder, by their names, where it has no `pipeline_folder`."""
        return {"tokenizer.json": f"{tokenizer}/tokenizer.json"}

    def finish_pipeline(self, folder: Path, say: Say) -> None:  # noqa: B027 - most formats add nothing
        """Adds to the tree of a whole pipeline, tokenizers in it, what the format's own readers want besides."""

    def essence(self, entry: Any) -> m.Target:
        """The entry without what only writing fills in: two exports with equal essences are the same bundle."""
        components = {
            name: msgspec.structs.replace(component, model=None, files=(), tokenizer=None, weights={}, peak_bytes=None)
            for name, component in entry.components.items()
        }
        target: m.Target = msgspec.structs.replace(entry, components=components)
        return target

    def asks_for(self, entry: Any) -> str:
        """What these graphs ask of whatever runs them, where they say: a system, an operator set."""
        return ""

    def run_hint(self, entry: Any) -> str:
        """How to run these graphs, one line for the bundle's README."""
        return f"{self.title}: `edgediff run . -o out.png --backend {self.verifiers[0]}`."

    # Writing and running

    @abstractmethod
    def write(self, job: Job) -> m.Target:
        """Writes every graph of the target.

        Raises:
            UnsupportedError: A converter failed.
            VerificationError: A graph is not what torch computed.
            ConfigError: The clock never runs a graph that has to be traced.
        """

    def write_component(self, job: ComponentJob) -> m.Component:
        """Writes a component that `describe_component` described.

        Raises:
            UnsupportedError: A converter failed.
        """
        raise UnsupportedError(f"{job.name}: {self.title} has no components beside the UNet")

    def usual_backend(self) -> str | None:
        """The backend that runs these graphs on this machine where none is asked for; None where none can."""
        return self.verifiers[0]

    def open_session(self, bundle: "Bundle", backend: str, threads: int | None, component: str = "unet") -> "Session":
        """Opens a component of a bundle in one of `own_backends`."""
        raise RequestError(f"backend {backend!r}: {self.title} brings none; choose a backend of the runtime")

    def half_constants(self, entry: Any) -> HalfConstants:
        """How its fp16 graphs hold numbers."""
        return HalfConstants()

    # Verification and inspection

    def floors_on(self, backend: str, floors: m.Floors) -> m.Floors:
        """What a backend must reach; an accelerator that rounds as it likes may have lower floors."""
        return floors

    def unrounded(
        self, bundle: "Bundle", backend: str, session: "Session | None", component: str = "unet"
    ) -> "contextlib.AbstractContextManager[Session] | None":
        """A session that computes a component's fp16 graphs in fp32 arithmetic; None where the backend cannot.

        Args:
            session: The component's session, lent for as long as the context lasts, if `lends_session`; else None.
        """
        return None

    def findings(
        self, bundle: "Bundle", session: "Session | None", graph: m.Graph, inputs: Mapping[str, np.ndarray]
    ) -> "tuple[Finding, ...]":
        """What fp16 may damage in a graph, from one run of it; `session` as in `unrounded`."""
        return ()

    def operations(self, bundle: "Bundle", graph: m.Graph) -> "list[Op]":
        """The operations of a graph, for the placement lint; empty where there is no accelerator to fall off."""
        return []


def int8_check(target: Target, config: CalibratedConfig) -> None:
    """Checks the int8 settings of a section."""
    if isinstance(config, Int8Config) and config.quantize_attention and config.quantize_nbits is None:
        raise ConfigError(f"'{target.name}.quantize_attention' needs '{target.name}.quantize_nbits'")
    if getattr(config, "dtype", "fp32") == "fp16" and config.quantize_nbits is not None:
        raise ConfigError(
            f"'{target.name}.dtype' is fp16, and '{target.name}.quantize_nbits' asks for a UNet in int8, which is fp32 "
            "between its matmuls; name the components that are to be fp16: dtypes: {vae_decoder: fp16}"
        )
    if config.calibration_images < 1:
        raise ConfigError(f"'{target.name}.calibration_images' is {config.calibration_images}; expected 1 or more")


# What diffusers' pipelines hand to a UNet by themselves.
HANDED_BY_OTHERS = {m.SAMPLE, m.TIMESTEP, m.TEXT, m.GUIDANCE, m.POOLED, "time_ids", "class_labels"}


def others_can_call(graphs: Iterable[m.Graph]) -> bool:
    """Whether a full step takes nothing but what other tools hand to a UNet: no control image, no rows."""
    full = [graph for graph in graphs if graph.runs(full=True)]
    made = {tensor.name for graph in full for tensor in graph.outputs}
    return made | HANDED_BY_OTHERS >= {tensor.name for graph in full for tensor in graph.inputs}


def batch_check(target: Target, batch: int | None) -> None:
    """Checks the fixed batch of a section."""
    if batch is not None and not 1 <= batch <= 2:
        raise ConfigError(f"'{target.name}.batch' is {batch}; expected 1, 2 or nothing")


def fixed(tensors: Iterable[m.Tensor], rows: int) -> tuple[m.Tensor, ...]:
    """Tensors with a number of rows in the place of the symbolic batch."""
    return tuple(
        msgspec.structs.replace(t, shape=tuple(rows if isinstance(size, str) else size for size in t.shape))
        for t in tensors
    )


@contextlib.contextmanager
def converter_errors(what: str) -> Iterator[None]:
    """Turns what a converter raises into an UnsupportedError; a full disk stays what it is."""
    try:
        yield
    except (OSError, UnsupportedError, MissingExtraError):
        raise
    except Exception as e:  # converters' errors share no base class
        raise UnsupportedError(f"{what} failed: {one_line(e)}") from e
