"""Training of a UNet on images, from the folder of images to the folder of a model.

What differs between teacher and student is made before: a UNet with a schedule, and what it learns from.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from edgediff.config.choices import Cut
from edgediff.data.batches import hash_of
from edgediff.data.image_folder import ImageSet
from edgediff.errors import TargetError
from edgediff.models.clockwork import split
from edgediff.models.load import Model, one_line
from edgediff.outputs import check_drawing
from edgediff.train.claim import Claim, check_place, claim_place, clear_place, is_finished
from edgediff.train.dataset import batches_of, classes_of
from edgediff.train.distillation import Distillation
from edgediff.train.learner import DDPM, FREQUENCY, SPATIAL, Learner, Teacher
from edgediff.train.progress import Say, recent, silent
from edgediff.train.samples import as_pixels, make_sampler
from edgediff.train.space import LatentSpace
from edgediff.train.unet_card import unet_card
from edgediff.train.unet_loop import Task, UNetLoop
from edgediff.train.unet_settings import FREE, StudentTraining, UNetTraining

UNET = "unet"
PRODUCT = f"{UNET}/diffusion_pytorch_model.safetensors"
CARD = "README.md"


@dataclass(frozen=True)
class UNetTrained:
    """What became of a training.

    Attributes:
        path: The model's folder.
        updates: How many there were.
        loss: The denoising loss, mean over the last tenth of the updates.
        held_out: The denoising loss of the averaged weights on images that were not learnt from.
        images: Images learnt from.
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
    space: Callable[[], LatentSpace] | None = None,
    sources: dict[str, str] | None = None,
    progress: Say | None = None,
) -> UNetTrained | None:
    """Trains a UNet, or goes on where an interrupted training of the same settings stopped.

    Args:
        model: What learns: its UNet has the weights that it begins with.
        data: What is learnt from, and what is held out.
        path: Where the model is to be.
        settings: How.
        accelerator: Where it runs.
        teacher: Whose features are learnt from.
        space: Makes the latent space in which the UNet works; None works on pixels.
        sources: Hash of what else is learnt from, by what another one would be called.
        progress: Told what is being done, and the share of it that is done.

    Returns:
        What became of it; None where the model is there already.

    Raises:
        ConfigError: Model, teacher and images do not fit together.
        DataError: The images' classes do not fit the model.
        TargetError: Something else is in the folder, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
        UnsupportedError: The model cannot be sampled, or cannot be cut.
    """
    check_drawing("drawing the loss curve")
    # What could not be sampled or divided afterwards is not trained.
    make_sampler(model)
    split(model.unet, Cut())
    images, held_out = data
    claim = Claim(
        settings=settings,
        sources={"other images": hash_of(images), "other held-out images": hash_of(held_out), **(sources or {})},
        processes=accelerator.num_processes,
        product=PRODUCT,
        free=FREE,
        free_after=FREE,
    )
    check_place(path, claim)
    finished = is_finished(path, claim)
    classes_of(model, images)
    learner, teaching = _learner(model, teacher, settings, accelerator)
    accelerator.wait_for_everyone()
    if finished:
        _clear(path, accelerator)
        return None
    if accelerator.is_main_process:
        claim_place(path, claim)
    accelerator.wait_for_everyone()
    made = None if space is None else space()
    weights = {DDPM: 1.0}
    if isinstance(settings, StudentTraining):
        weights |= {SPATIAL: settings.spatial, FREQUENCY: settings.frequency}
    task = Task(
        model=model,
        learner=learner,
        teacher=teaching,
        weights=weights,
        data=batches_of(images, model, made, settings),
        held_out=batches_of(held_out, model, made, settings),
        null_label=model.conditioning.null_label,
        decode=as_pixels if made is None else made.decode,
    )
    loop = UNetLoop(accelerator, task, settings, path)
    loop.run(progress if progress is not None and accelerator.is_main_process else silent)
    state = loop.state
    if accelerator.is_main_process:
        loop.checkpoints.count_time()
        card = unet_card(model, teacher, settings, data, state, accelerator)
        try:
            _save(path, replace(model, unet=loop.unet), card, made)
        except (SafetensorError, RuntimeError, OSError) as e:
            # torch and safetensors have errors of their own for a full disk.
            raise TargetError(f"{path} cannot be written: {one_line(e)[:200]}; {loop.checkpoints.kept()}") from e
    _clear(path, accelerator)
    return UNetTrained(
        path=path,
        updates=state.updates,
        loss=recent(state.terms[DDPM]),
        held_out=state.held_out[-1][1] if state.held_out else math.nan,
        images=len(images),
        skipped=images.skipped.in_words(),
    )


def _clear(path: Path, accelerator: Accelerator) -> None:
    """Removes what a finished training no longer needs."""
    if accelerator.is_main_process:
        clear_place(path)
    accelerator.wait_for_everyone()


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


def _save(path: Path, model: Model, card: str, space: LatentSpace | None) -> None:
    """Writes the model as diffusers does; the weights come last, and whole."""
    assert model.scheduler is not None
    model.scheduler.save_pretrained(path / "scheduler")
    if model.labels:
        names = json.dumps(model.labels, ensure_ascii=False, indent=1)
        (path / "classes.json").write_text(f"{names}\n", encoding="utf-8")
    if space is not None:
        space.save(path, model)
    (path / CARD).write_text(card, encoding="utf-8")
    partial = path / f"{UNET}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.unet.save_pretrained(partial)
    shutil.rmtree(path / UNET, ignore_errors=True)
    os.replace(partial, path / UNET)
