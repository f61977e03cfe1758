"""manifest.json: read strictly, checked for what types cannot say, and written the same for the same content."""

from functools import reduce
from operator import or_
from typing import Any

import msgspec

from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import (
    CACHE,
    CONTROL_IMAGE,
    CONTROLNET,
    IMAGES,
    LOWRES_FEATURE,
    POOLED,
    SAMPLE,
    T2I_ADAPTER,
    TARGETS,
    TEXT,
    TIMESTEP,
    TOKENS,
    Adaptor,
    Component,
    Conditioning,
    Graph,
    LoraInputs,
    Manifest,
    Prompt,
    Sample,
    Target,
    Tensor,
    TrainedFor,
    Vae,
    has_rows,
)

FORMAT_VERSION = 2

MAX_GUIDANCE = 3.4028234663852886e38  # float32's largest
MAX_SEED = 2**64 - 1
# A height that every part of it divides: where a symbol alone is looked at.
UNIT = 2**20
ADAPTORS = ("identity", "resnet", "unet", "unet-light")
STAGE_OF = {
    "text_encoder": "prompt", "text_encoder_2": "prompt", "unet": "step",
    "vae_decoder": "decode", "vae_encoder": "image", "preview_decoder": "preview", T2I_ADAPTER: "image",
}  # fmt: skip


def check_manifest(manifest: Manifest) -> None:
    """Checks what types cannot: ranges, and fields that must fit each other.

    Raises:
        BundleError: With the field, its value and what was expected; of a clock, a RequestError.
    """
    sample, point, known = manifest.sample, manifest.operating_point, manifest.conditioning
    _check_point("operating_point", point)
    _check_adaptor(manifest.adaptor)
    _check_seed("operating_point.seed", point.seed)
    if manifest.source.random_weights is not None:
        _check_seed("source.random_weights", manifest.source.random_weights)
    for name, number in (
        ("num_images", point.num_images), ("channels", sample.channels), ("height", sample.height),
        ("width", sample.width), ("multiple", sample.multiple), ("cut.level", manifest.cut.level),
        ("cache_bytes", manifest.cache_bytes),
    ):  # fmt: skip
        _must(number > 0, name, number, "a whole number above 0")
    for size in ((sample.height, sample.width), *manifest.evidence.sizes):
        _must(all(side > 0 and side % sample.multiple == 0 for side in size), "size of a latent", size,
              f"multiples of {sample.multiple}")  # fmt: skip
    _must(sample.in_channels >= sample.channels, "in_channels", sample.in_channels, f"{sample.channels} or more")
    beside = sum(map(sample.channels_of, sample.concat))
    _must(not sample.concat or sample.in_channels == sample.channels + beside, "in_channels", sample.in_channels,
          f"{sample.channels + beside}, with {', '.join(sample.concat)}")  # fmt: skip
    _must(len(set(sample.concat)) == len(sample.concat), "sample.concat", sample.concat, "each once")
    _must(("mask" in sample.concat) == ("masked_image" in sample.concat), "sample.concat", sample.concat,
          "a mask with a masked image")  # fmt: skip
    _must((known.kind == "class") <= bool(known.labels), "labels", known.labels, "the names of the classes")
    _must((known.kind != "none") == bool(known.tensors), "conditioning.tensors", [t.name for t in known.tensors],
          "tensors where there is a condition, none where there is not")  # fmt: skip
    for tensor in known.tensors:
        _must(bool(tensor.shape), f"shape of {tensor.name}", tensor.shape, "rows first")
        _check_sizes(tensor)
    _must(known.null_label is None or 0 <= known.null_label <= len(known.labels), "null_label", known.null_label,
          f"0 to {len(known.labels)}")  # fmt: skip
    if manifest.prompt is not None:
        _check_prompt(manifest.prompt, known)
    for name, vae in (("vae", manifest.vae), ("preview", manifest.preview)):
        if vae is not None:
            _check_vae(name, vae, sample)
    if manifest.lora is not None:
        _check_lora(manifest.lora)
    for name, file in manifest.files.items():
        _must(file.size >= 0, f"size of {name}", file.size, "0 or more")
        _check_hash(f"sha256 of {name}", file.sha256)
    kinds = [target.target for target in manifest.targets]
    _must(0 < len(set(kinds)) == len(kinds), "targets", kinds, "one of a kind, one at least that this runtime knows")
    for target in manifest.targets:
        _check_target(target, manifest)


