"""What caching does to the image, measured along real trajectories: every mask against clock 1 on the same noise.

Planning image i is what ``edgediff run --num-images 1`` makes of seed + i and of class i mod their number, so that a
figure here can be looked at as a picture. One image at a time, as a phone makes them.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import ConfigError
from edgediff.plan.replay import ReplaySession
from edgediff_runtime import EdgePipeline, Manifest, OperatingPointWarning, Result, Step
from edgediff_runtime.clock import ClockSpec
from edgediff_runtime.sessions import Session

Mask = tuple[bool, ...]
Errors = NDArray[np.float64]


def spell(mask: Iterable[bool]) -> str:
    """A mask as options and recipes take it.

    Args:
        mask: One entry for each step, True = full.

    Returns:
        Such as ``1,0,1,0``.

    >>> spell((True, False, True))
    '1,0,1'
    """
    return ",".join("1" if full else "0" for full in mask)


def psnr_db(error: float) -> float:
    """A mean squared error as PSNR, the peak being 1: an image's range, or the deviation of the reference's latents.

    Args:
        error: Above 0, or 0.

    Returns:
        dB; infinity for 0.

    >>> psnr_db(0.001)
    30.0
    """
    return math.inf if error <= 0 else 10 * math.log10(1 / error)


@dataclass
class Trajectories:
    """The planning images: each is made by clock 1 and by as many other clocks as are asked for.

    Attributes:
        manifest: The bundle's manifest.
        session: What runs its graphs.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is off.
        seed: Of the first image; image i has seed + i.
        num_images: How many images.
        conditioning: Arguments of `EdgePipeline.stream` for a model of text: embeddings with one row for all images, or
            rows that the images take one after the other.
        say: Told what is being done.
    """

    manifest: Manifest
    session: Session
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda what: None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ConfigError(f"num_images is {self.num_images}; expected a whole number above 0")
        self._replay = ReplaySession(self.session)
        self._pipe = EdgePipeline(self.manifest, self._replay)
        self._references: dict[int, NDArray[Any]] = {}
        self._errors: dict[Mask, Errors] = {}
        for image in (0, self.num_images - 1):
            self._pipe.stream(**self.request(image), clock=1)  # whatever does not fit is said now; nothing runs

    def request(self, image: int) -> dict[str, Any]:
        """What makes an image, but for the clock.

        Args:
            image: Its number.

        Returns:
            Arguments of `EdgePipeline.stream`.
        """
        request: dict[str, Any] = {
            "num_images": 1,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed + image,
        }
        if self.manifest.conditioning.kind == "class":
            request["label"] = image % len(self.manifest.conditioning.labels)
        return request | {name: _row(value, image) for name, value in self.conditioning.items()}

    def errors(self, masks: Iterable[Mask]) -> dict[Mask, Errors]:
        """Measures masks; those that were measured before are not run again.

        Args:
            masks: One entry for each step, True = full.

        Returns:
            For each mask the error of every image, float64 [N].
        """
        masks = list(dict.fromkeys(masks))
        # In this order each mask has the most in common with the one before it.
        new = sorted((mask for mask in masks if mask not in self._errors), reverse=True)
        found = np.zeros((len(new), self.num_images))
        for image in range(self.num_images if new else 0):
            self.say(f"planning: image {image + 1} of {self.num_images}, {len(new)} masks of {self.steps} steps")
            self._reference(image)
            for k, mask in enumerate(new):
                found[k, image], _ = self.error(image, mask)
        self._errors |= dict(zip(new, found, strict=True))
        return {mask: self._errors[mask] for mask in masks}

    def error(self, image: int, clock: ClockSpec) -> tuple[float, tuple[Step, ...]]:
        """Measures one image.

        Args:
            image: Its number.
            clock: Any clock that the runtime takes.

        Returns:
            How far the image is from clock 1's: the mean squared difference, in pixel space of the uint8 images scaled
            to [0, 1], in latent space of the latents over the variance of clock 1's. And the steps as they were run.
        """
        reference = self._reference(image)
        result = self._run(image, clock)
        difference = np.mean((_final(result).astype(np.float64) - reference) ** 2)
        scale = 255.0**2 if result.space == "pixel" else max(float(np.var(reference)), 1e-12)
        return float(difference) / scale, result.ledger

    def _reference(self, image: int) -> NDArray[Any]:
        if image not in self._references:
            self._references[image] = _final(self._run(image, 1)).astype(np.float64)
        return self._references[image]

    def _run(self, image: int, clock: ClockSpec) -> Result:
        self._replay.begin(self.seed + image)
        with warnings.catch_warnings():
            # An adaptor was trained for one clock, and the others are what is measured here.
            warnings.simplefilter("ignore", OperatingPointWarning)
            return self._pipe(**self.request(image), clock=clock)


def _final(result: Result) -> NDArray[Any]:
    return result.images if result.space == "pixel" else result.latents


def _row(value: Any, image: int) -> Any:
    """An image's row of embeddings, or of each of several."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _row(inner, image) for name, inner in value.items()}
    rows = np.asarray(value)
    return rows[image % len(rows)][None] if rows.ndim else rows
