"""Distillation to a few steps without guidance, with an adaptor that is trained beside the UNet.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) halves the steps again and again; here one stage goes
from the teacher's trajectory to the few steps. A step of DDIM is linear in the sample and in what the UNet predicts, so
there is one prediction with which the step from a point of the trajectory ends at the point where the teacher is after
its own several steps: that is what the UNet learns. The teacher's guidance is within its trajectory (Meng et al. 2022,
arXiv 2210.03142), so that the result needs none and runs one row for an image, not two.

An adaptor that is trained for the UNet before it fits no UNet after it. With a clock, both learn together: on cached
steps the adaptor takes the place of the low-resolution part, and the same prediction is asked of it (Clockwork
Diffusion, section 3.3, asks for the feature instead, which moves while the UNet learns).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import nn
from torch.nn import functional as F

from edgediff.data.batches import generator
from edgediff.errors import ConfigError
from edgediff.models.adaptors import LearnedAdaptor
from edgediff.models.card import LICENSE_FILES
from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.graphs import graph_list
from edgediff.models.load import Model, load_model
from edgediff.models.sampling import diffusers_scheduler, scheduler_config
from edgediff.models.torch_session import TorchSession
from edgediff.models.trained import FOLDER as ADAPTORS
from edgediff.models.trained import save_adaptor
from edgediff.models.undivided import undivided_session
from edgediff.outputs import check_drawing, write_whole
from edgediff.train.adaptor import new_adaptor, record_of
from edgediff.train.claim import Claim, writing
from edgediff.train.gain import Nearness, psnr_of
from edgediff.train.latents import autoencoder_of, hash_of_autoencoder
from edgediff.train.learner import check_pair
from edgediff.train.loop import Loop, Say, Task, begin, recent
from edgediff.train.rollout import FIRST_SEED, Prompts, conditioning_sources, final_latents
from edgediff.train.settings import FewStepsTraining, check_training, mask_of
from edgediff.train.store import Store, Tensors
from edgediff.train.student import check_components
from edgediff.train.training_card import CARD, LOSSES, draw_losses, few_steps_card
from edgediff.train.unet import UNET, save_parts
from edgediff_runtime.loop import CACHE, Request, denoise, initial_latents
from edgediff_runtime.manifest import TrainedFor
from edgediff_runtime.schedulers import Scheduler, make_scheduler

FULL, CACHED = "full", "cached"
SAMPLER = "ddim"
POINTS, PROMPT = "points", "prompt"
# Measured on seeds that are not learnt from.
_MEASURED, _SEED = 32, 1


@dataclass(frozen=True)
class FewStepsTrained:
    """The result of a training; `loss` is the full steps', a mean over the last tenth of the updates."""

    path: Path
    updates: int
    loss: float
    nearness: Nearness


def train_few_steps(
    path: str | Path, settings: FewStepsTraining, *, progress: Say | None = None
) -> FewStepsTrained | None:
    """Distils a model to a few steps in the folder `path`, or resumes an interrupted training of the same settings.

    The result is a directory as the model's, with other weights of the UNet, DDIM's scheduler and, with a clock, the
    adaptor in ``adaptors/``.

    Returns:
        None where it is there already.

    Raises:
        ConfigError: The settings, the model and its teacher do not fit together.
        ModelError: One of them cannot be loaded, or has no weights or no scheduler.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
        UnsupportedError: The model cannot be divided, or no such adaptor fits.
    """
    settings = check_training(settings)
    if settings.model is None:
        raise ConfigError("no model: name a diffusers directory or a built-in model, 'model' in the settings")
    path = Path(path)
    accelerator, say = begin(path, progress, settings.precision)
    check_drawing("drawing the loss curve")
    model = load_model(settings.model)
    teacher = load_model(settings.model if settings.teacher is None else settings.teacher)
    for each in (model, teacher):
        if not each.has_weights:
            raise ConfigError(f"{each.name} is a geometry without weights: there is nothing to learn from")
        each.check_schedule()
    if model.single is not None or not (model.home / UNET).is_dir():
        raise ConfigError(
            f"{model.path} is not the directory of a model with a folder {UNET}: save it as diffusers does"
        )
    check_pair(teacher, model)
    sources = {"another model": model.sha256, "another teacher": teacher.sha256}
    sources |= conditioning_sources(teacher, settings.conditioning)
    vae, _ = autoencoder_of(teacher)
    if vae is not None:
        sources["another autoencoder"] = hash_of_autoencoder(vae)
    check_components(teacher, model, sources)
    claim = Claim(path, CARD, settings, sources, accelerator)
    if claim.is_done():
        return None
    teacher.unet.to(accelerator.device)
    trajectories = TeacherTrajectories(teacher, settings)
    learner = _learner(model, trajectories.mask, settings).to(accelerator.device)
    with claim.locked():
        say("measuring the model before it learns", 0.0)
        nearness = _Measure(model, trajectories)
        before = nearness.of(split(model.unet, settings.cut), trajectories.guidance)
        task = _FewStepsTask(accelerator, learner, trajectories, path)
        loop = Loop(task, path)
        loop.run(say)
        say("measuring unseen seeds", 1.0)
        cached = nearness.of(learner.divided, 1.0, trajectories.mask) if learner.learns_adaptor else None
        near = Nearness(before, nearness.of(learner.divided, 1.0), cached, _MEASURED)
        if accelerator.is_main_process:
            loop.count_time()
            draw_losses(
                task.state.terms,
                path / LOSSES,
                f"{model.name}: {settings.steps} steps instead of {settings.from_steps}, clock {settings.clock}",
                "squared error of the prediction",
            )
            with writing(path, loop.kept()):
                _save(path, model, teacher, learner, trajectories, near, task, accelerator)
    accelerator.end_training()
    return FewStepsTrained(path, task.state.updates, recent(task.state.terms[FULL]), near)


