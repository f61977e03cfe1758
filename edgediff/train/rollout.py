"""Rollouts: trajectories with the target's sampler, steps, clock and guidance, from pure noise or of edits.

No images are needed: labels or prompts are all there is to draw (Clockwork Diffusion, section 3.3), and what edits
begin with the model draws itself. All random draws follow from the seed, the round and the process.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgediff.data.arrays import PROMPTS, load_arrays, read_prompts
from edgediff.errors import ConfigError
from edgediff.models.clockwork import SplitUNet
from edgediff.models.graphs import graph_list
from edgediff.models.load import Model
from edgediff.models.sampling import scheduler_config
from edgediff.models.torch_session import TorchSession
from edgediff.train.settings import AdaptorTraining, check_clock
from edgediff.train.text import STATES, Text, encode, text_of
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.clock import clock_mask, remaining_clock
from edgediff_runtime.editing import steps_left_out
from edgediff_runtime.errors import RequestError
from edgediff_runtime.loop import Request, denoise, initial_latents
from edgediff_runtime.manifest import TrainedFor
from edgediff_runtime.schedulers import make_scheduler, sampler_of

TARGET = "target"
# Far from the small seeds that users take, so that nobody looks at what was trained on.
FIRST_SEED = 2**52
# Between the seed of a picture and that of the noise that an edit of it adds.
EDITS_APART = 2**51
_ENCODED_AT_ONCE = 256

Samples = dict[str, torch.Tensor]
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Prompts:
    """What trajectories are conditioned on: `count` prompts or classes.

    Attributes:
        cond: Conditional rows by name, [count, ...]; empty where the model has no condition.
        uncond: Unconditional rows by name, [1, ...]; empty where there is no guidance.
    """

    cond: Rows
    uncond: Rows
    count: int

    @classmethod
    def of(cls, model: Model, guided: bool, path: str | None) -> "Prompts":
        """Collects what a model is conditioned on; of one with text, from the file of prompts or embeddings at `path`.

        Raises:
            ConfigError: The file is missing, not needed, empty, lacks a tensor or has one of another shape; or there is
                no unconditional class to guide with.
            ModelError: The prompts need a text encoder, which the model does not have.
        """
        known = model.conditioning
        if known.kind != "text":
            if path is not None:
                raise ConfigError(f"conditioning {path} was given, but the model is not conditioned on text")
            if guided and known.null_label is None:
                raise ConfigError("guidance_scale above 1 needs a null class, which this model does not have; give 1")
            if known.kind == "none":
                return cls({}, {}, 1)
            labels = np.arange(len(known.labels), dtype=np.int64)
            uncond = {"class_labels": np.array([known.null_label])} if guided else {}
            return cls({"class_labels": labels}, uncond, len(labels))
        if path is None:
            raise ConfigError(
                "the model is conditioned on text; pass prompts, one a line, or their embeddings: --conditioning FILE"
            )
        if Path(path).suffix == PROMPTS:
            return cls.encoded(text_of(model, learns=False), read_prompts(path), guided)
        arrays = load_arrays(path)
        rows: tuple[Rows, Rows] = ({}, {})
        for found, prefix in zip(rows, ("", "negative_") if guided else ("",), strict=False):
            for name, spec in known.tensors.items():
                key = f"{prefix}{name}"
                if key not in arrays and prefix and name in ("time_ids", "class_labels"):
                    key = name
                array = arrays.get(key, np.empty(0, dtype="V1"))
                if array.shape[1:] != spec.shape or len(array) == 0 or array.dtype.kind not in "biuf":
                    what = f"{array.dtype.name} {list(array.shape)}" if key in arrays else "missing"
                    expected = ", ".join(str(size) for size in spec.shape)
                    raise ConfigError(f"conditioning {path}: {key} is {what}; expected [P, {expected}]")
                found[name] = array.astype(str(spec.dtype).removeprefix("torch."))
        count = len(rows[0]["encoder_hidden_states"])
        for name, array in rows[0].items():
            if len(array) not in (1, count):
                raise ConfigError(f"conditioning {path}: {name} has {len(array)} rows for {count} prompts")
        return cls(*rows, count)

    @classmethod
    @torch.no_grad()
    def encoded(cls, text: Text, prompts: Sequence[str], guided: bool) -> "Prompts":
        """Prompts, and the empty one to guide with, as a text encoder gives them."""
        device = text.encoder.device
        ids = torch.split(text.tokenize([*prompts, ""])[0], _ENCODED_AT_ONCE)
        states = torch.cat([encode(text.encoder, each.to(device)).cpu() for each in ids]).numpy()
        return cls({STATES: states[:-1]}, {STATES: states[-1:]} if guided else {}, len(prompts))

    def take(self, chosen: np.ndarray) -> tuple[Rows, Rows]:
        """Conditional and unconditional rows, [N, ...], of prompts by their numbers modulo `count`, int64 [N]."""
        cond = {name: rows[chosen % self.count % len(rows)] for name, rows in self.cond.items()}
        return cond, {name: np.repeat(rows[:1], len(chosen), axis=0) for name, rows in self.uncond.items()}

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Rows, Rows]:
        """Draws `count` prompts: conditional and unconditional rows, [count, ...]."""
        return self.take(rng.integers(self.count, size=count))


def conditioning_sources(model: Model, conditioning: str | None) -> dict[str, str]:
    """Hashes, as `Claim` has them, of a file of prompts or embeddings and of the text encoder that prompts need.

    Raises:
        ConfigError: There is no such file.
        ModelError: The prompts need a text encoder, which the model does not have.
    """
    if conditioning is None:
        return {}
    file = Path(conditioning)
    if not file.is_file():
        raise ConfigError(f"conditioning {file}: no such file")
    is_prompts = file.suffix == PROMPTS
    sources = {f"other {'prompts' if is_prompts else 'embeddings'} in {file}": sha256_of(file)}
    if is_prompts and model.conditioning.kind == "text":
        sources["another text encoder"] = text_of(model, learns=False).digest()
    return sources


def final_latents(request: Request, session: TorchSession) -> np.ndarray:
    """What the last step of a generation gives, float32 [N, C, H, W]."""
    latents: np.ndarray = deque(denoise(request, session), maxlen=1).pop().latents
    return latents


class Rollouts:
    """Draws trajectories, and takes from them what an adaptor learns from."""

    def __init__(self, model: Model, split: SplitUNet, settings: AdaptorTraining) -> None:
        """Takes a model, and the same divided, with the adaptor that learns, on its device.

        Raises:
            ConfigError: The conditioning does not fit the model.
            UnsupportedError: The sampler is not supported.
        """
        self.settings, self.split = settings, split
        self.shape = model.sample_shape
        given = settings.guidance_scale
        self.guidance = model.usual_guidance if given is None else given
        self.steps = model.usual_steps if settings.steps is None else settings.steps
        self.sampler = model.usual_sampler if settings.scheduler is None else settings.scheduler
        self.mask = check_clock(settings.clock, self.steps, self.sampler)
        self.scheduler = make_scheduler(scheduler_config(model.scheduler, self.sampler), self.steps)
        self.starts = [0, *(self._start(strength) for strength in settings.strengths)]
        self.prompts = Prompts.of(model, self.guidance > 1, settings.conditioning)
        self.session = TorchSession(split.parts, graph_list(split, model))
        self._graphs = {graph.name: graph for graph in self.session.graphs}
        self.names = tuple(dict.fromkeys(split.adaptor.inputs))
        if settings.output_weight:
            self.names = tuple(dict.fromkeys((*self.names, *split.highres_out.inputs, "out_sample")))

    @property
    def trained_for(self) -> TrainedFor:
        """The operating point."""
        return TrainedFor(
            num_inference_steps=self.steps,
            scheduler=self.sampler,
            clock=self.settings.clock,
            mask=tuple(int(full) for full in self.mask),
            guidance_scale=self.guidance,
        )

    def _start(self, strength: float) -> int:
        """The first call of edits at a strength; a ConfigError where no cached step comes after it."""
        try:
            start = sampler_of(self.sampler).call_of(steps_left_out(strength, self.steps))
        except RequestError as e:
            raise ConfigError(f"'strengths': {e}") from e
        if all(self._mask(start)):
            raise ConfigError(
                f"'strengths' has {strength:g}: of {self.steps} steps it leaves no cached one; expected more"
            )
        return start

    def _mask(self, start: int) -> tuple[bool, ...]:
        """Which calls are full, an entry for each of the sampler's, in a generation that begins at one of them."""
        clock = clock_mask(remaining_clock(self.settings.clock, start), self.steps, self.sampler, start)
        return (True,) * start + clock

    def _latents(self, seed: int, start: int, rng: np.random.Generator) -> np.ndarray:
        """What trajectories begin with: noise; for a later step pictures of other prompts with that step's noise."""
        pure = initial_latents(seed, self.settings.images, self.shape, self.scheduler.init_noise_sigma)
        if not start:
            return pure
        cond, uncond = self.prompts.draw(rng, self.settings.images)
        clock = (True,) * len(self.mask)
        drawn = self.request(self.session, clock=clock, latents=pure, cond=cond, uncond=uncond, seed=seed)
        fresh = initial_latents(seed + EDITS_APART, self.settings.images, self.shape, 1.0)
        begun: np.ndarray = self.scheduler.add_noise(start, final_latents(drawn, self.session), fresh)
        return begun

    def request(self, session: TorchSession, **rest: Any) -> Request:
        """A generation at the operating point; `rest` is clock, latents, prompts and seed of a `Request`."""
        guidance = (self.guidance,) * len(self.mask)
        return Request(graphs=session.graphs, scheduler=self.scheduler, guidance=guidance, **rest)

    def draw(self, index: int) -> Samples:
        """Draws the trajectories of a round in a process, by the number of the two.

        Returns:
            Tensors by name, [samples, ...], a sample being a row of a cached step: the adaptor's inputs and ``target``;
            with a loss on the output also what highres_out takes and the full step's ``out_sample``.
        """
        settings = self.settings
        rng = np.random.default_rng([settings.seed, index])
        cond, uncond = self.prompts.draw(rng, settings.images)
        seed = FIRST_SEED + (settings.seed << 20) + index
        teacher = settings.rollout == "teacher"
        start = self.starts[index % len(self.starts)]
        mask = self._mask(start)
        request = self.request(
            self.session,
            clock=tuple(full or teacher for full in mask),
            latents=self._latents(seed, start, rng),
            cond=cond,
            uncond=uncond,
            seed=seed,
            start=start,
        )
        found: dict[str, list[torch.Tensor]] = {name: [] for name in (*self.names, TARGET)}
        for step in denoise(request, self.session):
            if mask[step.index]:
                continue
            tensors = dict(step.tensors[0])
            if not teacher:  # what a full step would have made of the student's own sample
                self.session.run(self._graphs["lowres"], tensors)
                if settings.output_weight:
                    self.session.run(self._graphs["highres_out"], tensors)
            rows = len(tensors["sample"])
            given = {name: tensors[name] for name in self.names if name != "lowres_feature"}
            for name, value in {**given, TARGET: tensors["lowres_feature"]}.items():
                found[name].append(value.expand(rows) if name == "timestep" else value)
        # In memory as a store gives them back: sums of what lies otherwise differ in the last bit.
        return {name: torch.cat(values).contiguous() for name, values in found.items() if values}
