"""The manifest: what is in a bundle, so that a runtime hard-codes nothing.

A runtime reads the list of graphs and follows it: in each step it runs, in order, the graphs whose frequency says so,
taking inputs from and putting outputs into a table of tensors by name. The JSON Schema beside this package is
generated from these structs.
"""

from typing import Any, Literal

import msgspec

from edgediff_runtime.errors import BundleError
from edgediff_runtime.schedulers import SchedulerConfig

FORMAT_VERSION = 1

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
    """

    name: str
    file: str | None
    frequency: Frequency
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external_data: str | None = None


class Target(Struct, frozen=True):
    """The graphs for one kind of backend.

    Attributes:
        target: The file format.
        layout: How the graphs are packed.
        dtype: Precision of weights and features.
        batch: Rows that each graph takes, or None where the batch is symbolic.
        opset: ONNX operator set.
        ir_version: ONNX file version.
        simplified: Whether onnxsim's result was taken, or why it was left out.
        graphs: In the order in which a step runs them.
    """

    target: Literal["onnx"]
    layout: Literal["split"]
    dtype: Literal["fp32"]
    batch: int | None
    opset: int
    ir_version: int
    simplified: str
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
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
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