class TeacherTrajectories:
    """The teacher's trajectories at the time steps of the few steps: from noise, with its sampler and guidance."""

    def __init__(self, teacher: Model, settings: FewStepsTraining) -> None:
        """Takes a teacher with its UNet on its device.

        Raises:
            ConfigError: The conditioning does not fit, or the teacher's steps do not pass the few ones.
            UnsupportedError: The sampler is not supported.
        """
        self.settings, self.teacher = settings, teacher
        self.sampler = sampler = teacher.usual_sampler if settings.scheduler is None else settings.scheduler
        config = scheduler_config(teacher.scheduler, sampler)
        if config.draws_noise:
            raise ConfigError(f"{sampler} draws noise in its steps; expected 'scheduler' ddim or dpmpp_2m")
        self.scheduler = make_scheduler(
            msgspec.structs.replace(config, timestep_spacing="trailing"), settings.from_steps
        )
        if self.scheduler.init_noise_sigma != 1:
            raise ConfigError(
                f"the teacher's samples are of another scale in {sampler}; expected 'scheduler' ddim or dpmpp_2m"
            )
        self.few = few_steps_of(teacher, settings.steps)
        theirs = [float(t) for t in self.scheduler.timesteps]
        missing = [float(t) for t in self.few.timesteps if float(t) not in theirs]
        if missing or len(theirs) != settings.from_steps:
            raise ConfigError(
                f"{settings.from_steps} steps of {sampler} have the time steps {', '.join(f'{t:g}' for t in theirs)}, "
                f"which are not those of {settings.steps} steps ({', '.join(f'{t:g}' for t in self.few.timesteps)}): "
                "expected 'scheduler' ddim or dpmpp_2m"
            )
        self.places = [theirs.index(float(t)) for t in self.few.timesteps]
        self.mask = mask_of(settings.clock, settings.steps, SAMPLER)
        given = settings.guidance_scale
        self.guidance = teacher.usual_guidance if given is None else given
        self.prompts = Prompts.of(teacher, self.guidance > 1, settings.conditioning)
        self.session = undivided_session(teacher, 2 * settings.images)

    def draw(self, index: int) -> Tensors:
        """Draws the trajectories of a round in a process, by the number of the two.

        Returns:
            ``points`` [images, steps + 1, C, H, W], the samples before each of the few steps and the final ones, and
            ``prompt``, int64 [images], their prompts' numbers.
        """
        rng = np.random.default_rng([self.settings.seed, index])
        chosen = rng.integers(self.prompts.count, size=self.settings.images)
        seed = FIRST_SEED + (self.settings.seed << 20) + index
        return {POINTS: torch.from_numpy(self.walk(chosen, seed)), PROMPT: torch.from_numpy(chosen)}

    def walk(self, chosen: np.ndarray, seed: int) -> np.ndarray:
        """The teacher's samples before each of the few steps, and the final ones, of these prompts."""
        cond, uncond = self.prompts.take(chosen)
        latents = initial_latents(seed, len(chosen), self.teacher.sample_shape, self.scheduler.init_noise_sigma)
        steps = len(self.scheduler.timesteps)
        request = Request(
            graphs=self.session.graphs,
            scheduler=self.scheduler,
            clock=(True,) * steps,
            guidance=(self.guidance,) * steps,
            latents=latents,
            cond=cond,
            uncond=uncond,
            seed=seed,
        )
        passed = [latents, *(step.latents for step in denoise(request, self.session))]
        return np.stack([passed[place] for place in (*self.places, steps)], axis=1).astype(np.float32)