def _check_prompt(prompt: Prompt, known: Conditioning) -> None:
    _must(known.kind == "text", "prompt", prompt, f"null where the condition is {known.kind}")
    names = [encoder.component for encoder in prompt.encoders]
    expected = "text encoders, each once"
    _must(0 < len(set(names)) == len(names), "prompt.encoders", names, expected)
    for encoder in prompt.encoders:
        where = encoder.component
        _must(STAGE_OF.get(where) == "prompt", "prompt.encoders", names, expected)
        _must(encoder.max_length > 2, f"max_length of {where}", encoder.max_length, "3 or more")
        for name in ("bos", "eos", "pad"):
            _must(getattr(encoder, name) >= 0, f"{name} of {where}", getattr(encoder, name), "a token id from 0")
        _must(0 < len(set(encoder.hidden)) == len(encoder.hidden), f"hidden of {where}", encoder.hidden,
              "names of outputs, each once")  # fmt: skip
        starts = {ids[0] for ids in encoder.expansions if len(ids) > 1 and min(ids) >= 0}
        _must(len(starts) == len(encoder.expansions), f"expansions of {where}", encoder.expansions,
              "two token ids from 0 or more in each, and no two with the same first")  # fmt: skip
    lengths = {encoder.max_length for encoder in prompt.encoders}
    _must(len(lengths) == 1, "max_length", sorted(lengths), "the same for all text encoders")
    pooled = [encoder.component for encoder in prompt.encoders if encoder.pooled is not None]
    wanted = any(tensor.name == POOLED for tensor in known.tensors)
    _must(len(pooled) == wanted, "pooled", pooled, f"one text encoder where the UNet takes {POOLED}, else none")


def _check_vae(where: str, vae: Vae, sample: Sample) -> None:
    _must(sample.space == "latent", where, vae, f"null where the space is {sample.space}")
    scale = vae.scaling_factor
    _must(0 < scale <= MAX_GUIDANCE, f"{where}.scaling_factor", scale, "a number above 0")
    _must(vae.downscale > 0, f"{where}.downscale", vae.downscale, "a whole number above 0")
    _must((vae.mean is None) == (vae.std is None), f"{where}.std", vae.std, "a value where there is a mean, else null")
    for name, values in (("mean", vae.mean), ("std", vae.std)):
        if values is not None:
            _must(len(values) == sample.channels, f"{where}.{name}", values, f"a number for each of {sample.channels}")
            _must(all(abs(value) <= MAX_GUIDANCE for value in values), f"{where}.{name}", values, "finite numbers")
    _must(vae.std is None or min(vae.std) > 0, f"{where}.std", vae.std, "numbers above 0")


def _check_lora(lora: LoraInputs) -> None:
    _must(lora.rank > 0, "lora.rank", lora.rank, "a whole number above 0")
    layers = [layer for each in lora.layers.values() for layer in each]
    names = [layer.name for layer in layers]
    _must(all(lora.layers.values()) and 0 < len(set(names)) == len(names), "lora.layers", names,
          "layers of each part, each once")  # fmt: skip
    for layer in layers:
        _must(min(layer.inputs, layer.outputs) > 0, f"layer {layer.name}", (layer.inputs, layer.outputs),
              "numbers of features above 0")  # fmt: skip


def _check_point(where: str, point: TrainedFor) -> None:
    """Checks that the mask is the clock's, and the guidance a number."""
    mask = tuple(map(int, clock_mask(point.clock, point.num_inference_steps, point.scheduler)))
    _must(point.mask == mask, f"{where}.mask", point.mask, f"the mask of clock {point.clock}")
    scale = point.guidance_scale
    _must(0 < scale <= MAX_GUIDANCE, f"{where}.guidance_scale", scale, "a number above 0")


def _check_seed(where: str, seed: str) -> None:
    plain = seed.isascii() and seed.isdigit() and len(seed) <= 20 and str(int(seed)) == seed
    _must(plain and int(seed) <= MAX_SEED, where, seed, "0 to 2^64 - 1 as decimal text")


