"""manifest.json: read strictly, held to what types cannot say, and written the same for the same content."""

from typing import Any

import msgspec

from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import (
    CACHE,
    IMAGES,
    LOWRES_FEATURE,
    SAMPLE,
    TIMESTEP,
    Adaptor,
    Graph,
    Manifest,
    OperatingPoint,
    Target,
    TrainedFor,
)

FORMAT_VERSION = 1

MAX_GUIDANCE = 3.4028234663852886e38  # float32's largest
ADAPTORS = ("identity", "resnet", "unet", "unet-light")
# Of Core ML's model format, by the oldest system that reads it.
SPECIFICATION_OF = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
# What a step has before any graph has run, besides sample and timestep.
CONDITIONING_INPUTS = {
    "none": (),
    "class": ("class_labels",),
    "text": ("encoder_hidden_states", "text_embeds", "time_ids", "class_labels"),
}


def check_manifest(manifest: Manifest) -> None:
    """Holds what types cannot: ranges, and fields that must fit each other.

    Args:
        manifest: Any manifest.

    Raises:
        BundleError: With the field, its value and what was expected.
        RequestError: The clock is none.
    """
    sample, point, known = manifest.sample, manifest.operating_point, manifest.conditioning
    _check_clock("operating_point", point)
    _check_adaptor(manifest.adaptor)
    _hold(0 < point.guidance_scale <= MAX_GUIDANCE, "guidance_scale", point.guidance_scale, "a number above 0")
    _hold(0 <= point.seed < 2**64, "operating_point.seed", point.seed, "0 to 2^64 - 1")
    for name, number in (
        ("num_images", point.num_images), ("channels", sample.channels), ("height", sample.height),
        ("width", sample.width), ("cut.level", manifest.cut.level), ("cache_bytes", manifest.cache_bytes),
    ):  # fmt: skip
        _hold(number > 0, name, number, "a whole number above 0")
    _hold((known.kind == "class") <= bool(known.labels), "labels", known.labels, "the names of the classes")
    _hold(known.null_label is None or 0 <= known.null_label <= len(known.labels), "null_label", known.null_label,
          f"0 to {len(known.labels)}")  # fmt: skip
    for name, file in manifest.files.items():
        _hold(file.size >= 0, f"size of {name}", file.size, "0 or more")
        _check_hash(f"sha256 of {name}", file.sha256)
    kinds = [target.target for target in manifest.targets]
    _hold(0 < len(set(kinds)) == len(kinds), "targets", kinds, "one of a kind, one at least")
    for target in manifest.targets:
        _check_target(target, manifest)


def _check_clock(where: str, point: OperatingPoint | TrainedFor) -> None:
    mask = tuple(map(int, clock_mask(point.clock, point.num_inference_steps)))
    _hold(
        point.mask == mask,
        f"{where}.mask",
        point.mask,
        f"clock {point.clock} over {point.num_inference_steps} steps: {mask}",
    )


def _check_adaptor(adaptor: Adaptor) -> None:
    """The identity is described by its kind alone; a learned adaptor by its name, its hash and its training."""
    _hold(adaptor.kind in ADAPTORS, "adaptor.kind", adaptor.kind, f"one of {', '.join(ADAPTORS)}")
    learned = adaptor.kind != "identity"
    for name in ("name", "sha256", "trained_for"):
        value = getattr(adaptor, name)
        _hold((value is not None) == learned, f"adaptor.{name}", value, "a value for a learned one, null for identity")
    _hold(learned or adaptor.path is None, "adaptor.path", adaptor.path, "null for identity")
    if adaptor.sha256 is not None:
        _check_hash("adaptor.sha256", adaptor.sha256)
    if adaptor.trained_for is not None:
        _check_clock("adaptor.trained_for", adaptor.trained_for)
        scale = adaptor.trained_for.guidance_scale
        _hold(0 < scale <= MAX_GUIDANCE, "adaptor.trained_for.guidance_scale", scale, "a number above 0")


def _check_hash(name: str, given: str) -> None:
    _hold(len(given) == 64 and set(given) <= set("0123456789abcdef"), name, given, "64 hexadecimal digits")


