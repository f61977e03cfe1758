"""The planner: the clock with the least error in the image that a budget allows.

Where there are few enough masks of the wanted cost, all of them are measured. Else a model of what each step, each pair
and each short row of cached steps does to the image chooses those to measure, as it does for every other cost, for the
frontier. These masks and every uniform clock are measured on the same noise, and the least error wins. Where the images
do not tell the best mask from a uniform clock, the uniform clock is the plan: it is as good on other seeds, and
adaptors are trained for it.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import comb
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgediff.bundle.reference import REFERENCE, load_reference
from edgediff.data.arrays import prompt_arguments
from edgediff.errors import ConfigError
from edgediff.plan.budget import StepCost, cached_steps, check_budget, count_cost, time_cost
from edgediff.plan.estimate import ROWS, Estimate, masks_of, probes
from edgediff.plan.plan_files import check_place, check_replaced, plan_recipe
from edgediff.plan.trajectory import Edits, Errors, Mask, Trajectories, psnr_db
from edgediff.targets.backends import open_pipeline, usual_backend
from edgediff_runtime import EdgePipeline, Manifest, clock_mask, open_bundle
from edgediff_runtime.clock import format_mask
from edgediff_runtime.editing import steps_left_out
from edgediff_runtime.operating_point import departure
from edgediff_runtime.pictures import images_of
from edgediff_runtime.pipeline import ENCODER
from edgediff_runtime.schedulers import sampler_of

log = logging.getLogger(__name__)

# At most so many masks of the wanted cost are all measured: at 12 steps no number of cached steps has more.
MAX_ENUMERATED = comb(11, 5)
# How many of the model's best masks are measured: of the wanted cost, and of each other one.
CANDIDATES, CANDIDATES_EACH = 8, 3
MAX_STEPS = 100
NUM_IMAGES = 16
# The paper saw DDIM fail at 8 steps. Few, here: up to a quarter more.
DDIM_STEPS = 10


@dataclass(frozen=True)
class Point:
    """A mask, and its cost as a share of clock 1's.

    Attributes:
        expected: Mean error that the model expects.
        errors: Measured error of each planning image against clock 1, float64 [N].
    """

    mask: Mask
    cost: float
    expected: float
    errors: Errors

    @property
    def error(self) -> float:
        """The mean of the measured errors."""
        return float(np.mean(self.errors))

    @property
    def uncertainty(self) -> float:
        """The standard error of that mean; 0 for one image."""
        return _standard_error(self.errors)

    def beats(self, other: "Point") -> bool:
        """Whether the error is less than another's by more than the standard error of the images' differences."""
        nearer = other.errors - self.errors
        return bool(np.mean(nearer) > _standard_error(nearer))

    def to_dict(self) -> dict[str, Any]:
        """The point as plain data; ``psnr_db`` is None where nothing differs."""
        return {
            "clock": format_mask(self.mask),
            "mask": [int(full) for full in self.mask],
            "cached_steps": cached_steps(self.mask),
            "cost": self.cost,
            "expected_error": self.expected,
            "expected_psnr_db": psnr_db(self.expected) if self.expected > 0 else None,
            "error": self.error,
            "error_uncertainty": self.uncertainty,
            "psnr_db": psnr_db(self.error) if self.error > 0 else None,
        }


@dataclass(frozen=True)
class Plan:
    """What was planned, and everything that was measured on the way.

    Attributes:
        budget: Share of clock 1's cost.
        cost: What a step costs, in the budget's unit.
        tied: The mask with the least measured error, where these images do not tell it from a uniform clock that then
            is chosen; else None.
        frontier: For each number of cached steps, from 0 up, the mask with the least measured error.
        uniform: The clocks that are a period, by period.
        measured: How many masks were measured.
    """

    bundle: Path
    manifest: Manifest
    images: Trajectories
    backend: str
    budget: float
    cost: StepCost
    chosen: Point
    tied: Point | None
    frontier: tuple[Point, ...]
    uniform: dict[int, Point]
    estimate: Estimate
    measured: int
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for plan.json and ``--json``."""
        return {
            "bundle": str(self.bundle),
            **search_of(self.images, self.backend, self.budget, self.cost.unit),
            "step_cost": {"full": self.cost.full, "cached": self.cost.cached},
            "chosen": self.chosen.to_dict(),
            "tied": None if self.tied is None else self.tied.to_dict(),
            "warnings": list(self.warnings),
            "frontier": [point.to_dict() for point in self.frontier],
            "uniform": {str(period): point.to_dict() for period, point in self.uniform.items()},
            "alone": self.estimate.alone.tolist(),
            "cross": self.estimate.cross.tolist(),
            "rows": {str(length): self.estimate.rows[length].tolist() for length in ROWS},
            "pairs_up_to": self.estimate.near,
            "masks_measured": self.measured,
        }