def _check_adaptor(adaptor: Adaptor) -> None:
    """The identity is described by its kind alone; a learned adaptor by its name, its hash and its training."""
    _must(adaptor.kind in ADAPTORS, "adaptor.kind", adaptor.kind, f"one of {', '.join(ADAPTORS)}")
    learned = adaptor.kind != "identity"
    for name in ("name", "sha256", "trained_for"):
        value = getattr(adaptor, name)
        _must((value is not None) == learned, f"adaptor.{name}", value, "a value for a learned one, null for identity")
    _must(learned or adaptor.path is None, "adaptor.path", adaptor.path, "null for identity")
    if adaptor.sha256 is not None:
        _check_hash("adaptor.sha256", adaptor.sha256)
    if adaptor.trained_for is not None:
        _check_point("adaptor.trained_for", adaptor.trained_for)


def _check_hash(name: str, given: str) -> None:
    _must(len(given) == 64 and set(given) <= set("0123456789abcdef"), name, given, "64 hexadecimal digits")


def _check_target(target: Target, manifest: Manifest) -> None:
    for holds, name, given, expected in target.faults():
        _must(holds, name, given, expected)
    steps = [name for name, component in target.components.items() if component.stage == "step"]
    _must(steps == ["unet"], f"components of stage step in {target.target}", steps, "the unet alone")
    for kind, component in target.components.items():
        stage = STAGE_OF.get(kind)
        _must(stage is not None, "components", kind, f"one of {', '.join(STAGE_OF)}")
        _must(component.stage == stage, f"stage of {kind}", component.stage, repr(stage))
        for name, floor in msgspec.structs.asdict(component.floors).items():
            _must(floor is None or floor > 0, f"floors.{name}", floor, "dB above 0")
        batch = component.batch
        _must(batch is None or batch > 0, "batch", batch, "null or a whole number above 0")
        half = component.dtype == "fp16"
        is_rounded = half or bool(component.weights)
        _must((component.floors.program is not None) == is_rounded, "floors.program", component.floors.program,
              "dB for fp16 and for weights in fewer bits alone")  # fmt: skip
        count = min(component.weights.values(), default=1)
        _must(count > 0, "weights", count, "how many elements, 1 or more")
        tensors = [t for graph in component.graphs for t in (*graph.inputs, *graph.outputs)]
        _must(half or all(t.dtype != "float16" for t in tensors), "dtype", component.dtype, "fp16 for float16 tensors")
        names = [graph.name for graph in component.graphs]
        _must(len(set(names)) == len(names), "graphs", names, "distinct names")
        unknown = [name for name in component.files if name not in manifest.files]
        _must(not manifest.files or not unknown, "files of a component", unknown, "files of the bundle")
        file, is_text = component.tokenizer, component.stage == "prompt"
        listed = file is None or (is_text and (not manifest.files or file in manifest.files))
        _must(listed, f"tokenizer of {kind}", file, "a file of the bundle where it is a text encoder, else null")
        looped = component.stage == "step"
        _must((component.layout is not None) == looped, "layout", component.layout, "a value for the unet alone")
        for graph in component.graphs:
            _must((graph.frequency is not None) == looped, f"frequency of {graph.name}", graph.frequency,
                  "a value for graphs of the unet alone")  # fmt: skip
        _check_graphs(kind, component, manifest)
        _check_further(kind, component, manifest)
    _check_widths(target, manifest)


def _check_graphs(name: str, component: Component, manifest: Manifest) -> None:
    """Checks a component's graphs for the usual size against what the manifest says of latents and prompts."""
    maps = [tensor for graph in component.graphs for tensor in graph.maps]
    sides = {isinstance(size, int) for tensor in maps for size in tensor.shape[2:]}
    _must(len(sides) < 2, f"shapes in {name}", [t.shape for t in maps], "all of one size, or all of any")
    if component.stage == "step":
        _check_unet(component, manifest)
    else:
        _check_component(name, component, manifest)


