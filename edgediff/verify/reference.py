"""The reference that travels with a bundle: what torch computed along a real trajectory.

``evidence/reference.safetensors`` holds every tensor that crosses between graphs at the first full, the first cached
and the last step, the conditioning, and the final latents. With it a bundle is verified where there is no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgediff_runtime import EdgePipeline, Manifest
from edgediff_runtime.errors import BundleError

REFERENCE = "evidence/reference.safetensors"
CACHE = "lowres_feature"


@dataclass(frozen=True)
class Recorded:
    """One step of the reference trajectory.

    Attributes:
        index: Number of the step.
        full: Whether the low-resolution part ran.
        tensors: Every tensor of the step by name, as the step left it, [rows, ...].
        cache: The cache that the step began with; None in the first.
    """

    index: int
    full: bool
    tensors: dict[str, np.ndarray]
    cache: np.ndarray | None


@dataclass(frozen=True)
class Reference:
    """What torch computed.

    Attributes:
        steps: The recorded steps.
        latents: Final latents [N, C, H, W]; None where only the first steps were run.
        conditioning: Embeddings that the trajectory was conditioned on, by name; empty for classes.
    """

    steps: tuple[Recorded, ...]
    latents: np.ndarray | None
    conditioning: dict[str, np.ndarray]


def reference_request(manifest: Manifest, conditioning: dict[str, np.ndarray]) -> dict[str, Any]:
    """The generation that the reference is taken along: the bundle's operating point.

    Where a model is too large for whole trajectories, the conditional rows alone are run: half the time and memory.

    Args:
        manifest: The bundle's manifest.
        conditioning: Embeddings by name; names beginning with ``negative_`` are the unconditional ones.

    Returns:
        Arguments for `EdgePipeline.stream`.
    """
    point = manifest.operating_point
    request: dict[str, Any] = {"num_images": point.num_images, "seed": point.seed}
    if manifest.verified == "graphs":
        request["guidance_scale"] = 1.0
    if manifest.conditioning.kind != "text":
        return request
    negative = {n.removeprefix("negative_"): v for n, v in conditioning.items() if n.startswith("negative_")}
    positive = {n: v for n, v in conditioning.items() if not n.startswith("negative_")}
    request["prompt_embeds"] = positive.pop("encoder_hidden_states", None)
    request["negative_prompt_embeds"] = negative.pop("encoder_hidden_states", None)
    request["added_cond"] = positive
    request["negative_added_cond"] = negative
    return request


def record(
    pipe: EdgePipeline,
    conditioning: dict[str, np.ndarray],
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Runs the reference trajectory and keeps what verification needs.

    To its end, or to the first cached step where the bundle says ``verified: graphs``.

    Args:
        pipe: A pipeline over torch.
        conditioning: Embeddings by name.
        progress: Told the number of steps done and to do.

    Returns:
        The reference.
    """
    whole = pipe.manifest.verified == "full"
    mask = pipe.manifest.operating_point.mask
    first_cached = mask.index(0) if 0 in mask else 0
    wanted = {0, first_cached, len(mask) - 1 if whole else 0}
    steps: list[Recorded] = []
    latents = None
    cache: np.ndarray | None = None
    for step in pipe.stream(**reference_request(pipe.manifest, conditioning)):
        tensors = {name: np.array(pipe.session.get(value)) for name, value in step.tensors[0].items()}
        if step.index in wanted:
            steps.append(Recorded(step.index, step.full, tensors, cache))
        cache = tensors[CACHE]
        latents = step.latents
        if progress is not None:
            progress(step.index + 1, max(wanted) + 1)
        if step.index == max(wanted):
            break
    return Reference(tuple(steps), latents if whole else None, conditioning)


def save_reference(reference: Reference, path: Path) -> None:
    """Writes a reference.

    Args:
        reference: What torch computed.
        path: The file.
    """
    flat = {f"conditioning/{name}": value for name, value in reference.conditioning.items()}
    if reference.latents is not None:
        flat["latents"] = reference.latents
    for step in reference.steps:
        where = f"steps/{step.index}/{'full' if step.full else 'cached'}"
        flat.update({f"{where}/{name}": value for name, value in step.tensors.items()})
        if step.cache is not None and not step.full:
            flat[f"{where}/cache"] = step.cache
    save_file({name: np.ascontiguousarray(value) for name, value in sorted(flat.items())}, path)


def load_reference(path: Path) -> Reference:
    """Reads a reference.

    Args:
        path: The file.

    Returns:
        What torch computed.

    Raises:
        BundleError: The file is no such reference.
    """
    try:
        flat = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise BundleError(f"{REFERENCE} cannot be read: {e}") from e
    conditioning: dict[str, np.ndarray] = {}
    found: dict[tuple[int, bool], dict[str, np.ndarray]] = {}
    latents = None
    for key, value in flat.items():
        match key.split("/"):
            case ["latents"]:
                latents = value
            case ["conditioning", name]:
                conditioning[name] = value
            case ["steps", index, ("full" | "cached") as kind, name] if index.isdigit():
                found.setdefault((int(index), kind == "full"), {})[name] = value
            case _:
                raise BundleError(f"{REFERENCE} holds {key!r}, which is nothing that a reference holds")
    steps = [
        Recorded(index, full, {n: v for n, v in tensors.items() if n != "cache"}, tensors.get("cache"))
        for (index, full), tensors in sorted(found.items())
    ]
    return Reference(tuple(steps), latents, conditioning)