def search_of(images: Trajectories, backend: str, budget: float, unit: str) -> dict[str, Any]:
    """What a plan depends on, as plain data: the same bundle, embeddings and settings give the same."""
    manifest = images.manifest
    inputs = [manifest, images.conditioning]
    if images.edits is not None:
        inputs.append(images.edits.pictures)
    encoded = msgspec.json.encode(inputs, enc_hook=lambda array: np.asarray(array).tobytes(), order="sorted")
    return {
        "model": manifest.source.name,
        "scheduler": manifest.scheduler.name,
        "steps": images.steps,
        "guidance_scale": images.guidance_scale,
        "seed": images.seed,
        "num_images": images.num_images,
        **({} if images.edits is None else {"strength": images.edits.strength}),
        "backend": backend,
        "space": manifest.sample.space,
        "budget": budget,
        "in": unit,
        "inputs_sha256": hashlib.sha256(encoded).hexdigest(),
    }


def make_plan(
    bundle: str | Path,
    budget: float,
    unit: str = "flops",
    *,
    steps: int | None = None,
    num_images: int = NUM_IMAGES,
    guidance_scale: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    conditioning: dict[str, Any] | Sequence[str] | None = None,
    strength: float | None = None,
    pictures: Sequence[Any] | None = None,
    output: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Chooses a bundle's clock.

    Args:
        budget: Share of clock 1's cost; 1 and more leave clock 1.
        unit: ``flops``, the manifest's counts with attention matmuls, or ``latency``, measured on this machine.
        steps, guidance_scale: None takes the bundle's.
        seed: Of the first planning image; image i has seed + i.
        backend: None takes the one that `edgediff run` would.
        conditioning: For a model of text, prompts that the images take one after the other; or embeddings as
            `prompt_arguments` gives them, with a row for each or one for all; None takes those of the bundle's
            evidence.
        strength: Plans for edits at this strength: a clock of the steps that it leaves. None plans for pictures that
            are drawn from noise.
        pictures: What is edited, pictures of Pillow's that the images take one after the other; None has the bundle
            draw them, each of the next image's prompt or class.
        output: The folder for `write_plan`, checked before anything is measured; None checks nothing.
        force: Whether a plan of other settings in that folder may be replaced.

    Raises:
        ConfigError: The budget is out of range, or no clock meets it; there are more than 100 steps; or the bundle's
            own recipe cannot be read.
        RequestError: The request does not fit the bundle.
        BundleError: The bundle is damaged.
        TargetError: The output cannot be written, is in a bundle, or has a plan of other settings.
        MissingExtraError: There is an output, and matplotlib is not installed.
    """
    if output is not None:
        check_place(output, Path(bundle))
    say = progress if progress is not None else log.debug
    check_budget(budget, unit)
    say(f"opening {bundle}")
    opened = open_bundle(bundle)
    manifest, point = opened.manifest, opened.manifest.operating_point
    steps = point.num_inference_steps if steps is None else steps
    if isinstance(conditioning, str) or (conditioning is not None and not conditioning):
        raise ConfigError(f"conditioning is {conditioning!r}; expected a list of prompts, or embeddings")
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps is {steps}; a plan is made for 1 to {MAX_STEPS}")
    if pictures is not None and strength is None:
        raise ConfigError("pictures were given without a strength; give one, such as 0.6")
    sampler = sampler_of(manifest.scheduler.name)
    calls = sampler.calls(steps)
    start = 0 if strength is None else sampler.call_of(steps_left_out(strength, steps))
    cost = count_cost(opened.path)
    if unit == "flops":
        cost.fewest_cached(budget, calls - start)
    plan_recipe(manifest, (True,) * calls, guidance_scale)
    backend = usual_backend(opened) if backend is None else backend
    guidance_scale = point.guidance_scale if guidance_scale is None else guidance_scale
    own = conditioning is None
    if conditioning is None:
        text = manifest.conditioning.kind == "text"
        conditioning = prompt_arguments(load_reference(opened.file(REFERENCE)).conditioning) if text else {}
    pipe = open_pipeline(opened, backend)
    if not isinstance(conditioning, dict):
        conditioning = pipe.encode_prompt([*conditioning[: max(num_images, 1)]])
    images = Trajectories(manifest, pipe.session, steps, guidance_scale, seed, num_images, conditioning, say)
    if strength is not None:
        images = replace(images, edits=_edits(pipe, images, strength, pictures))
    if output is not None and not force:
        check_replaced(output, search_of(images, backend, budget, unit))
    if unit == "latency":
        cost = time_cost(images)
    plan = choose(opened.path, images, backend, budget, cost)
    warnings = caveats(manifest, plan.chosen.mask, images.guidance_scale, own_conditioning=own, start=images.start)
    return replace(plan, warnings=warnings)


def _edits(pipe: EdgePipeline, images: Trajectories, strength: float, pictures: Sequence[Any] | None) -> Edits:
    """What the images are edits of: pictures that are given, or what clock 1 draws of the next image's condition."""
    sample, each = pipe.manifest.sample, pipe.manifest.pixels_of_latent
    if pictures is not None:
        found = images_of(pictures, each * sample.height, each * sample.width)
    else:
        drawn = []
        for i in range(images.num_images):
            images.say(f"planning: drawing the picture to edit, {i + 1} of {images.num_images}")
            request = images.request(i + 1) | {"seed": images.seed + images.num_images + i}
            drawn.append(pipe(**request, clock=1).images[0])
        found = np.stack(drawn)
    encoder = None if sample.space == "pixel" else pipe.components.session(ENCODER)
    return Edits(strength, found, encoder)


def choose(bundle: Path, images: Trajectories, backend: str, budget: float, cost: StepCost) -> Plan:
    """Measures, and takes the best; a ConfigError where no mask meets the budget."""
    steps = images.calls
    wanted = cost.fewest_cached(budget, steps)
    tried = probes(steps)
    errors = images.errors(tried)
    estimate = Estimate.of({mask: float(np.mean(errors[mask])) for mask in tried}, steps)
    uniform = {period: clock_mask(period, steps) for period in range(1, steps + 1)}
    candidates = [*uniform.values()]
    for count, masks in estimate.best_masks(CANDIDATES).items():
        candidates += masks if count == wanted else masks[:CANDIDATES_EACH]
    if comb(steps - 1, wanted) <= MAX_ENUMERATED:
        candidates += masks_of(steps, wanted)
    errors |= images.errors(candidates)
    expected = dict(zip(errors, estimate.errors(list(errors)).tolist(), strict=True))
    points = {mask: Point(mask, cost.share(mask), expected[mask], errors[mask]) for mask in errors}

    rank = attrgetter("error", "cost")
    by_count: dict[int, list[Point]] = {}
    for point in points.values():
        by_count.setdefault(cached_steps(point.mask), []).append(point)
    least = min((point for point in points.values() if cost.fits(point.mask, budget)), key=rank)
    regular = min((points[mask] for mask in uniform.values() if cost.fits(mask, budget)), key=rank)
    chosen = least if least.beats(regular) else regular
    tied = None if chosen is least else least
    frontier = tuple(min(by_count[count], key=rank) for count in sorted(by_count))
    clocks = {period: points[mask] for period, mask in uniform.items()}
    manifest = images.manifest
    return Plan(bundle, manifest, images, backend, budget, cost, chosen, tied, frontier, clocks, estimate, len(points))


def caveats(
    manifest: Manifest, mask: Mask, guidance_scale: float, own_conditioning: bool = False, start: int = 0
) -> tuple[str, ...]:
    """What speaks against a plan by the paper or the adaptor's training, a line each.

    Distances in pixels to clock 1 are not quality: the paper's two failures were seen in FID. `own_conditioning`: it
    was planned with the bundle's embeddings. `start` is the first step that is run.
    """
    steps, found = len(mask), []
    if manifest.source.random_weights is not None:
        found.append("the bundle's weights are random: the plan's errors are of noise, its costs are right")
    if own_conditioning and manifest.evidence.conditioning == "synthetic":
        found.append("planned with random embeddings: the bundle has no others; give real ones (--conditioning)")
    if all(mask):
        return tuple(found)
    if manifest.scheduler.name == "ddim" and not start and steps <= DDIM_STEPS:
        found.append(
            f"DDIM at {steps} steps: the one sampler that the paper saw get worse with a clock (FID 34.72 to 38.38 at "
            "few steps); dpmpp_2m did not"
        )
    if any(not a and not b for a, b in pairwise(mask)):
        found.append(
            "cached steps in a row: of 8 steps with 4 cached, the paper saw FID 28.07 (cached 5 to 8) and 33.10 (3 to "
            "6) against 23.21 where they take turns with full ones"
        )
    other = departure(manifest, mask, (guidance_scale,) * steps, mask, start)
    if other is not None:
        found.append(f"{other}; train one for this plan")
    return tuple(found)


def _standard_error(values: Errors) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
