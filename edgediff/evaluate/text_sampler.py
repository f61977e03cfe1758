"""What draws pictures of prompts: a bundle in a backend, at any clock, or a diffusers pipeline in torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.errors import ConfigError, UnsupportedError
from edgediff.evaluate.sampler import TORCH, Mask, check_source_kind
from edgediff.models.load import Model, load_model
from edgediff.models.sampling import scheduler_config
from edgediff.models.torch_pipeline import TorchPipeline
from edgediff.targets.backends import open_pipeline, usual_backend
from edgediff_runtime import EdgePipeline, clock_mask, make_scheduler, noise, open_bundle
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.schedulers import SchedulerConfig


@dataclass(frozen=True, eq=False)
class TextSampler:
    """Draws pictures of prompts; `steps`, `guidance_scale` and `clocks` are used where nothing else is asked for.

    Attributes:
        size: Height and width of the pictures, which are square, in pixels.
    """

    name: str
    backend: str
    scheduler: SchedulerConfig
    size: int
    steps: int
    guidance_scale: float
    clocks: tuple[str, ...]
    pipe: EdgePipeline | TorchPipeline

    @property
    def kind(self) -> str:
        """``bundle`` or ``model``, for messages."""
        return "bundle" if isinstance(self.pipe, EdgePipeline) else "model"

    def check(self, clock: str, steps: int, guidance_scale: float, seed: int) -> Mask:
        """Refuses what does not fit, before anything is drawn; returns the clock's mask, True = full.

        Raises:
            ConfigError: Of a model: the guidance is out of range, or the clock skips steps.
            RequestError: The clock, the number of steps or the seed is out of range, or does not fit the bundle.
        """
        mask = clock_mask(clock, steps, self.scheduler.name)
        if isinstance(self.pipe, EdgePipeline):
            self.pipe.stream(
                prompt="", num_inference_steps=steps, clock=clock, guidance_scale=guidance_scale, seed=seed
            )
            return mask
        if not all(mask):
            raise ConfigError(f"clock {clock}: a model is sampled with every step full; export it to compare clocks")
        make_scheduler(self.scheduler, steps)
        noise(seed, (1,))
        if not math.isfinite(guidance_scale) or not 0 <= guidance_scale <= MAX_GUIDANCE:
            raise ConfigError(f"guidance_scale is {guidance_scale!r}; expected a finite number from 0")
        return mask

    def draw(
        self, prompts: Sequence[str], first: int, *, clock: str, steps: int, guidance_scale: float, seed: int
    ) -> NDArray[np.uint8]:
        """Draws images `first` and those after it, one for each prompt, uint8 [N, H, W, 3]; after `check`.

        Raises:
            ConfigError: They need more memory than there is.
            NotFiniteError: The model's output is not finite.
            RequestError: A prompt cannot be encoded.
        """
        asked: dict[str, Any] = {"first_image": first, "num_inference_steps": steps, "seed": seed}
        asked["guidance_scale"] = guidance_scale
        try:
            if isinstance(self.pipe, TorchPipeline):
                return self.pipe(prompts, **asked)
            drawn: NDArray[np.uint8] = self.pipe(prompt=list(prompts), emphasis=False, clock=clock, **asked).images
            return drawn
        except (MemoryError, torch.OutOfMemoryError) as e:
            raise ConfigError(
                f"batch of {len(prompts)} images: too many for the memory of {self.backend}; give a smaller --batch"
            ) from e


def open_text_sampler(
    source: str | Path, *, backend: str | None, scheduler: str | None, device: torch.device
) -> TextSampler:
    """A sampler of a bundle or of a diffusers pipeline; `backend` is for the first, `scheduler` for the second.

    Raises:
        BundleError, ModelError: It cannot be read.
        ConfigError: An option is for a source of the other kind.
        UnsupportedError: It takes no prompt, or makes no pictures.
    """
    if check_source_kind(source, backend, scheduler) == "bundle":
        return _bundle(Path(source), backend)
    return _model(load_model(source), scheduler, device)


def _bundle(path: Path, backend: str | None) -> TextSampler:
    opened = open_bundle(path)
    manifest = opened.manifest
    _check_condition(f"{path}", manifest.conditioning.kind)
    backend = usual_backend(opened) if backend is None else backend
    pipe = open_pipeline(opened, backend)
    for there, what in ((pipe.can_encode, "text encoder"), (pipe.can_decode, "decoder")):
        if not there:
            raise UnsupportedError(f"{path}: the bundle has no {what} for {backend}; export the whole pipeline again")
    sample, each, point = manifest.sample, manifest.pixels_of_latent, manifest.operating_point
    return TextSampler(
        name=manifest.source.name,
        backend=backend,
        scheduler=manifest.scheduler,
        size=_side(f"{path}", each * sample.height, each * sample.width),
        steps=point.num_inference_steps,
        guidance_scale=point.guidance_scale,
        clocks=tuple(dict.fromkeys(("1", str(point.clock)))),
        pipe=pipe,
    )


def _model(model: Model, scheduler: str | None, device: torch.device) -> TextSampler:
    _check_condition(model.name, model.conditioning.kind)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights, which draws nothing; give a trained model")
    model.check_schedule()
    config = scheduler_config(model.scheduler, model.usual_sampler if scheduler is None else scheduler)
    pipe = TorchPipeline(model, config, device)
    return TextSampler(
        name=model.name,
        backend=TORCH,
        scheduler=config,
        size=_side(model.name, *pipe.size),
        steps=model.usual_steps,
        guidance_scale=model.usual_guidance,
        clocks=("1",),
        pipe=pipe,
    )


def _side(name: str, height: int, width: int) -> int:
    if height != width:
        raise UnsupportedError(f"{name} makes {width}x{height} (width x height); expected square pictures")
    return height


def _check_condition(name: str, kind: str) -> None:
    if kind != "text":
        what = {"class": "classes", "none": "nothing"}[kind]
        raise UnsupportedError(f"{name} is conditioned on {what}; expected text (evaluate distance takes others)")