def _check_further(name: str, component: Component, manifest: Manifest) -> None:
    """Checks a component's graphs for further sizes as if each of these were the usual one."""
    usual = manifest.sample
    sizes = [(usual.height, usual.width), *((sized.height, sized.width) for sized in component.further)]
    is_any = any(graph.takes_any_size for graph in component.graphs)
    _must(len(set(sizes)) == len(sizes), f"further of {name}", sizes, "other sizes than the usual one, each once")
    _must(not (is_any and component.further), f"further of {name}", sizes, "none where graphs take any size")
    keys = [graph.key for graph in component.every_graph if graph.file is not None]
    _must(not component.further or len(set(keys)) == len(keys), f"functions of {name}", keys,
          "a function of its own for each graph and size")  # fmt: skip
    for sized in component.further:
        _must(sized.height % usual.multiple == sized.width % usual.multiple == 0, f"further of {name}",
              (sized.height, sized.width), f"multiples of {usual.multiple}")  # fmt: skip
        said = [(graph.name, graph.frequency) for graph in sized.graphs]
        expected = [(graph.name, graph.frequency) for graph in component.graphs]
        _must(said == expected, f"further of {name}", said, f"the graphs of the usual size: {expected}")
        sample = msgspec.structs.replace(usual, height=sized.height, width=sized.width)
        _check_graphs(name, msgspec.structs.replace(component, graphs=sized.graphs, further=()),
                      msgspec.structs.replace(manifest, sample=sample))  # fmt: skip


def _check_component(name: str, component: Component, manifest: Manifest) -> None:
    """Checks a component beside the UNet against what the manifest says of prompts and latents."""
    names = [graph.name for graph in component.graphs]
    _must(len(names) == 1 and component.graphs[0].file is not None, f"graphs of {name}", names, "one, with a file")
    (graph,) = component.graphs
    rows: int | str = "batch" if component.batch is None else component.batch
    for tensor in (*graph.inputs, *graph.outputs):
        _check_sizes(tensor)
        _must(tensor.shape[:1] == (rows,), f"shape of {tensor.name} in {name}", tensor.shape, f"{rows} first")
    _must(len(graph.inputs) == 1, f"inputs of {name}", [tensor.name for tensor in graph.inputs], "one")
    if component.stage == "prompt":
        _check_text_encoder(name, graph, manifest)
        return
    if name == T2I_ADAPTER:
        _check_adapter_graph(graph, manifest)
        return
    sample, is_preview = manifest.sample, component.stage == "preview"
    vae = manifest.preview if is_preview else manifest.vae
    _must(vae is not None, "preview" if is_preview else "vae", vae, f"a value where there is a {name}")
    assert vae is not None
    picture = (3, vae.downscale * sample.height, vae.downscale * sample.width)
    latent = (sample.channels, sample.height, sample.width)
    _must(len(graph.outputs) == 1, f"outputs of {name}", [tensor.name for tensor in graph.outputs], "one")
    decodes = component.stage != "image"
    expected = [(graph.inputs[0], latent if decodes else picture)]
    if decodes:
        expected.append((graph.outputs[0], picture))
    for tensor, shape in expected:
        found = tensor.at(sample.height, sample.width).shape[1:]
        _must(found == shape, f"shape of {tensor.name} in {name}", tensor.shape, f"{(rows, *shape)}")


def _check_adapter_graph(graph: Graph, manifest: Manifest) -> None:
    """Checks that a T2I-Adapter takes a picture, and makes the features that steps are handed."""
    (picture,) = graph.inputs
    fits = picture.name == CONTROL_IMAGE and picture.is_map and picture.shape[1] in (1, 3)
    _must(fits, f"inputs of {T2I_ADAPTER}", (picture.name, picture.shape), f"{CONTROL_IMAGE}, of 1 or 3 channels")
    known = [(t.name, t.shape[1]) for t in manifest.conditioning.tensors if t.name.startswith(T2I_ADAPTER)]
    made = [(tensor.name, tensor.shape[1]) for tensor in graph.outputs if tensor.is_map]
    _must(made == known and bool(made), f"outputs of {T2I_ADAPTER}", made, f"those of conditioning.tensors: {known}")


