"""The manifest: what is in a bundle, so that a runtime hard-codes nothing.

A runtime reads the list of graphs and follows it: in each step it runs, in order, the graphs whose frequency says so,
taking inputs from and putting outputs into a table of tensors by name. The JSON Schema beside this package is
generated from these structs.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from edgediff_runtime.errors import BundleError
from edgediff_runtime.schedulers import SchedulerConfig

Frequency = Literal["step", "full_step", "cached_step", "generation"]
# Tensors that the loop itself looks at: what a step leaves, and what the next takes.
LOWRES_FEATURE = "lowres_feature"
CACHE = "cache"
# What a step is handed; and how many rows a sample has that is handed over once for each image.
SAMPLE = "sample"
TIMESTEP = "timestep"
IMAGES = "images"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all parts of the manifest share: immutable and strict."""


class Tensor(Struct, frozen=True):
    """A tensor that goes into or comes out of a graph.

    Attributes:
        name: Name in the graph and in the table of tensors.
        dtype: numpy's name of the element type.
        shape: Sizes; ``"batch"`` stands for the number of rows, ``"images"``, of a sample alone, for the number of
            images or that of rows, whichever is given.
    """

    name: str
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: tuple[int | Literal["batch", "images"], ...]


class Graph(Struct, frozen=True):
    """One graph and when it runs.

    Attributes:
        name: ``highres_in``, ``lowres``, ``adaptor``, ``highres_out``; ``full`` and ``cached`` in the ``pair`` layout.
        file: Path in the bundle, an ``.mlpackage`` being a directory; None where there is nothing to run (the identity
            adaptor).
        frequency: ``step``, ``full_step``, ``cached_step`` or ``generation``.
        inputs: In the graph's order.
        outputs: In the graph's order.
        external_data: Path in the bundle of the weights that lie outside of `file`, or None.
        function: Which function of the file, where it holds several; None where it holds one.
        simplified: Whether onnxsim's result was taken, or why it was left out.
    """

    name: str
    file: str | None
    frequency: Frequency
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external_data: str | None = None
    function: str | None = None
    simplified: str = ""

    def runs(self, full: bool) -> bool:
        """Whether the graph belongs to a full or a cached step.

        Args:
            full: Of which of the two.

        Returns:
            False also for graphs that run once in a generation.
        """
        return self.frequency in ("step", "full_step" if full else "cached_step")

    @property
    def takes_sample(self) -> bool:
        """Whether it is handed the sample."""
        return any(tensor.name == SAMPLE for tensor in self.inputs)

    @property
    def can_count_rows(self) -> bool:
        """Whether it is handed something that has all rows, whatever its sample has."""
        return any(tensor.name not in (SAMPLE, TIMESTEP) for tensor in self.inputs)

    @property
    def shares_rows(self) -> bool:
        """Whether it takes a sample once for each image, and repeats what it makes of it for all rows."""
        return any(tensor.name == SAMPLE and tensor.shape[:1] == (IMAGES,) for tensor in self.inputs)

    def with_shared_rows(self) -> "Graph":
        """The entry of the same graph where it takes a sample once for each image."""
        inputs = tuple(
            msgspec.structs.replace(tensor, shape=(IMAGES, *tensor.shape[1:])) if tensor.name == SAMPLE else tensor
            for tensor in self.inputs
        )
        return msgspec.structs.replace(self, inputs=inputs)


class Floors(Struct, frozen=True):
    """PSNR in dB that verification asks for; None is not judged.

    Attributes:
        graph: Of each graph against the same module in torch.
        composed: Of a composed step against torch.
        trajectory: Of the final latents against torch with the same clock.
        caching: Of clock N against clock 1 in the same backend.
        program: Of a graph in fp32 arithmetic against torch with weights of the graph's precision; None where the
            graph computes in fp32 anyway.
    """

    graph: float
    composed: float
    trajectory: float
    caching: float | None
    program: float | None = None