def few_steps_of(model: Model, steps: int) -> Scheduler:
    """DDIM in a few steps with trailing spacing, which begins at pure noise, for the model's noise schedule."""
    return make_scheduler(scheduler_config(ddim_of(model), SAMPLER), steps)


def ddim_of(model: Model) -> DDIMScheduler:
    """Makes diffusers' DDIM for a model's noise schedule, with trailing spacing and without clipping."""
    config = dict(diffusers_scheduler(model.scheduler, SAMPLER).config)
    changes = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
    made: DDIMScheduler = DDIMScheduler.from_config(config, **changes)  # what is passed by name is not overruled
    return made


def linear_step(scheduler: Scheduler, index: int) -> tuple[float, float]:
    """A and B of a step that is ``x_next = A x + B out``: DDIM's, without clipping."""
    one, zero = np.ones((1, 1, 1, 1), dtype=np.float32), np.zeros((1, 1, 1, 1), dtype=np.float32)
    of_x, of_out = (scheduler.step(index, x, out, None, None, True)[0].item() for x, out in ((one, zero), (zero, one)))
    return float(of_x), float(of_out)


class FewStepsLearner(nn.Module):
    """The divided UNet with its adaptor, and the terms of the loss."""

    coefficients: torch.Tensor
    timesteps: torch.Tensor

    def __init__(self, divided: SplitUNet, scheduler: Scheduler, mask: tuple[bool, ...]) -> None:
        super().__init__()
        self.divided, self.mask = divided, mask
        self.learns_adaptor = not all(mask)
        coefficients = torch.tensor([linear_step(scheduler, i) for i in range(len(mask))], dtype=torch.float32)
        self.register_buffer("coefficients", coefficients, persistent=False)
        self.register_buffer("timesteps", torch.from_numpy(np.array(scheduler.timesteps)), persistent=False)

    def forward(self, points: torch.Tensor, cond: Tensors) -> Tensors:
        """The terms of the loss, ``full`` and ``cached``, scalars, of trajectories [B, steps + 1, C, H, W].

        `cond` is the conditioning by name, [B, ...].
        """
        count, steps = len(points), len(self.mask)
        of_x, of_out = (each.reshape(1, steps, 1, 1, 1) for each in self.coefficients.unbind(1))
        target = (points[:, 1:] - of_x * points[:, :-1]) / of_out
        parts = self.divided.parts
        tensors = {name: rows.repeat_interleave(steps, dim=0) for name, rows in cond.items()}
        tensors |= {"sample": points[:, :-1].flatten(0, 1), "timestep": self.timesteps.repeat(count)}
        for name in ("highres_in", "lowres", "highres_out"):
            tensors |= parts[name].run(tensors)
        by_step = {name: value.reshape(count, steps, *value.shape[1:]) for name, value in tensors.items()}
        made = by_step["out_sample"].float()
        terms = {FULL: F.mse_loss(made, target)}
        if self.learns_adaptor:
            errors, cache = [], by_step["lowres_feature"][:, 0]
            for i, full in enumerate(self.mask):
                here = {name: value[:, i] for name, value in by_step.items()}
                if not full:
                    for name in ("adaptor", "highres_out"):
                        here |= parts[name].run({**here, CACHE: cache})
                    errors.append(F.mse_loss(here["out_sample"].float(), target[:, i]))
                cache = here["lowres_feature"]
            terms[CACHED] = torch.stack(errors).mean()
        return terms


def _learner(model: Model, mask: tuple[bool, ...], settings: FewStepsTraining) -> FewStepsLearner:
    adaptor = None if all(mask) else new_adaptor(model, settings)
    divided = split(model.unet.requires_grad_(True).train(), settings.cut, adaptor)
    return FewStepsLearner(divided, few_steps_of(model, settings.steps), mask)


