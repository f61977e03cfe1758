"""What caching does to the image, measured along real trajectories: every mask against clock 1 on the same noise.

Planning image i is what ``edgediff run --num-images 1`` makes of seed + i and of class i mod their number, so that a
figure here can be looked at as a picture. One image at a time, as a phone makes them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import ConfigError
from edgediff_runtime import EdgePipeline, Manifest
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.editing import steps_left_out
from edgediff_runtime.manifest import Graph
from edgediff_runtime.pipeline import ENCODER
from edgediff_runtime.schedulers import sampler_of
from edgediff_runtime.sessions import Array, Session

Mask = tuple[bool, ...]
Errors = NDArray[np.float64]


def psnr_db(error: float) -> float:
    """A mean squared error as PSNR in dB, the peak being 1: an image's range, or the deviation of latents.

    >>> psnr_db(0.001), psnr_db(0)
    (30.0, inf)
    """
    return math.inf if error <= 0 else 10 * math.log10(1 / error)


class ReplaySession:
    """A session that runs a graph only from where a generation first differs from the one before it.

    Two generations from the same request (but for the clock) are the same as long as they run the same graphs in the
    same order: a mask that caches step 5 alone does until then what clock 1 does. Masks in the order of `sorted` share
    the most; the tensors of one generation stay in memory. One generation at a time.

    `runs` counts the graphs that were run, and not taken from before.
    """

    def __init__(self, session: Session) -> None:
        self.graphs = session.graphs
        self.batch = session.batch
        self.put, self.get = session.put, session.get
        self.runs = 0
        self._session = session
        self._calls: list[tuple[Graph, dict[str, Any]]] = []
        self._request: object = None
        self._at = 0
        self._alike = False

    def begin(self, request: object) -> None:
        """Begins a generation; one whose `request` equals the last differs from it by its clock alone."""
        if request != self._request:
            self._calls.clear()
        self._request, self._at, self._alike = request, 0, True

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph, or puts what it gave in the last generation among the tensors."""
        self._alike = self._alike and self._at < len(self._calls) and self._calls[self._at][0] is graph
        if self._alike:
            tensors.update(self._calls[self._at][1])
        else:
            del self._calls[self._at :]
            self._session.run(graph, tensors)
            self.runs += 1
            self._calls.append((graph, {tensor.name: tensors[tensor.name] for tensor in graph.outputs}))
        self._at += 1


@dataclass(frozen=True)
class Edits:
    """What planning images are edits of.

    Attributes:
        strength: Share of the steps that run.
        pictures: uint8 [N, h, w, 3], which the images take one after the other.
        encoder: The session of the bundle's ``vae_encoder``; None for a model of pixels.
    """

    strength: float
    pictures: Array
    encoder: Session | None

    def request(self, image: int) -> dict[str, Any]:
        """Arguments of `EdgePipeline.stream` for a planning image."""
        return {"image": self.pictures[image % len(self.pictures)], "strength": self.strength}


@dataclass
class Trajectories:
    """The planning images: each is made by clock 1 and by as many other clocks as are asked for.

    Attributes:
        calls: Calls of the UNet that are run of so many steps: entries of a mask.
        start: The first of them; above 0 in edits.
        seed: Of the first image; image i has seed + i.
        conditioning: Arguments of `EdgePipeline.stream` for a model of text: embeddings with one row for all images, or
            rows that the images take one after the other.
        edits: What the images are edits of; None draws them from noise.
    """

    manifest: Manifest
    session: Session
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda what: None
    edits: Edits | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ConfigError(f"num_images is {self.num_images}; expected a whole number above 0")
        sampler = sampler_of(self.manifest.scheduler.name)
        self.start = 0 if self.edits is None else sampler.call_of(steps_left_out(self.edits.strength, self.steps))
        self.calls = sampler.calls(self.steps) - self.start
        self._replay = ReplaySession(self.session)
        # An adaptor was trained for one clock, and the others are what is measured here.
        sessions: dict[str, Session] = {UNET: self._replay}
        if self.edits is not None and self.edits.encoder is not None:
            sessions[ENCODER] = self.edits.encoder
        self._pipe = EdgePipeline(self.manifest, Components.of(sessions), warn=False)
        self._references: dict[int, Array] = {}
        self._errors: dict[Mask, Errors] = {}
        for image in (0, self.num_images - 1):
            self._pipe.stream(**self.request(image), clock=1)  # refuses what does not fit; nothing runs

    def request(self, image: int) -> dict[str, Any]:
        """Arguments of `EdgePipeline.stream` that make an image, but for the clock."""
        request: dict[str, Any] = {
            "num_images": 1,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed + image,
        }
        if self.manifest.conditioning.kind == "class":
            request["label"] = image % len(self.manifest.conditioning.labels)
        if self.edits is not None:
            request |= self.edits.request(image)
        return request | {name: _row(value, image) for name, value in self.conditioning.items()}

    def errors(self, masks: Iterable[Mask]) -> dict[Mask, Errors]:
        """How far every image of each mask is from clock 1's, float64 [N]; a mask is measured once.

        The mean squared difference, in pixel space of the uint8 images scaled to [0, 1], in latent space of the latents
        over the variance of clock 1's.
        """
        masks = list(dict.fromkeys(masks))
        # In this order each mask has the most in common with the one before it.
        new = sorted((mask for mask in masks if mask not in self._errors), reverse=True)
        found = np.zeros((len(new), self.num_images))
        for image in range(self.num_images if new else 0):
            self.say(f"planning: image {image + 1} of {self.num_images}, {len(new)} masks of {self.calls} steps")
            if image not in self._references:
                self._references[image] = self._run(image, (True,) * self.calls)
            reference = self._references[image]
            scale = 255.0**2 if self._in_pixels else max(float(np.var(reference)), 1e-12)
            for k, mask in enumerate(new):
                found[k, image] = np.mean((self._run(image, mask) - reference) ** 2) / scale
        self._errors |= dict(zip(new, found, strict=True))
        return {mask: self._errors[mask] for mask in masks}

    @property
    def _in_pixels(self) -> bool:
        return self.manifest.sample.space == "pixel"

    def _run(self, image: int, mask: Mask) -> Array:
        """What a clock makes of an image, as float64."""
        self._replay.begin(self.seed + image)
        result = self._pipe(**self.request(image), clock=mask)
        return (result.images if self._in_pixels else result.latents).astype(np.float64)


def _row(value: Any, image: int) -> Any:
    """An image's row of embeddings, or of each of several."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _row(inner, image) for name, inner in value.items()}
    rows = np.asarray(value)
    return rows[image % len(rows)][None] if rows.ndim else rows