class SessionSettings(Struct, frozen=True):
    """How ONNX Runtime is set where these graphs are fastest and take the least memory, as it was measured.

    Attributes:
        memory_arena: Memory of tensors that are done with is kept for those to come.
        memory_pattern: Memory is laid out by the shapes of earlier runs.
        stop_spinning: Threads stop waiting awake when a run ends. Each graph has threads of its own: the next graph
            would run against them.
        exact_int8: Where kernels of eight bits add pairs of products in 16 bits, as on x64 without VNNI, slower ones
            that do not overflow. Elsewhere a runtime leaves them out, and graphs of fp32 have no use for them.
    """

    memory_arena: bool = True
    memory_pattern: bool = True
    stop_spinning: bool = True
    exact_int8: bool = True


class Target(Struct, frozen=True):
    """The graphs for one kind of backend.

    Attributes:
        target: The file format: ONNX, Core ML's ML Program, an ExecuTorch program, or OpenVINO's IR.
        layout: How the graphs are packed: ``split``, the four parts; or ``pair``, a whole full and a whole cached step.
        dtype: Precision of weights and features. In ``int8`` it is that of weights and products: what goes into a graph
            and what crosses between graphs is float32.
        batch: Rows that each graph takes, or None where the batch is symbolic.
        floors: What verification asks of these graphs.
        graphs: In the order in which a step runs them.
        opset: ONNX operator set; None for others.
        ir_version: ONNX file version; None for others.
        session: How ONNX Runtime is best set; None for others.
        deployment_target: Oldest system that runs Core ML's graphs, such as ``iOS18``; None for others.
        specification_version: Of Core ML's model format; None for others.
    """

    target: Literal["onnx", "coreml", "executorch", "openvino"]
    layout: Literal["split", "pair"]
    dtype: Literal["fp32", "fp16", "int8"]
    batch: int | None
    floors: Floors
    graphs: tuple[Graph, ...]
    opset: int | None = None
    ir_version: int | None = None
    session: SessionSettings | None = None
    deployment_target: str | None = None
    specification_version: int | None = None

    @property
    def settings(self) -> SessionSettings:
        """How ONNX Runtime is to be set: as the target says, or by the defaults."""
        return SessionSettings() if self.session is None else self.session


class Source(Struct, frozen=True):
    """Where the model came from.

    Attributes:
        name: Built-in name or directory name.
        path: The directory as it was given; None for built-in models.
        sha256: Hash over configuration, weights and scheduler.
        random_weights: Seed, where the weights are random and the model is a geometry only.
    """

    name: str
    path: str | None
    sha256: str
    random_weights: int | None = None


class Cut(Struct, frozen=True):
    """Where the UNet is divided: `level` high-resolution levels stay outside, `point` says where lowres ends."""

    level: int
    point: str


class Sample(Struct, frozen=True):
    """What the UNet denoises.

    Attributes:
        channels: Channels of a sample.
        height: Rows of a sample.
        width: Columns of a sample.
        space: ``pixel`` where a sample is an image in [-1, 1], ``latent`` where a decoder comes after it.
    """

    channels: int
    height: int
    width: int
    space: Literal["pixel", "latent"]


class Conditioning(Struct, frozen=True):
    """What the UNet is conditioned on.

    Attributes:
        kind: ``none``, ``class`` or ``text``.
        labels: Names of the classes, in the order of their indices.
        null_label: Index of the class that means 'no class' in guidance, or None.
        source: Where the evidence's conditioning came from: ``labels``, ``file``, ``synthetic`` or ``none``.
        sha256: Hash of that file, or None.
    """

    kind: Literal["none", "class", "text"]
    labels: tuple[str, ...] = ()
    null_label: int | None = None
    source: Literal["none", "labels", "file", "synthetic"] = "none"
    sha256: str | None = None


class OperatingPoint(Struct, frozen=True):
    """What the bundle was made and verified for; the defaults of a generation.

    Attributes:
        num_inference_steps: Denoising steps.
        clock: Period or mask, as it was given.
        mask: The clock's entry for each step, 1 = full.
        guidance_scale: Classifier-free guidance; 1 is off.
        seed: Seed of the evidence's trajectory.
        num_images: Images in the evidence's trajectory.
    """

    num_inference_steps: int
    clock: int | str
    mask: tuple[int, ...]
    guidance_scale: float
    seed: int
    num_images: int


