"""Training of a UNet on images, from the folder of images to the folder of a model.

What differs between teacher and student is made before: a UNet with a schedule, and what it learns from.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from edgediff.config.choices import Cut
from edgediff.data.batches import Batches, hash_of
from edgediff.data.draws import generator
from edgediff.data.image_folder import ImageSet
from edgediff.errors import TargetError
from edgediff.models.clockwork import split
from edgediff.models.load import Model
from edgediff.outputs import check_drawing
from edgediff.train.claim import Claim, claimed, is_done
from edgediff.train.dataset import batches_of, classes_of
from edgediff.train.distillation import Distillation
from edgediff.train.latents import decode, save_beside
from edgediff.train.learner import DDPM, FREQUENCY, SPATIAL, Learner, Noising, Teacher
from edgediff.train.loop import Loop, Say, Task, recent
from edgediff.train.samples import draw_samples, make_sampler, write_grid
from edgediff.train.settings import StudentTraining, UNetTraining
from edgediff.train.training_card import CARD, LOSSES, draw_losses, unet_card
from edgediff_runtime.errors import one_line
from edgediff_runtime.image import to_uint8

UNET = "unet"
PRODUCT = f"{UNET}/diffusion_pytorch_model.safetensors"
SAMPLES = "samples.png"
NUM_SAMPLES = 36
# What a held-out loss is measured on: at most so many images, each with the same noise every time.
HELD_OUT = 512
# Numbers that random draws are made under: an update's images and noise (0 is the order of the first pass over the
# images), and those of the held-out images, which no update has.
_FIRST_UPDATE = 1
_FIRST_HELD_OUT = 1 << 31


@dataclass(frozen=True)
class UNetTrained:
    """What became of a training.

    Attributes:
        loss: The denoising loss, mean over the last tenth of the updates.
        held_out: The denoising loss of the averaged weights on images that were not learnt from.
        images: How many were learnt from.
        skipped: Images that were left out, and why.
    """

    path: Path
    updates: int
    loss: float
    held_out: float
    images: int
    skipped: str

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self) | {"path": str(self.path)}


def train_unet(
    model: Model,
    data: tuple[ImageSet, ImageSet],
    path: Path,
    settings: UNetTraining,
    *,
    accelerator: Accelerator,
    teacher: Model | None = None,
    autoencoder: Callable[[], AutoencoderKL] | None = None,
    sources: dict[str, str],
    say: Say,
) -> UNetTrained | None:
    """Trains a UNet for `train_teacher` and `train_student`, which say what is raised.

    Args:
        model: What learns: its UNet has the weights that it begins with.
        data: What is learnt from, and what is held out.
        path: Where the model is to be.
        settings: What is asked for.
        accelerator: Where it runs.
        teacher: Whose features are learnt from.
        autoencoder: Makes the one whose latents the UNet works on; None works on pixels.
        sources: Hash of what else is learnt from, by what another one would be called.
        say: Told what is being done, and the share of it that is done.
    """
    check_drawing("drawing the loss curve")
    # A model that could not be sampled or divided afterwards is not trained.
    make_sampler(model)
    split(model.unet, Cut())
    images, held_out = data
    sources = {"other images": hash_of(images), "other held-out images": hash_of(held_out), **sources}
    claim = Claim(settings, sources, accelerator.num_processes, PRODUCT)
    if is_done(path, claim, accelerator):
        return None
    classes_of(model, images)
    learner, teaching = _learner(model, teacher, settings, accelerator)
    with claimed(path, claim, accelerator):
        vae = None if autoencoder is None else autoencoder()
        task = _UNetTask(accelerator, model, learner, teaching, data, vae, settings, path)
        loop = Loop(accelerator, task, path, settings.checkpoint_minutes)
        loop.run(say)
        if accelerator.is_main_process:
            loop.count_time()
            card = unet_card(model, teacher, settings, data, task.state, accelerator)
            try:
                _save(path, replace(model, unet=learner.unet), card, vae)
            except (SafetensorError, RuntimeError, OSError) as e:
                # torch and safetensors have their own errors for a full disk.
                raise TargetError(f"{path} cannot be written: {one_line(e)[:200]}; {loop.kept()}") from e
    return UNetTrained(
        path=path,
        updates=task.state.updates,
        loss=recent(task.state.terms[DDPM]),
        held_out=task.state.held_out[-1][1],
        images=len(images),
        skipped=images.skipped.in_words(),
    )


def _learner(
    model: Model, teacher: Model | None, settings: UNetTraining, accelerator: Accelerator
) -> tuple[Learner, Teacher | None]:
    unet = model.unet.requires_grad_(True).train().to(accelerator.device)
    if teacher is None or not isinstance(settings, StudentTraining) or not settings.distils:
        return Learner(unet), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        distillation = Distillation(teacher.unet, unet, settings.points, settings.alpha)
    theirs = teacher.unet.to(accelerator.device)
    return Learner(unet, distillation.to(accelerator.device)), Teacher(theirs, settings.points)


class _UNetTask(Task):
    """A visit is one update; now and then a held-out loss and a grid of samples are taken."""

    advice = "start again"

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        learner: Learner,
        teacher: Teacher | None,
        images: tuple[ImageSet, ImageSet],
        vae: AutoencoderKL | None,
        settings: UNetTraining,
        path: Path,
    ) -> None:
        optimizer = torch.optim.AdamW(
            learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        super().__init__(learner, optimizer, learner.unet, settings, settings.updates)
        self.ema, self.schedule, self.warmup, self.clip = (
            settings.ema, settings.schedule, settings.warmup, settings.clip,
        )  # fmt: skip
        self.weights = {DDPM: 1.0}
        if isinstance(settings, StudentTraining):
            self.weights |= {SPATIAL: settings.spatial, FREQUENCY: settings.frequency}
        self.accelerator = accelerator
        self.model = model
        self.learner = learner
        self.teacher = teacher
        self.vae = vae
        self.path = path
        self.data, self.held_out = (batches_of(each, model, vae, settings) for each in images)
        self.noising = Noising(model.scheduler, accelerator.device)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        number = batch * self.accelerator.num_processes + self.accelerator.process_index
        size = self.settings.batch
        given = self.draw(self.data, number * size, size, number + _FIRST_UPDATE)
        if self.teacher is not None:
            given["teacher"] = self.teacher.features(given["x_t"], given["t"], given["cond"])
        terms: dict[str, torch.Tensor] = model(**given)
        return terms

    def draw(self, data: Batches, first: int, size: int, number: int, learning: bool = True) -> dict[str, Any]:
        """Images, noise and time steps, under a number; unless it is learnt from them, none is changed."""
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
            null_label = self.model.conditioning.null_label
            if learning and null_label is not None:
                labels = torch.where(drop, null_label, labels)
            cond["class_labels"] = labels.to(device)
        x_t, target = self.noising.noised(x_0, noise, t)
        return {"x_0": x_0, "x_t": x_t, "t": t, "target": target, "cond": cond}

    def after_visit(self, loop: Loop) -> None:
        every = self.settings.sample_every
        if every is not None and self.state.updates % every == 0:
            self._look(loop)

    def after_all(self, loop: Loop) -> None:
        if not self.state.held_out or self.state.held_out[-1][0] != self.state.updates:
            self._look(loop)

    def _look(self, loop: Loop) -> None:
        """Takes the held-out loss and a sample grid of the averaged weights; the main process alone."""
        held_out = math.nan
        if self.accelerator.is_main_process:
            try:
                with loop.averaged():
                    held_out = self._held_out_loss()
                    model = replace(self.model, unet=self.learner.unet)
                    samples = draw_samples(model, NUM_SAMPLES, at_once=self.settings.batch)
                images = to_uint8(samples) if self.vae is None else decode(self.vae, torch.tensor(samples))
                write_grid(images, self.path / SAMPLES)
                self._draw_curves((*self.state.held_out, (self.state.updates, held_out)))
            except OSError as e:
                raise TargetError(f"{self.path} cannot be written: {one_line(e)[:200]}; {loop.kept()}") from e
        # On every process: whether one looks at the end again is decided by it.
        self.state.held_out.append((self.state.updates, held_out))
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        data, at_once = self.held_out, self.settings.batch
        count = min(data.count, HELD_OUT)
        loss = 0.0
        for first in range(0, count, at_once):
            size = min(at_once, count - first)
            given = self.draw(data, first, size, _FIRST_HELD_OUT + first, learning=False)
            loss += size * float(self.learner(**given)[DDPM])
        return loss / count

    def _draw_curves(self, held_out: Sequence[tuple[int, float]]) -> None:
        names = {DDPM: "denoising", SPATIAL: "spatial", FREQUENCY: "frequency"}
        draw_losses(
            {names[name]: losses for name, losses in self.state.terms.items()},
            self.path / LOSSES,
            f"{self.model.name}: {self.data.count} images, batch {self.settings.batch}",
            "terms of the loss",
            points=("denoising, held out", held_out),
        )


def _save(path: Path, model: Model, card: str, vae: AutoencoderKL | None) -> None:
    """Writes the model as diffusers does; the weights come last, and whole."""
    assert model.scheduler is not None
    model.scheduler.save_pretrained(path / "scheduler")
    if model.labels:
        names = json.dumps(model.labels, ensure_ascii=False, indent=1)
        (path / "classes.json").write_text(f"{names}\n", encoding="utf-8")
    if vae is not None:
        save_beside(vae, path, model)
    (path / CARD).write_text(card, encoding="utf-8")
    partial = path / f"{UNET}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.unet.save_pretrained(partial)
    shutil.rmtree(path / UNET, ignore_errors=True)
    os.replace(partial, path / UNET)