class _FewStepsTask(Task):
    """A visit is a pass over a round of trajectories."""

    def __init__(
        self, accelerator: Accelerator, learner: FewStepsLearner, trajectories: TeacherTrajectories, path: Path
    ) -> None:
        settings = trajectories.settings
        optimizer = torch.optim.AdamW(
            learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        super().__init__(accelerator, settings, learner, optimizer, learner, settings.rounds * settings.passes)
        self.weights = {FULL: 1.0, CACHED: 1.0}
        self.trajectories = trajectories
        self.round: Tensors = {}
        advice = "raise it, or ask for fewer rounds or images"
        self.store = Store(path, accelerator, settings.rounds, "rounds", settings.store_gb, advice)

    def batches(self, visit: int) -> Sequence[torch.Tensor]:
        """Rows of a round, in a seeded order; a pass goes through all rounds."""
        settings, index = self.settings, visit % self.settings.rounds
        self.round = self.store.get(index, lambda: self.trajectories.draw(self.number(index)), torch.device("cpu"))
        order = torch.randperm(settings.images, generator=generator(settings.seed, visit))
        return torch.split(order, settings.batch)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        cond, _ = self.trajectories.prompts.take(self.round[PROMPT][batch].numpy())
        given = {name: torch.from_numpy(rows).to(self.device) for name, rows in cond.items()}
        terms: dict[str, torch.Tensor] = model(self.round[POINTS][batch].to(self.device), given)
        return terms


class _Measure:
    """PSNR in dB of final samples in the few steps against the teacher's, on unseen seeds."""

    def __init__(self, model: Model, trajectories: TeacherTrajectories) -> None:
        self._model, self._trajectories = model, trajectories
        chosen = np.random.default_rng(_SEED).integers(trajectories.prompts.count, size=_MEASURED)
        at_once = min(trajectories.settings.images, _MEASURED)  # more may not fit
        self._parts = [(chosen[first : first + at_once], _SEED + first) for first in range(0, _MEASURED, at_once)]
        self._reference = np.concatenate([trajectories.walk(*part)[:, -1] for part in self._parts])

    @torch.no_grad()
    def of(self, divided: SplitUNet, guidance: float, mask: tuple[bool, ...] | None = None) -> float:
        """Of a divided UNet with a guidance and a clock; None is clock 1."""
        divided.eval()
        trajectories, model = self._trajectories, self._model
        session = TorchSession(divided.parts, graph_list(divided, model))
        steps = len(trajectories.mask)
        made = []
        for chosen, seed in self._parts:
            cond, uncond = trajectories.prompts.take(chosen)
            request = Request(
                graphs=session.graphs,
                scheduler=trajectories.few,
                clock=(True,) * steps if mask is None else mask,
                guidance=(guidance,) * steps,
                latents=initial_latents(seed, len(chosen), model.sample_shape, trajectories.few.init_noise_sigma),
                cond=cond,
                uncond=uncond if guidance > 1 else {},
                seed=seed,
            )
            made.append(final_latents(request, session))
        return psnr_of(self._reference, np.concatenate(made), model.space)


def _save(
    path: Path,
    model: Model,
    teacher: Model,
    learner: FewStepsLearner,
    trajectories: TeacherTrajectories,
    nearness: Nearness,
    task: Task,
    accelerator: Accelerator,
) -> None:
    """Writes the model's directory with what is new in it; the card comes last, by which it is known to be whole."""
    settings = trajectories.settings
    index = model.home / "model_index.json"
    if index.is_file():
        said = json.loads(index.read_text(encoding="utf-8"))
        said["scheduler"] = ["diffusers", DDIMScheduler.__name__]
        (path / index.name).write_text(f"{json.dumps(said, indent=1)}\n", encoding="utf-8")
        for name, value in said.items():
            has_part = isinstance(value, list) and value[0] is not None and (model.home / name).is_dir()
            if has_part and name not in (UNET, "scheduler"):
                shutil.copytree(model.home / name, path / name, dirs_exist_ok=True)
    for name in ("classes.json", *LICENSE_FILES):
        if (model.home / name).is_file():
            shutil.copy(model.home / name, path / name)
    save_parts(path, {"scheduler": ddim_of(model), UNET: model.unet.requires_grad_(False).eval()})
    if learner.learns_adaptor:
        _save_adaptor(path, learner, trajectories)
    sampler, guidance = trajectories.sampler, trajectories.guidance
    card = few_steps_card(model, teacher, settings, sampler, guidance, nearness, task.state, accelerator)
    write_whole(path / CARD, lambda scratch: scratch.write_text(card, encoding="utf-8"))


def _save_adaptor(path: Path, learner: FewStepsLearner, trajectories: TeacherTrajectories) -> None:
    """Writes the adaptor for the model that lies in the folder by now."""
    settings, adaptor = trajectories.settings, learner.divided.adaptor
    assert isinstance(adaptor, LearnedAdaptor)
    point = TrainedFor(
        num_inference_steps=settings.steps,
        scheduler=SAMPLER,
        clock=settings.clock,
        mask=tuple(int(full) for full in trajectories.mask),
        guidance_scale=1.0,
    )
    record = record_of(load_model(path), settings, point, "teacher")
    save_adaptor(adaptor, record, path / ADAPTORS / f"{settings.adaptor}-clock-{settings.clock}")