def _check_text_encoder(name: str, graph: Graph, manifest: Manifest) -> None:
    encoders = () if manifest.prompt is None else manifest.prompt.encoders
    encoder = next((each for each in encoders if each.component == name), None)
    _must(encoder is not None, "prompt.encoders", [each.component for each in encoders], f"an entry for {name}")
    assert encoder is not None
    (ids,) = graph.inputs
    _must(ids.name == "input_ids", f"inputs of {name}", [ids.name], "input_ids")
    _must(ids.shape[1:] == (encoder.max_length,), f"shape of input_ids in {name}", ids.shape,
          f"max_length {encoder.max_length} of prompt.encoders")  # fmt: skip
    outputs = {tensor.name: tensor.shape for tensor in graph.outputs}
    for wanted in (*encoder.hidden, *(() if encoder.pooled is None else (encoder.pooled,))):
        _must(wanted in outputs, f"outputs of {name}", sorted(outputs), f"{wanted}, which prompt.encoders names")
    if encoder.pooled is not None:
        shape = outputs[encoder.pooled]
        _must(len(shape) == 2, f"shape of {encoder.pooled} in {name}", shape, "a row for each text")
    for hidden in encoder.hidden:
        fits = len(outputs[hidden]) == 3 and outputs[hidden][1] == encoder.max_length
        _must(fits, f"shape of {hidden} in {name}", outputs[hidden], f"a row for each of {encoder.max_length} tokens")


def _check_widths(target: Target, manifest: Manifest) -> None:
    """Checks that what a target's text encoders give together is what the UNet takes."""
    encoders = () if manifest.prompt is None else manifest.prompt.encoders
    if not encoders or not all(encoder.component in target.components for encoder in encoders):
        return
    taken = {tensor.name: tensor.shape[-1] for tensor in manifest.conditioning.tensors}
    given: dict[str, int] = {TEXT: 0}
    for encoder in encoders:
        (graph,) = target.components[encoder.component].graphs
        widths = {tensor.name: tensor.shape[-1] for tensor in graph.outputs}
        states = [int(widths[name]) for name in encoder.hidden]
        _must(len(set(states)) == 1, f"widths of hidden in {encoder.component}", states, "the same for all")
        given[TEXT] += states[0]
        if encoder.pooled is not None:
            given[POOLED] = int(widths[encoder.pooled])
    for name, width in given.items():
        _must(taken.get(name, width) == width, f"width of {name}", taken.get(name), f"{width}, as the encoders give it")


def _check_unet(unet: Component, manifest: Manifest) -> None:
    sample = manifest.sample
    parts = {*(graph.name for graph in unet.graphs), "full", "cached"}
    _must(parts <= manifest.cost.keys(), "cost", sorted(manifest.cost), f"an entry for {', '.join(sorted(parts))}")
    for graph in unet.graphs:
        if graph.name == "adaptor":
            without = manifest.adaptor.kind == "identity"
            _must((graph.file is None) == without, "file of adaptor", graph.file, "null for the identity alone")
    factors = {} if manifest.lora is None else manifest.lora.shapes
    given = (*(tensor.name for tensor in manifest.conditioning.tensors), *factors)
    for full in (True, False):
        _check_wiring(unet.graphs, given, full)
    rows: int | str = "batch" if unet.batch is None else unet.batch
    shapes = {
        SAMPLE: (sample.in_channels, sample.height, sample.width),
        "out_sample": (sample.channels, sample.height, sample.width),
    }
    for tensor in (t for graph in unet.graphs for t in (*graph.inputs, *graph.outputs)):
        if not has_rows(tensor.name):
            wanted = factors.get(tensor.name, (1,))
            _must(tensor.shape == wanted, f"shape of {tensor.name}", tensor.shape, str(wanted))
            continue
        shares = tensor.name == SAMPLE and tensor.shape[:1] == (IMAGES,)
        _must(shares or tensor.shape[:1] == (rows,), f"shape of {tensor.name}", tensor.shape, f"{rows} first")
        found = tensor.at(sample.height, sample.width).shape[1:]
        image = shapes.get(tensor.name, found)
        _must(found == image, f"shape of {tensor.name}", tensor.shape, f"{(rows, *image)}")
    for graph in unet.graphs:
        can = unet.batch is None and graph.can_count_rows and all(tensor.name != SAMPLE for tensor in graph.outputs)
        _must(can or not graph.shares_rows, f"shape of {SAMPLE} in {graph.name}", IMAGES,
              f"{rows}: graphs share rows where the batch is symbolic and something else has all rows")  # fmt: skip


