"""The manifest: what is in a bundle, so that a runtime hard-codes nothing.

A runtime reads the list of graphs and follows it: in each step it runs, in order, the graphs whose frequency says so,
taking inputs from and putting outputs into a table of tensors by name. The JSON Schema beside this package is
generated from these structs.
"""

from typing import Any, Literal

import msgspec

from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.schedulers import SchedulerConfig

FORMAT_VERSION = 1

MAX_GUIDANCE = 3.4028234663852886e38  # float32's largest
# What a step has before any graph has run, besides sample and timestep.
CONDITIONING_INPUTS = {
    "none": (),
    "class": ("class_labels",),
    "text": ("encoder_hidden_states", "text_embeds", "time_ids", "class_labels"),
}

Frequency = Literal["step", "full_step", "cached_step", "generation"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all parts of the manifest share: immutable and strict."""


class Tensor(Struct, frozen=True):
    """A tensor that goes into or comes out of a graph.

    Attributes:
        name: Name in the graph and in the table of tensors.
        dtype: numpy's name of the element type.
        shape: Sizes; ``"batch"`` stands for the number of rows.
    """

    name: str
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: tuple[int | Literal["batch"], ...]


class Graph(Struct, frozen=True):
    """One graph and when it runs.

    Attributes:
        name: ``highres_in``, ``lowres``, ``adaptor``, ``highres_out``, or what another layout packs.
        file: Path in the bundle; None where there is nothing to run (the identity adaptor).
        frequency: ``step``, ``full_step``, ``cached_step`` or ``generation``.
        inputs: In the graph's order.
        outputs: In the graph's order.
        external_data: Path in the bundle of the weights that lie outside of `file`, or None.
        simplified: Whether onnxsim's result was taken, or why it was left out.
    """

    name: str
    file: str | None
    frequency: Frequency
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external_data: str | None = None
    simplified: str = ""

    def runs(self, full: bool) -> bool:
        """Whether the graph belongs to a full or a cached step.

        Args:
            full: Of which of the two.

        Returns:
            False also for graphs that run once in a generation.
        """
        return self.frequency in ("step", "full_step" if full else "cached_step")


class Target(Struct, frozen=True):
    """The graphs for one kind of backend.

    Attributes:
        target: The file format.
        layout: How the graphs are packed.
        dtype: Precision of weights and features.
        batch: Rows that each graph takes, or None where the batch is symbolic.
        opset: ONNX operator set.
        ir_version: ONNX file version.
        graphs: In the order in which a step runs them.
    """

    target: Literal["onnx"]
    layout: Literal["split"]
    dtype: Literal["fp32"]
    batch: int | None
    opset: int
    ir_version: int
    graphs: tuple[Graph, ...]


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
        mask: The clock spelt out, 1 = full.
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


class Floors(Struct, frozen=True):
    """PSNR in dB that verification asks for; None is not judged."""

    graph: float
    composed: float
    trajectory: float
    caching: float | None


class File(Struct, frozen=True):
    """Size in bytes and hash of a file in the bundle."""

    size: int
    sha256: str


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
        floors: What verification asks for.
        cost: Cost of each part, of a ``full`` and of a ``cached`` step.
        cache_bytes: Bytes of the cache for one sample.
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
    adaptor: str
    sample: Sample
    conditioning: Conditioning
    scheduler: SchedulerConfig
    operating_point: OperatingPoint
    verified: Literal["full", "graphs"]
    floors: Floors
    cost: dict[str, Cost]
    cache_bytes: int
    targets: tuple[Target, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, File]

    def target(self, name: str) -> Target:
        """Finds the graphs of a target.

        Args:
            name: ``onnx``.

        Returns:
            The target.

        Raises:
            BundleError: The bundle has none of that name.
        """
        for target in self.targets:
            if target.target == name:
                return target
        there = ", ".join(target.target for target in self.targets)
        raise BundleError(f"the bundle has no {name!r} target; it has: {there}")


def check_manifest(manifest: Manifest) -> None:
    """Holds what types cannot: ranges, and fields that must fit each other.

    Args:
        manifest: Any manifest.

    Raises:
        BundleError: With the field, its value and what was expected.
        RequestError: The clock is none.
    """
    sample, point, known = manifest.sample, manifest.operating_point, manifest.conditioning
    mask = clock_mask(point.clock, point.num_inference_steps)
    _hold(point.mask == tuple(map(int, mask)), "operating_point.mask", point.mask, f"clock {point.clock} spelt out")
    _hold(0 < point.guidance_scale <= MAX_GUIDANCE, "guidance_scale", point.guidance_scale, "a number above 0")
    _hold(0 <= point.seed < 2**64, "operating_point.seed", point.seed, "0 to 2^64 - 1")
    for name, number in (
        ("num_images", point.num_images), ("channels", sample.channels), ("height", sample.height),
        ("width", sample.width), ("cut.level", manifest.cut.level), ("cache_bytes", manifest.cache_bytes),
    ):  # fmt: skip
        _hold(number > 0, name, number, "a whole number above 0")
    for name in ("graph", "composed", "trajectory", "caching"):
        floor = getattr(manifest.floors, name)
        _hold(floor is None or floor > 0, f"floors.{name}", floor, "dB above 0")
    _hold((known.kind == "class") <= bool(known.labels), "labels", known.labels, "the names of the classes")
    _hold(known.null_label is None or 0 <= known.null_label <= len(known.labels), "null_label", known.null_label,
          f"0 to {len(known.labels)}")  # fmt: skip
    for name, file in manifest.files.items():
        _hold(file.size >= 0, f"size of {name}", file.size, "0 or more")
        _hold(len(file.sha256) == 64 and set(file.sha256) <= set("0123456789abcdef"), f"sha256 of {name}", file.sha256,
              "64 hexadecimal digits")  # fmt: skip
    for target in manifest.targets:
        _hold(target.batch is None or target.batch > 0, "batch", target.batch, "null or a whole number above 0")
        names = [graph.name for graph in target.graphs]
        _hold(len(set(names)) == len(names), "graphs", names, "distinct names")
        parts = {*names, "full", "cached"}
        _hold(parts <= manifest.cost.keys(), "cost", sorted(manifest.cost), f"an entry for {', '.join(sorted(parts))}")
        for full in (True, False):
            _check_wiring(target.graphs, known.kind, full)
        for tensor in (t for graph in target.graphs for t in (*graph.inputs, *graph.outputs)):
            shape = ("batch", sample.channels, sample.height, sample.width)
            _hold(tensor.name not in ("sample", "out_sample") or tensor.shape == shape, f"shape of {tensor.name}",
                  tensor.shape, f"{shape}")  # fmt: skip


def _check_wiring(graphs: tuple[Graph, ...], kind: str, full: bool) -> None:
    """Follows the tensors through one step: each is there when a graph wants it."""
    there = {"sample", "timestep", *CONDITIONING_INPUTS[kind]} | (set() if full else {"lowres_feature"})
    for graph in graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            _hold(all(n == "batch" or n > 0 for n in tensor.shape), f"shape of {tensor.name}", tensor.shape, "sizes")
        if graph.frequency == "generation" or graph.runs(full):
            missing = [tensor.name for tensor in graph.inputs if tensor.name not in there]
            _hold(not missing, f"inputs of {graph.name}", missing, "tensors that a step has by then")
            there.update(tensor.name for tensor in graph.outputs)
    _hold({"out_sample", "lowres_feature"} <= there, "outputs of a step", sorted(there), "out_sample, lowres_feature")


def _hold(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise BundleError(f"manifest.json: {name} is {given!r}; expected {expected}")


class _Version(msgspec.Struct):
    format_version: int


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest strictly.

    Args:
        data: The bytes of manifest.json.

    Returns:
        The manifest.

    Raises:
        BundleError: It is not JSON, of a newer version, or does not hold what the format asks for.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise BundleError(
                f"manifest.json is of format version {version}, this runtime reads up to {FORMAT_VERSION}; "
                "install a newer edgediff"
            )
        if version < 1:
            raise BundleError(f"manifest.json is of format version {version}; expected 1 to {FORMAT_VERSION}")
        manifest = msgspec.json.decode(data, type=Manifest)
        check_manifest(manifest)
        return manifest
    except (msgspec.DecodeError, UnicodeDecodeError, RequestError) as e:
        raise BundleError(f"manifest.json is not a manifest: {e}") from e


def render_manifest(manifest: Manifest) -> bytes:
    """Writes a manifest, the same bytes for the same content.

    Args:
        manifest: The manifest.

    Returns:
        Indented UTF-8 JSON with sorted mappings and a newline at its end.
    """
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def manifest_schema() -> dict[str, Any]:
    """Generates the JSON Schema of the manifest.

    Returns:
        The schema as plain data; runtime/manifest.schema.json holds it.
    """
    schema = msgspec.json.schema(Manifest)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgediff bundle manifest",
        **schema,
    }
