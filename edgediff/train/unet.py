"""Training of a UNet on images, from the folder of images to the folder of a model.

What differs between teacher and student is made before: a UNet with a schedule, and what it learns from.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from edgediff.config.choices import Cut
from edgediff.data.batches import TOKENS, Batches, generator, hash_of
from edgediff.data.image_folder import ImageSet
from edgediff.models.clip_tokenizer import save_tokenizer
from edgediff.models.clockwork import split
from edgediff.models.load import Model
from edgediff.outputs import check_drawing
from edgediff.train.claim import Claim, writing
from edgediff.train.dataset import batches_of, classes_of
from edgediff.train.distillation import Distillation, predict_with_features
from edgediff.train.latents import FOLDER, WEIGHTS_FILE, Autoencoder, decode, write_autoencoder
from edgediff.train.learner import DDPM, FREQUENCY, SPATIAL, Learner, Noising
from edgediff.train.loop import Loop, MeasuredTask, Say, recent
from edgediff.train.rollout import Prompts
from edgediff.train.samples import draw_samples, make_sampler, write_grid
from edgediff.train.settings import StudentTraining, UNetTraining
from edgediff.train.store import Store, Tensors
from edgediff.train.text import ENCODER, STATES, TOKENIZER, Text, encode, no_bars
from edgediff.train.training_card import CARD, LOSSES, draw_losses, unet_card
from edgediff_runtime.image import to_uint8

UNET = "unet"
PRODUCT = f"{UNET}/{WEIGHTS_FILE}"
SAMPLES = "samples.png"
NUM_SAMPLES = 36
_TERMS = {DDPM: "denoising", SPATIAL: "spatial", FREQUENCY: "frequency"}
# The held-out loss is measured on at most this many images, each with the same noise every time.
HELD_OUT = 512
# Numbers of random draws: an update's images and noise (0 is the order of the first pass over the images), and those of
# the held-out images, which no update has.
_FIRST_UPDATE = 1
_FIRST_HELD_OUT = 1 << 31


@dataclass(frozen=True)
class UNetTrained:
    """The result of a training.

    Attributes:
        loss: The denoising loss, mean over the last tenth of the updates.
        held_out: The denoising loss of the averaged weights on held-out images.
        images: How many were learnt from.
        skipped: Images that were left out, and why.
        cut: Captions that were longer than the text encoder takes, and were cut.
    """

    path: Path
    updates: int
    loss: float
    held_out: float
    images: int
    skipped: str
    cut: int = 0


def train_unet(
    model: Model,
    data: tuple[ImageSet, ImageSet],
    path: Path,
    settings: UNetTraining,
    *,
    accelerator: Accelerator,
    teacher: Model | None = None,
    autoencoder: Callable[[], Autoencoder] | None = None,
    text: Text | None = None,
    sources: dict[str, str],
    say: Say,
) -> UNetTrained | None:
    """Trains a UNet for `train_teacher` and `train_student`, which list the errors.

    Args:
        model: Its UNet has the weights to begin with, and is trained in place.
        data: What is learnt from, and what is held out.
        teacher: Whose features are learnt from.
        autoencoder: Makes the one whose latents the UNet works on; None works on pixels.
        text: What encodes captions, of a model that is conditioned on text.
        sources: As `Claim` has them, without those of the images.
    """
    check_drawing("drawing the loss curve")
    # A model that could not be sampled or divided afterwards is not trained.
    make_sampler(model)
    if text is None:
        Prompts.of(model, _guidance_of(model, settings) > 1, None)
    split(model.unet, Cut())
    images, held_out = data
    sources = {"other images": hash_of(images), "other held-out images": hash_of(held_out), **sources}
    claim = Claim(path, PRODUCT, settings, sources, accelerator)
    if claim.is_done():
        return None
    classes_of(model, images)
    learner = _learner(model, teacher, text, settings, accelerator.device)
    with claim.locked():
        vae = None if autoencoder is None else autoencoder()
        task = _UNetTask(accelerator, model, learner, teacher, text, data, vae, settings, path, say)
        loop = Loop(task, path)
        loop.run(say)
        if accelerator.is_main_process:
            loop.count_time()
            card = unet_card(model, teacher, text, settings, data, task.state, accelerator)
            with writing(path, loop.kept()):
                _save(path, model, card, vae, text)
    return UNetTrained(
        path=path,
        updates=task.state.updates,
        loss=recent(task.state.terms[DDPM]),
        held_out=task.state.held_out[-1][1],
        images=len(images),
        skipped=images.skipped.in_words(),
        cut=task.cut,
    )


def _guidance_of(model: Model, settings: UNetTraining) -> float:
    """What sample grids are drawn with."""
    return model.usual_guidance if settings.guidance_scale is None else settings.guidance_scale


def _learner(
    model: Model, teacher: Model | None, text: Text | None, settings: UNetTraining, device: torch.device
) -> Learner:
    unet = model.unet.requires_grad_(True).train().to(device)
    if text is not None:
        text.encoder.requires_grad_(text.learns).to(device)
        if text.learns:
            return Learner(unet, text_encoder=text.encoder)
    if teacher is None or not isinstance(settings, StudentTraining) or not settings.distils:
        return Learner(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        distillation = Distillation(teacher.unet, unet, settings.points, settings.alpha)
    teacher.unet.to(device)
    return Learner(unet, distillation.to(device))


class _UNetTask(MeasuredTask):
    """A visit is one update; now and then a held-out loss and a grid of samples are taken."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        learner: Learner,
        teacher: Model | None,
        text: Text | None,
        images: tuple[ImageSet, ImageSet],
        vae: Autoencoder | None,
        settings: UNetTraining,
        path: Path,
        say: Say,
    ) -> None:
        optimizer = torch.optim.AdamW(
            learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        averaged = learner.unet if learner.text_encoder is None else learner
        super().__init__(accelerator, settings, learner, optimizer, averaged, settings.updates)
        self.weights = {DDPM: 1.0}
        if isinstance(settings, StudentTraining):
            self.weights |= {SPATIAL: settings.spatial, FREQUENCY: settings.frequency}
        self.model, self.learner, self.teacher, self.vae = model, learner, teacher, vae
        self.path, self.text = path, text
        self.data, self.held_out = (batches_of(each, model, vae, text, settings, say) for each in images)
        self.cut = 0 if self.data.wordings is None else self.data.wordings.cut
        self.prompts = _prompts_of(images[0])
        self.draws, self.store = settings.updates, None
        if isinstance(settings, StudentTraining) and settings.draws is not None:
            self.draws = min(settings.draws, settings.updates)
            if settings.distils:
                self.store = Store(path, accelerator, self.draws, "draws")
        self.noising = Noising(model.scheduler, self.device)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        index = batch % self.draws
        number, size = self.number(index), self.settings.batch
        given = self.draw(self.data, number * size, size, number + _FIRST_UPDATE)
        if self.learner.distillation is not None:
            noised = given["x_t"], given["t"], given["cond"]
            if self.store is None:
                given["teacher"] = self._features(*noised)
            else:
                given["teacher"] = self.store.get(index, lambda: self._features(*noised), self.device)
        terms: dict[str, torch.Tensor] = model(**given)
        return terms

    @torch.no_grad()
    def _features(self, x_t: torch.Tensor, t: torch.Tensor, cond: Tensors) -> Tensors:
        """The teacher's features of noised images, by place."""
        assert self.teacher is not None
        assert self.learner.distillation is not None
        _, found = predict_with_features(self.teacher.unet, self.learner.distillation.points, x_t, t, cond)
        # In memory as a store gives them back: sums of what lies otherwise differ in the last bit.
        return {name: feature.contiguous() for name, feature in found.items()}

    def draw(self, data: Batches, first: int, size: int, number: int, learning: bool = True) -> dict[str, Any]:
        """Images, noise and time steps, under a number.

        Only for learning, images are mirrored, captions take any of their forms, and labels and captions are dropped.
        """
        settings, device = self.settings, self.device
        rng = generator(settings.seed, number)
        flips = torch.rand(size, generator=rng) < 0.5 if settings.flip and learning else None
        t = torch.randint(0, self.noising.steps, (size,), generator=rng).to(device)
        drop = torch.rand(size, generator=rng) < settings.label_dropout
        choice = torch.rand(size, 2, generator=rng) if data.wordings is not None and learning else None
        x_0, cond = data.take(first, size, flips, drop if learning else None, choice)
        noise = torch.randn(x_0.shape, generator=rng).to(device)
        x_0, cond = x_0.to(device), {name: rows.to(device) for name, rows in cond.items()}
        if self.text is not None and not self.text.learns:
            with torch.no_grad():
                cond = {STATES: encode(self.text.encoder, cond[TOKENS])}
        x_t, target = self.noising.noised(x_0, noise, t)
        return {"x_0": x_0, "x_t": x_t, "t": t, "target": target, "cond": cond}

    def measure(self, loop: Loop) -> float:
        with loop.averaged():
            held_out = self._held_out_loss()
            samples = self._draw_samples()
        images = to_uint8(samples) if self.vae is None else decode(self.vae, torch.tensor(samples))
        with writing(self.path, loop.kept()):
            write_grid(images, self.path / SAMPLES)
            draw_losses(
                {_TERMS[name]: losses for name, losses in self.state.terms.items()},
                self.path / LOSSES,
                f"{self.model.name}: {self.data.count} images, batch {self.settings.batch}",
                "terms of the loss",
                points=("denoising, held out", (*self.state.held_out, (self.state.updates, held_out))),
            )
        return held_out

    def _draw_samples(self) -> NDArray[np.float32]:
        guidance = _guidance_of(self.model, self.settings)
        prompts = None if self.text is None else Prompts.encoded(self.text, self.prompts, guidance > 1)
        return draw_samples(self.model, NUM_SAMPLES, self.settings.batch, guidance, prompts)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        count, loss = min(self.held_out.count, HELD_OUT), 0.0
        for first in range(0, count, self.settings.batch):
            size = min(self.settings.batch, count - first)
            given = self.draw(self.held_out, first, size, _FIRST_HELD_OUT + first, learning=False)
            loss += size * float(self.learner(**given)[DDPM])
        return loss / count


def _prompts_of(images: ImageSet) -> list[str]:
    """What samples are asked for: captions that were learnt from, evenly spaced."""
    captions = images.captions[:: max(1, len(images.captions) // NUM_SAMPLES)][:NUM_SAMPLES]
    return [next(wording for form in caption for wording in form) for caption in captions]


def _save(path: Path, model: Model, card: str, vae: Autoencoder | None, text: Text | None) -> None:
    """Writes the model as diffusers does; the UNet's weights come last."""
    if model.labels:
        names = json.dumps(model.labels, ensure_ascii=False, indent=1)
        (path / "classes.json").write_text(f"{names}\n", encoding="utf-8")
    (path / CARD).write_text(card, encoding="utf-8")
    parts = {"scheduler": model.scheduler} | ({} if vae is None else {FOLDER: vae})
    if text is not None:
        parts |= {ENCODER: text.encoder, TOKENIZER: text.tokenizer}
    parts[UNET] = model.unet
    if len(parts) > 2:  # the index says that the model works on latents, or takes text
        index: dict[str, object] = {"_class_name": "DiffusionPipeline"}
        if {FOLDER, ENCODER} <= parts.keys():
            index["_class_name"] = "StableDiffusionPipeline"
            index |= {key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")}
            index["requires_safety_checker"] = False
        for name, part in sorted(parts.items()):
            module = type(part).__module__
            library = module.partition(".")[0]
            index[name] = [library if library in ("diffusers", "transformers") else module, type(part).__name__]
        (path / "model_index.json").write_text(f"{json.dumps(index, indent=1)}\n", encoding="utf-8")
    save_parts(path, parts)


def save_parts(path: Path, parts: Mapping[str, Any]) -> None:
    """Writes parts of a pipeline into its folder, each completely or not at all; an autoencoder trained there stays."""
    for name, part in parts.items():
        if name == FOLDER and (path / name).exists():
            continue
        partial = path / f"{name}.partial"
        for left_over in (partial, path / name):
            shutil.rmtree(left_over, ignore_errors=True)
        if name == TOKENIZER:
            save_tokenizer(part, partial)
        elif name == FOLDER:
            write_autoencoder(part, partial)
        else:
            with no_bars():
                part.save_pretrained(partial)
        os.replace(partial, path / name)