def _check_target(target: Target, manifest: Manifest) -> None:
    sample = manifest.sample
    for name, floor in msgspec.structs.asdict(target.floors).items():
        _hold(floor is None or floor > 0, f"floors.{name}", floor, "dB above 0")
    _hold(target.batch is None or target.batch > 0, "batch", target.batch, "null or a whole number above 0")
    for name, kind in (
        ("opset", "onnx"), ("ir_version", "onnx"), ("deployment_target", "coreml"), ("specification_version", "coreml"),
    ):  # fmt: skip
        value = getattr(target, name)
        _hold((value is not None) == (target.target == kind), name, value, f"a value for {kind}, null for others")
    if target.target == "coreml":
        version = SPECIFICATION_OF.get(str(target.deployment_target))
        _hold(version is not None, "deployment_target", target.deployment_target, ", ".join(SPECIFICATION_OF))
        _hold(target.specification_version in (version, 0), "specification_version", target.specification_version,
              f"{version}, that of {target.deployment_target}")  # fmt: skip
    half = target.dtype == "fp16"
    _hold(not half or target.target == "coreml", "dtype", target.dtype, "fp16 for Core ML alone")
    _hold(target.dtype != "int8" or target.target in ("onnx", "openvino"), "dtype", target.dtype,
          "int8 for ONNX and OpenVINO alone")  # fmt: skip
    _hold((target.floors.program is not None) == half, "floors.program", target.floors.program, "dB for fp16 alone")
    for graph in target.graphs:
        if graph.name == "adaptor":
            without = manifest.adaptor.kind == "identity"
            _hold((graph.file is None) == without, "file of adaptor", graph.file, "null for the identity alone")
    tensors = [t for graph in target.graphs for t in (*graph.inputs, *graph.outputs)]
    _hold(half or all(t.dtype != "float16" for t in tensors), "dtype", target.dtype, "fp16 for float16 tensors")
    names = [graph.name for graph in target.graphs]
    _hold(len(set(names)) == len(names), "graphs", names, "distinct names")
    parts = {*names, "full", "cached"}
    _hold(parts <= manifest.cost.keys(), "cost", sorted(manifest.cost), f"an entry for {', '.join(sorted(parts))}")
    for full in (True, False):
        _check_wiring(target.graphs, manifest.conditioning.kind, full)
    rows: int | str = "batch" if target.batch is None else target.batch
    image = (sample.channels, sample.height, sample.width)
    for tensor in tensors:
        if tensor.name == TIMESTEP:
            _hold(tensor.shape == (1,), "shape of timestep", tensor.shape, "(1,)")
            continue
        shares = tensor.name == SAMPLE and tensor.shape[:1] == (IMAGES,)
        _hold(shares or tensor.shape[:1] == (rows,), f"shape of {tensor.name}", tensor.shape, f"{rows} first")
        _hold(tensor.name not in (SAMPLE, "out_sample") or tensor.shape[1:] == image, f"shape of {tensor.name}",
              tensor.shape, f"{(rows, *image)}")  # fmt: skip
    for graph in target.graphs:
        can = target.target in ("onnx", "openvino") and target.batch is None
        can = can and graph.can_count_rows and all(tensor.name != SAMPLE for tensor in graph.outputs)
        _hold(can or not graph.shares_rows, f"shape of {SAMPLE} in {graph.name}", IMAGES,
              f"{rows}: rows are shared by graphs of ONNX and OpenVINO alone, of a symbolic batch, that take something "
              "else with all rows")  # fmt: skip


def _check_wiring(graphs: tuple[Graph, ...], kind: str, full: bool) -> None:
    """Follows the tensors through one step: each is there when a graph wants it."""
    early = set(CONDITIONING_INPUTS[kind])
    there = {"sample", "timestep", *early} | (set() if full else {CACHE, LOWRES_FEATURE})
    for graph in graphs:
        names = {tensor.name for tensor in graph.outputs}
        # Where nothing runs, the cache stays under the name that the last step left it under.
        stays = {LOWRES_FEATURE if tensor.name == CACHE else tensor.name for tensor in graph.inputs}
        _hold(graph.file is not None or names <= stays, f"file of {graph.name}", graph.file,
              "a file: what it makes does not come in")  # fmt: skip
        for tensor in (*graph.inputs, *graph.outputs):
            # What the first size may be is the target's to say.
            sizes = [n for i, n in enumerate(tensor.shape) if i or isinstance(n, int)]
            _hold(all(isinstance(n, int) and n > 0 for n in sizes), f"shape of {tensor.name}", tensor.shape, "sizes")
        if graph.frequency == "generation":
            # It runs before the first step, when there is no sample yet.
            missing = [tensor.name for tensor in graph.inputs if tensor.name not in early]
            _hold(not missing, f"inputs of {graph.name}", missing, "tensors that a generation begins with")
            early |= names
            there |= names
        elif graph.runs(full):
            missing = [tensor.name for tensor in graph.inputs if tensor.name not in there]
            _hold(not missing, f"inputs of {graph.name}", missing, "tensors that a step has by then")
            there |= names
    _hold({"out_sample", LOWRES_FEATURE} <= there, "outputs of a step", sorted(there), "out_sample, lowres_feature")


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