class TrainedFor(Struct, frozen=True):
    """The operating point that an adaptor was trained for.

    Attributes:
        num_inference_steps: Denoising steps.
        scheduler: The sampler, as a recipe names it.
        clock: Period or mask, as it was given.
        mask: The clock's entry for each step, 1 = full.
        guidance_scale: Classifier-free guidance; 1 is off.
    """

    num_inference_steps: int
    scheduler: str
    clock: int | str
    mask: tuple[int, ...]
    guidance_scale: float


class Adaptor(Struct, frozen=True):
    """What stands in for lowres on cached steps.

    Attributes:
        kind: ``identity``, ``resnet``, ``unet`` or ``unet-light``.
        name: Its folder's name; None for the identity.
        path: That folder as it was given; None for the identity and for built-in adaptors.
        sha256: Hash of its weights; None for the identity.
        trained_for: The operating point of its training; None for the identity.
    """

    kind: str
    name: str | None = None
    path: str | None = None
    sha256: str | None = None
    trained_for: TrainedFor | None = None


class Cost(Struct, frozen=True):
    """What a part costs for one sample, counted.

    Attributes:
        parameters: Number of weights.
        macs: Multiply-adds in convolutions and linear layers.
        macs_attention: Multiply-adds in attention matmuls, which both papers leave out.
    """

    parameters: int
    macs: int
    macs_attention: int


class File(Struct, frozen=True):
    """Size in bytes and hash of a file in the bundle."""

    size: int
    sha256: str


def share_rows(graphs: Iterable[Graph]) -> bool:
    """Whether graphs are to be handed a sample once for each image: all that take one can repeat it.

    Args:
        graphs: Those of a step, or of a target.

    Returns:
        False where none takes a sample.
    """
    taking = [graph.shares_rows for graph in graphs if graph.takes_sample]
    return bool(taking) and all(taking)


class Manifest(Struct, frozen=True):
    """Everything that a runtime needs to know about a bundle.

    Attributes:
        format_version: Version of this format.
        generator: Name and version of what wrote the bundle.
        source: Where the model came from.
        license: Licence of the model, or ``unknown``.
        cut: Where the UNet is divided.
        adaptor: What stands in for lowres on cached steps.
        sample: What the UNet denoises.
        conditioning: What it is conditioned on.
        scheduler: The sampler, completely.
        operating_point: Defaults of a generation, and what was verified.
        verified: How far the export was verified: ``full`` or ``graphs`` (no trajectory).
        cost: Cost of each part, of a ``full`` and of a ``cached`` step.
        cache_bytes: Bytes of the cache for one sample in fp32.
        targets: The graphs.
        config: The recipe that the bundle was made by, as plain data.
        versions: Version of every tool that had a part in it.
        files: Every other file of the bundle but SHA256SUMS and evidence/parity.json.
    """

    format_version: int
    generator: str
    source: Source
    license: str
    cut: Cut
    adaptor: Adaptor
    sample: Sample
    conditioning: Conditioning
    scheduler: SchedulerConfig
    operating_point: OperatingPoint
    verified: Literal["full", "graphs"]
    cost: dict[str, Cost]
    cache_bytes: int
    targets: tuple[Target, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, File]

    def target(self, *names: str) -> Target:
        """Finds the graphs of a target.

        Args:
            names: ``onnx``, ``coreml``, ``executorch`` or ``openvino``; of several, the first that is there is taken.

        Returns:
            The target.

        Raises:
            BundleError: The bundle has none of these names.
        """
        for name in names:
            for target in self.targets:
                if target.target == name:
                    return target
        there = ", ".join(target.target for target in self.targets)
        raise BundleError(f"the bundle has no {' or '.join(map(repr, names))} target; it has: {there}")
