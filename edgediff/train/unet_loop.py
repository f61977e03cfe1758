"""The loop that trains a UNet on images: updates, checkpoints, samples.

Everything drawn follows from the seed, the update and the process, so that a training that was killed goes on as if it
had not been.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray

from edgediff.data.batches import Batches
from edgediff.data.draws import generator, mixed
from edgediff.errors import TargetError, TrainingError
from edgediff.models.load import Model, one_line
from edgediff.train.checkpoint import Checkpoints
from edgediff.train.curve import draw_losses
from edgediff.train.learner import DDPM, FREQUENCY, SPATIAL, Learner, Teacher
from edgediff.train.noising import Noising
from edgediff.train.progress import Progress, Say, recent
from edgediff.train.samples import take_samples, write_grid
from edgediff.train.unet_settings import UNetTraining

LOSSES = "loss.png"
SAMPLES = "samples.png"
NUM_SAMPLES = 36
# What a held-out loss is measured on: at most so many images, each with the same noise every time.
HELD_OUT = 512
# Numbers that chance is drawn under: of an update's images and noise, and of its dropout.
_FIRST_UPDATE = 1
_DROPOUT = 1 << 30


@dataclass
class UNetProgress(Progress):
    """How far a training of a UNet has come.

    Attributes:
        terms: The loss's terms of each update, by name, without their lambdas.
        held_out: Update and held-out loss, now and then.
    """

    terms: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Task:
    """What a loop trains.

    Attributes:
        model: The model that the training makes; its UNet is what learns.
        learner: The UNet with its aligners.
        teacher: Whose features are learnt from, or None.
        weights: What each term of the loss counts.
        data: What is learnt from.
        held_out: What is not.
        null_label: The class that stands for none, or None.
        decode: From samples float32 [N, C, H, W] to uint8 images [N, H', W', 3].
    """

    model: Model
    learner: Learner
    teacher: Teacher | None
    weights: dict[str, float]
    data: Batches
    held_out: Batches
    null_label: int | None
    decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]]


class UNetLoop:
    """Updates, checkpoints and samples.

    Attributes:
        state: How far it has come.
        ema: The averaged weights of the UNet.
    """

    def __init__(self, accelerator: Accelerator, task: Task, settings: UNetTraining, path: Path) -> None:
        """Prepares optimizer and checkpoints.

        Args:
            accelerator: Where it runs.
            task: What is trained.
            settings: How.
            path: The training's folder.
        """
        self.accelerator = accelerator
        self.task = task
        self.settings = settings
        self.path = path
        self.noising = Noising(task.model.scheduler, accelerator.device)
        optimizer = torch.optim.AdamW(
            task.learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.unet = task.learner.unet
        self.model, self.optimizer = accelerator.prepare(task.learner, optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=settings.ema)
        self.state = UNetProgress()
        self.checkpoints = Checkpoints(path, accelerator, self.ema, self.state, settings.checkpoint_minutes)

    def run(self, say: Say) -> None:
        """Runs what is left of the training, and leaves the averaged weights in the UNet.

        Args:
            say: Told what is being done, and the share of it that is done.

        Raises:
            TargetError: The disk is full; the last good checkpoint is kept.
            TrainingError: The loss is not finite; likewise.
        """
        device = self.accelerator.device
        # Dropout draws from torch's own source of chance: it is seeded for every update, and given back as it was.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._run(say)

    def _run(self, say: Say) -> None:
        settings, state = self.settings, self.state
        self.checkpoints.load()
        self.model.train()
        while state.updates < settings.updates:
            self._update()
            done = state.updates / settings.updates
            say(f"update {state.updates} of {settings.updates}: loss {recent(state.losses):.4f}", done)
            if settings.sample_every is not None and state.updates % settings.sample_every == 0:
                self._look()
            self.checkpoints.save_when_due()
        self.checkpoints.save()
        if not state.held_out or state.held_out[-1][0] != state.updates:
            self._look()
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()

    def _update(self) -> None:
        settings, state, accelerator = self.settings, self.state, self.accelerator
        number = state.updates * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(mixed(settings.seed, _DROPOUT + number))
        share = self._rate(state.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        batch = self._batch(self.task.data, number * settings.batch, settings.batch, number + _FIRST_UPDATE)
        with accelerator.autocast():
            if self.task.teacher is not None:
                batch["teacher"] = self.task.teacher.features(batch["x_t"], batch["t"], batch["cond"])
            terms = self.model(**batch)
            loss = sum(self.task.weights[name] * term for name, term in terms.items())
        names = list(terms)
        shown = torch.stack([loss.detach(), *(terms[name].detach().float() for name in names)])
        total, *values = accelerator.reduce(shown, reduction="mean").tolist()
        self._hold_finite(total, "loss")
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
        self._hold_finite(float(norm), "gradient")
        self.optimizer.step()
        self.ema.step(self.unet.parameters())
        state.updates += 1
        state.visits = state.updates
        state.losses.append(total)
        for name, value in zip(names, values, strict=True):
            state.terms.setdefault(name, []).append(value)

    def _hold_finite(self, number: float, what: str) -> None:
        if not math.isfinite(number):
            raise TrainingError(
                f"the {what} is not finite at update {self.state.updates}; {self.checkpoints.kept()}; begin anew with "
                f"a lower learning_rate than {self.settings.learning_rate:g}"
            )

    def _rate(self, update: int) -> float:
        """The learning rate's share of its highest."""
        settings = self.settings
        warmup = min(settings.warmup, settings.updates)
        if update < warmup:
            return (update + 1) / warmup
        if settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, settings.updates - warmup)))

    def _batch(self, data: Batches, first: int, size: int, number: int, learning: bool = True) -> dict[str, Any]:
        """Images, noise and time steps of one update in one process."""
        settings, device = self.settings, self.accelerator.device
        rng = generator(settings.seed, number)
        flips = torch.rand(size, generator=rng) < 0.5 if settings.flip and learning else None
        x_0, labels = data.take(first, size, flips)
        t = torch.randint(0, self.noising.steps, (size,), generator=rng)
        drop = torch.rand(size, generator=rng) < settings.label_dropout
        noise = torch.randn(x_0.shape, generator=rng)
        x_0, t, noise = x_0.to(device), t.to(device), noise.to(device)
        cond = {}
        if labels is not None:
            if learning and self.task.null_label is not None:
                labels = torch.where(drop, self.task.null_label, labels)
            cond["class_labels"] = labels.to(device)
        x_t, target = self.noising.noised(x_0, noise, t)
        return {"x_0": x_0, "x_t": x_t, "t": t, "target": target, "cond": cond}

    def _look(self) -> None:
        """Takes the held-out loss and a sample grid of the averaged weights; the main process alone."""
        held_out = math.nan
        if self.accelerator.is_main_process:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
            self.unet.eval()
            try:
                held_out = self._held_out()
                self._write_samples()
                self.draw((*self.state.held_out, (self.state.updates, held_out)))
            except OSError as e:
                raise TargetError(
                    f"{self.path} cannot be written: {one_line(e)[:200]}; {self.checkpoints.kept()}"
                ) from e
            finally:
                self.ema.restore(self.unet.parameters())
                self.unet.train()
        # On every process: whether one looks at the end again is decided by it.
        self.state.held_out.append((self.state.updates, held_out))
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _held_out(self) -> float:
        data, at_once = self.task.held_out, self.settings.batch
        count = min(data.count, HELD_OUT)
        losses = []
        for first in range(0, count, at_once):
            size = min(at_once, count - first)
            # Numbers that no update has.
            batch = self._batch(data, first, size, (1 << 31) + first, learning=False)
            losses.append(size * float(self.task.learner(**batch)[DDPM]))
        return sum(losses) / count

    def _write_samples(self) -> None:
        model = replace(self.task.model, unet=self.unet)
        write_grid(self.task.decode(take_samples(model, NUM_SAMPLES, self.settings.batch)), self.path / SAMPLES)

    def draw(self, held_out: Sequence[tuple[int, float]]) -> None:
        """Draws the loss's curves.

        Args:
            held_out: Update and held-out loss, now and then.
        """
        names = {DDPM: "denoising", SPATIAL: "spatial", FREQUENCY: "frequency"}
        curves = {names[name]: losses for name, losses in self.state.terms.items()}
        draw_losses(
            curves,
            self.path / LOSSES,
            f"{self.task.model.name}: {self.task.data.count} images, batch {self.settings.batch}",
            "terms of the loss",
            points=("denoising, held out", held_out),
        )