def _check_wiring(graphs: tuple[Graph, ...], given: tuple[str, ...], full: bool) -> None:
    """Follows the tensors through one step: each is there when a graph wants it."""
    there = {SAMPLE, TIMESTEP, *given} | (set() if full else {CACHE, LOWRES_FEATURE})
    if not full:  # a ControlNet's residuals stay
        there |= {tensor.name for graph in graphs if graph.name == CONTROLNET for tensor in graph.outputs}
    for graph in graphs:
        names = {tensor.name for tensor in graph.outputs}
        # Where nothing runs, the cache keeps the name that the last step gave it.
        stays = {LOWRES_FEATURE if tensor.name == CACHE else tensor.name for tensor in graph.inputs}
        _must(graph.file is not None or names <= stays, f"file of {graph.name}", graph.file,
              "a file: what it makes does not come in")  # fmt: skip
        for tensor in (*graph.inputs, *graph.outputs):
            _check_sizes(tensor)
        if graph.runs(full):
            missing = [tensor.name for tensor in graph.inputs if tensor.name not in there]
            _must(not missing, f"inputs of {graph.name}", missing, "tensors that a step has by then")
            there |= names
    _must({"out_sample", LOWRES_FEATURE} <= there, "outputs of a step", sorted(there), "out_sample, lowres_feature")


def _check_sizes(tensor: Tensor) -> None:
    # The component determines the first dimension; only a text's length, and a map's height and width, may be any.
    symbolic = (0, 1) if tensor.name == TEXT and tensor.shape[1:2] == (TOKENS,) else (0,)
    resolved = tensor.at(UNIT, UNIT).shape if tensor.is_map else tensor.shape
    sizes = [n for i, n in enumerate(resolved) if i not in symbolic or isinstance(n, int)]
    _must(all(isinstance(n, int) and n > 0 for n in sizes), f"shape of {tensor.name}", tensor.shape, "sizes")


def _must(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise BundleError(f"manifest.json: {name} is {given!r}; expected {expected}")


class _Version(msgspec.Struct):
    format_version: int


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest strictly; targets in formats that this runtime does not know are left out.

    Raises:
        BundleError: It is not JSON, of another version, or does not hold what the format asks for.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise BundleError(
                f"manifest.json is of format version {version}, this runtime reads version {FORMAT_VERSION}; "
                "install a newer edgediff"
            )
        if version < FORMAT_VERSION:
            raise BundleError(
                f"manifest.json is of format version {version}, this runtime reads version {FORMAT_VERSION}; "
                "export the model again"
            )
        document: dict[str, Any] = msgspec.json.decode(data)
        entries = document.get("targets")
        if isinstance(entries, list):
            document["targets"] = [entry for entry in entries if not _is_unknown(entry)]
        found = msgspec.convert(document, _document())
        manifest = Manifest(**{name: getattr(found, name) for name in Manifest.__struct_fields__})
        check_manifest(manifest)
        return manifest
    except (msgspec.DecodeError, UnicodeDecodeError, RequestError) as e:
        raise BundleError(f"manifest.json is not a manifest: {e}") from e


def _is_unknown(entry: object) -> bool:
    name = entry.get("target") if isinstance(entry, dict) else None
    return isinstance(name, str) and name not in TARGETS


def _document() -> type[msgspec.Struct]:
    """A manifest whose targets are each of a known format."""
    kinds: Any = reduce(or_, TARGETS.values())
    fields: list[Any] = [("targets", tuple[kinds, ...])]
    return msgspec.defstruct("Document", fields, bases=(Manifest,), kw_only=True)


def render_manifest(manifest: Manifest) -> bytes:
    """Writes a manifest as indented JSON with sorted mappings, the same bytes for the same content."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of the manifest as plain data; runtime/manifest.schema.json holds it."""
    schema = msgspec.json.schema(_document())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgediff bundle manifest",
        **schema,
    }
