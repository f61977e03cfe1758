"""The reference that travels with a bundle: what torch computed along a real trajectory.

``evidence/reference.safetensors`` holds every tensor that crosses between graphs at the first full, the first cached
and the last step, the conditioning, and the final latents. With it a bundle is verified where there is no torch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from edgediff.data.arrays import prompt_arguments
from edgediff_runtime import EdgePipeline, Manifest, noise
from edgediff_runtime.errors import BundleError
from edgediff_runtime.inversion import Inverted
from edgediff_runtime.loop import CACHE
from edgediff_runtime.low_rank import DOWN, PREFIX, UP
from edgediff_runtime.manifest import (
    CONTROL_IMAGE,
    T2I_ADAPTER,
    TEXT,
    TIMESTEP,
    Component,
    Graph,
    LoraInputs,
    Sample,
    has_rows,
    injects,
)
from edgediff_runtime.schedulers import make_scheduler

REFERENCE = "evidence/reference.safetensors"
# The draw of the reference's noise that stands for a picture in each step.
DRAWN_ALONG = 2_000
# Of the factors that stand for a LoRA, where graphs take one: their seed, and about how much of a projection's result
# theirs is.
LORA_SEED, LORA_SHARE = 11, 0.05


@dataclass(frozen=True)
class Recorded:
    """One step of the reference trajectory.

    Attributes:
        tensors: Every tensor of the step by name, as the step left it, [rows, ...]; of a cached one also the ``cache``
            that it began with.
    """

    index: int
    full: bool
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """What torch computed.

    Attributes:
        latents: Final latents [N, C, H, W]; None where only the first steps were run.
        conditioning: Embeddings that the trajectory was conditioned on, by name; empty for classes.
        half: For each target in fp16, recorded step and graph (0 and the name of another component), its outputs in
            fp32 arithmetic on weights and inputs rounded to fp16.
        components: Inputs and outputs of each component beside the UNet, by tensor names.
        sizes: The same for further sizes of the latent, height and width: the first steps, without conditioning but a
            control picture.
    """

    steps: tuple[Recorded, ...]
    latents: np.ndarray | None
    conditioning: dict[str, np.ndarray]
    half: dict[tuple[str, int, str], dict[str, np.ndarray]] = field(default_factory=dict)
    components: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    sizes: "dict[tuple[int, int], Reference]" = field(default_factory=dict)


def at_size(manifest: Manifest, size: tuple[int, int]) -> Manifest:
    """What a bundle's evidence for a further size is compared with: no whole trajectory, what has a size alone."""
    there = manifest.at(*size)
    targets = []
    for target in there.targets:
        sized = {name: component for name, component in target.components.items() if component.has_size}
        targets.append(msgspec.structs.replace(target, components=sized))
    evidence = msgspec.structs.replace(manifest.evidence, verified="graphs", sizes=())
    return msgspec.structs.replace(there, evidence=evidence, targets=tuple(targets))


def reference_request(manifest: Manifest, conditioning: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arguments for `EdgePipeline.stream`: the reference is taken along the bundle's operating point."""
    point = manifest.operating_point
    request: dict[str, Any] = {"num_images": point.num_images, "seed": int(point.seed), "clock": point.mask}
    given = prompt_arguments(conditioning)
    if manifest.conditioning.kind == "text":
        request |= given
    else:
        beside = ("concat_latents", CONTROL_IMAGE, "control_features")
        request |= {name: given[name] for name in beside if given.get(name) is not None}
    return request if manifest.lora is None else request | {"lora": drawn_lora(manifest.lora)}


def drawn_lora(inputs: LoraInputs) -> dict[str, np.ndarray]:
    """The LoRA of the reference: seeded normal numbers that change a projection by some hundredths."""
    # By name: a manifest that was read has its parts in another order than one that is drafted.
    layers = sorted((layer for part in inputs.layers.values() for layer in part), key=lambda layer: layer.name)
    found = {}
    for i, layer in enumerate(layers):
        for draw, end, shape, width in (
            (0, DOWN, (inputs.rank, layer.inputs), layer.inputs),
            (1, UP, (layer.outputs, inputs.rank), inputs.rank / LORA_SHARE**2),
        ):
            found[f"{PREFIX}{layer.name}{end}"] = noise(LORA_SEED, shape, image=i, draw=draw) / np.sqrt(
                np.float32(width)
            )
    return found


def recorded_request(manifest: Manifest, conditioning: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same for the recorded trajectory itself: a UNet that injects draws a picture along throughout.

    That picture is seeded noise, as if it had been inverted over the timesteps of the operating point.
    """
    request = reference_request(manifest, conditioning)
    if not injects(manifest.targets[0].unet.graphs):
        return request
    point, sample = manifest.operating_point, manifest.sample
    timesteps = make_scheduler(manifest.scheduler, point.num_inference_steps).timesteps
    shape = (sample.channels, sample.height, sample.width)
    levels = [noise(int(point.seed), shape, image=0, draw=DRAWN_ALONG + i)[None] for i in range(len(timesteps))]
    inverted = Inverted(levels[0], (), {}, np.stack(levels), timesteps, {})
    return request | {
        "inverted": inverted, "inject_attention": 1.0, "inject_features": 1.0, "scheduler": manifest.scheduler.name,
        "num_inference_steps": point.num_inference_steps,
    }  # fmt: skip


def prompt_request(pipe: EdgePipeline, conditioning: dict[str, np.ndarray]) -> dict[str, Any]:
    """The reference's prompts in place of its embeddings, its control picture in place of an adapter's features.

    To be joined to `reference_request`: the generation then runs from the text and the picture on. Nothing stands for
    what was not made of a prompt or a picture, and where the bundle has nothing that encodes it.
    """
    found: dict[str, Any] = {}
    if CONTROL_IMAGE in conditioning and T2I_ADAPTER in pipe.components:
        found |= {CONTROL_IMAGE: conditioning[CONTROL_IMAGE], "control_features": None}
    said = pipe.manifest.evidence.prompt
    if said is None or not pipe.can_encode:
        return found
    embeddings = ("prompt_embeds", "negative_prompt_embeds", "added_cond", "negative_added_cond")
    return {**found, **dict.fromkeys(embeddings), "prompt": said[0], "negative_prompt": said[1]}


def record(
    pipe: EdgePipeline,
    conditioning: dict[str, np.ndarray],
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Runs the reference trajectory and keeps what verification needs.

    To its end; or, where the bundle says ``verified: graphs``, to the first cached step and without guidance: half the
    time and memory.
    """
    whole = pipe.manifest.evidence.verified == "full"
    wanted = _wanted(pipe.manifest)
    last = max(wanted)
    steps: list[Recorded] = []
    latents = None
    request = recorded_request(pipe.manifest, conditioning)
    if not whole:
        request["guidance_scale"] = 1.0
    for step in pipe.stream(**request):
        if step.index in wanted:
            tensors = {
                name: np.array(pipe.session.get(value))
                for name, value in step.tensors[0].items()
                if name != CACHE or not step.full
            }
            steps.append(Recorded(step.index, step.full, tensors))
        latents = step.latents
        if progress is not None:
            progress(step.index + 1, last + 1)
        if step.index == last:
            break
    return Reference(tuple(steps), latents if whole else None, conditioning)


def _wanted(manifest: Manifest) -> set[int]:
    """The steps that are recorded: the first full, the first cached and, of a whole trajectory, the last."""
    mask = manifest.operating_point.mask
    first_cached = mask.index(0) if 0 in mask else 0
    return {0, first_cached, len(mask) - 1 if manifest.evidence.verified == "full" else 0}


def step_inputs(step: Recorded, graph: Graph) -> dict[str, np.ndarray]:
    """Real inputs of a graph, [rows, ...] in the dtypes that it declares, from a step in which it runs."""
    inputs = {}
    for tensor in graph.inputs:
        value = step.tensors[tensor.name].astype(tensor.dtype)
        # The undivided step of an ecosystem may take the timestep as a scalar or for each row, and a text with its
        # channels before its tokens.
        if tensor.name == TIMESTEP:
            value = np.full(cast(Any, tensor.shape), value.flat[0])
        elif tensor.name == TEXT and len(tensor.shape) == 4:
            value = np.ascontiguousarray(value.transpose(0, 2, 1)[:, :, None])
        inputs[tensor.name] = value
    return inputs


def recorded_inputs(reference: Reference, graph: Graph) -> dict[str, np.ndarray]:
    """Real inputs of a graph from the first step in which it runs; empty where the clock never runs it."""
    for step in reference.steps:
        if graph.runs(step.full):
            return step_inputs(step, graph)
    return {}


def check_reference(reference: Reference, manifest: Manifest) -> None:
    """Checks a reference's steps, and each tensor's dtype and shape, against the manifest; else a BundleError."""
    if sorted(reference.sizes) != sorted(manifest.evidence.sizes):
        raise BundleError(
            f"{REFERENCE} holds the sizes {sorted(reference.sizes)}; the manifest asks for "
            f"{sorted(manifest.evidence.sizes)}"
        )
    for size, sized in reference.sizes.items():
        check_reference(sized, at_size(manifest, size))
    mask = manifest.operating_point.mask
    expected = [(index, bool(mask[index])) for index in sorted(_wanted(manifest))]
    found = [(step.index, step.full) for step in reference.steps]
    if found != expected:
        raise BundleError(f"{REFERENCE} holds the steps {_spell(found)}; the manifest asks for {_spell(expected)}")
    sample = manifest.sample
    images = (manifest.operating_point.num_images, sample.channels, sample.height, sample.width)
    if manifest.evidence.verified == "full":
        if reference.latents is None:
            raise BundleError(f"{REFERENCE} has no latents")
        _check_array("latents", reference.latents, "float32", images)
    for target in manifest.targets:
        for name, component in target.components.items():
            if name != "unet":
                _check_component(component, reference.components.get(name, {}), sample)
    for step in reference.steps:
        rows = next(iter(step.tensors["sample"].shape), 0) if "sample" in step.tensors else 0
        for target in manifest.targets:
            for graph in target.unet.graphs:
                if graph.runs(step.full):
                    graph = graph.at(sample.height, sample.width)
                    half = reference.half.get((target.target, step.index, graph.name), {})
                    _check_graph(step, graph, rows, half, half_wanted=target.unet.floors.program is not None)


def _check_component(component: Component, tensors: dict[str, np.ndarray], sample: Sample) -> None:
    """Checks the tensors that a component takes and gives."""
    for graph in component.graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name not in tensors:
                raise BundleError(f"{REFERENCE} has no {tensor.name} of {graph.name}, which needs it")
            value = tensors[tensor.name]
            # torch takes token ids as int64, whatever a target makes of them.
            dtype = "int64" if tensor.name == "input_ids" else "float32"
            shape = tensor.at(sample.height, sample.width).shape
            _check_array(f"{tensor.name} of {graph.name}", value, dtype, (*value.shape[:1], *shape[1:]))


def _check_graph(step: Recorded, graph: Graph, rows: int, half: dict[str, np.ndarray], half_wanted: bool) -> None:
    """Checks the tensors that one graph takes and gives."""
    there = {tensor.name: (tensor, step.tensors) for tensor in (*graph.inputs, *graph.outputs)}
    halves = {tensor.name: (tensor, half) for tensor in graph.outputs} if half_wanted and graph.file else {}
    for what, wanted in (("", there), (f"{graph.name} with weights of fp16: ", halves)):
        for name, (tensor, tensors) in wanted.items():
            if name not in tensors:
                raise BundleError(f"{REFERENCE} has no {what}{name} for step {step.index}, which needs it")
            # The record is torch's, in fp32; a target casts it to its own dtype.
            dtype = "int64" if "int" in tensor.dtype else "float32"
            given = tensors[name].shape
            sizes = tuple(
                n if isinstance(n, int) else size for size, n in zip(given[1:], tensor.shape[1:], strict=False)
            )
            shape = (rows, *sizes) if has_rows(name) else tensor.shape
            _check_array(f"{what}{name} of step {step.index}", tensors[name], dtype, shape)


def _check_array(what: str, array: np.ndarray, dtype: str, shape: tuple[int | str, ...]) -> None:
    if array.dtype.name != dtype or array.shape != shape or 0 in shape:
        raise BundleError(
            f"{REFERENCE}: {what} is {array.dtype.name} {list(array.shape)}; expected {dtype} {list(shape)}"
        )
    if not np.isfinite(array).all():
        raise BundleError(f"{REFERENCE}: {what} holds NaN or infinity")


def _spell(steps: list[tuple[int, bool]]) -> str:
    return ", ".join(f"{index} ({'full' if full else 'cached'})" for index, full in steps) or "none"


def save_reference(reference: Reference, path: Path) -> None:
    """Writes a reference."""
    flat = _flat(reference)
    for (height, width), sized in reference.sizes.items():
        flat |= {f"sizes/{height}x{width}/{name}": value for name, value in _flat(sized).items()}
    # Through Python: safetensors' own writer has its own error for a full disk, and leaves the file to its owner alone.
    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in sorted(flat.items())}))


def _flat(reference: Reference) -> dict[str, np.ndarray]:
    flat = {f"conditioning/{name}": value for name, value in reference.conditioning.items()}
    if reference.latents is not None:
        flat["latents"] = reference.latents
    for step in reference.steps:
        where = f"steps/{step.index}/{'full' if step.full else 'cached'}"
        flat.update({f"{where}/{name}": value for name, value in step.tensors.items() if not _is_factor(name)})
        flat.update({f"lora/{name}": value for name, value in step.tensors.items() if _is_factor(name)})
    for component, tensors in reference.components.items():
        flat.update({f"components/{component}/{name}": value for name, value in tensors.items()})
    for (target, index, graph), tensors in reference.half.items():
        flat.update({f"half/{target}/{index}/{graph}/{name}": value for name, value in tensors.items()})
    return flat


def _is_factor(name: str) -> bool:
    """Whether a tensor is the same in all steps, and written once."""
    return name != TIMESTEP and not has_rows(name)


def load_reference(path: Path) -> Reference:
    """Reads a reference; a BundleError where the file is none."""
    try:
        flat = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise BundleError(f"{REFERENCE} cannot be read: {e}") from e
    usual: dict[str, np.ndarray] = {}
    sized: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for key, value in flat.items():
        found = re.fullmatch(r"sizes/(\d+)x(\d+)/(.+)", key)
        if found is None:
            usual[key] = value
        else:
            sized.setdefault((int(found[1]), int(found[2])), {})[found[3]] = value
    return replace(_unflat(usual), sizes={size: _unflat(tensors) for size, tensors in sized.items()})


def _unflat(flat: dict[str, np.ndarray]) -> Reference:
    conditioning: dict[str, np.ndarray] = {}
    half: dict[tuple[str, int, str], dict[str, np.ndarray]] = {}
    components: dict[str, dict[str, np.ndarray]] = {}
    found: dict[tuple[int, bool], dict[str, np.ndarray]] = {}
    factors: dict[str, np.ndarray] = {}
    latents = None
    for key, value in flat.items():
        match key.split("/"):
            case ["latents"]:
                latents = value
            case ["lora", name]:
                factors[name] = value
            case ["conditioning", name]:
                conditioning[name] = value
            case ["steps", index, ("full" | "cached") as kind, name] if index.isdigit():
                found.setdefault((int(index), kind == "full"), {})[name] = value
            case ["components", component, name]:
                components.setdefault(component, {})[name] = value
            case ["half", target, index, graph, name] if index.isdigit():
                half.setdefault((target, int(index), graph), {})[name] = value
            case _:
                raise BundleError(f"{REFERENCE} holds {key!r}, which no reference has; export again")
    steps = [Recorded(index, full, tensors | factors) for (index, full), tensors in sorted(found.items())]
    return Reference(tuple(steps), latents, conditioning, half, components)
