"""Training a decoder for latents that stay as they are: a pipeline's own, trained further, or a small one.

A UNet that learnt an autoencoder's latents keeps its worth when another decoder makes images of them. The loss is the
absolute error of the pixels and, so that edges are not blurred, that of their details: the high bands of a Haar wavelet
transform. The small one is an `AutoencoderTiny`, whose encoder learns the same latents.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import nn

from edgediff.config.strict import strict
from edgediff.data.batches import Batches, as_channels_first, generator, hash_of
from edgediff.data.captions import METADATA
from edgediff.data.image_folder import ImageSet
from edgediff.errors import ConfigError
from edgediff.models.wavelet import dwt2
from edgediff.outputs import check_drawing
from edgediff.train.claim import Claim, writing
from edgediff.train.dataset import read_data
from edgediff.train.latents import (
    CONFIG,
    Autoencoder,
    decode,
    encode,
    factor_of,
    hash_of_autoencoder,
    images_of,
    latents_of,
    load_autoencoder,
    reconstruction_psnr,
    save_autoencoder,
)
from edgediff.train.loop import Loop, MeasuredTask, Say, begin, recent
from edgediff.train.samples import write_grid
from edgediff.train.settings import DecoderTraining, TinyGeometry, check_training
from edgediff.train.training_card import CARD, LOSSES, decoder_card, draw_losses
from edgediff.zoo import built_in

PIXELS, EDGES, LATENTS = "pixels", "edges", "latents"
DETAIL_LEVELS = 3
SAMPLES = "samples.png"
_NUM_SAMPLES = 12
# Decoded with the noise of the training; the same for each measurement.
_MEASURED = 256


@dataclass(frozen=True)
class DecoderTrained:
    """The result of a training.

    Attributes:
        before, psnr: Of held-out images, encoded and decoded, in dB: by the pipeline's autoencoder, and by this one.
        loss: Of the pixels, mean over the last tenth of the updates.
        images: How many were learnt from.
        skipped: Images that were left out, and why.
    """

    path: Path
    updates: int
    loss: float
    before: float
    psnr: float
    images: int
    skipped: str


def train_decoder(path: str | Path, settings: DecoderTraining, *, progress: Say | None = None) -> DecoderTrained | None:
    """Trains a decoder in the folder `path`, or resumes an interrupted training of the same settings.

    The folder is an autoencoder's as diffusers writes it, for `--vae`.

    Returns:
        None where it is there already.

    Raises:
        ConfigError: The settings, the autoencoder and the images do not fit together.
        DataError: The images cannot be read.
        ModelError: The autoencoder cannot be loaded.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
    """
    settings = check_training(settings)
    if settings.model is None:
        raise ConfigError("no autoencoder: name a diffusers directory, 'model' in the settings")
    path = Path(path)
    accelerator, say = begin(path, progress, settings.precision)
    check_drawing("drawing the loss curve")
    named = None if Path(settings.model).exists() else built_in(settings.model)
    source = load_autoencoder(settings.model if named is None else named)
    learns = _learner(source, settings)
    size = source.config.get("sample_size") if settings.size is None else settings.size
    if size is None:
        raise ConfigError(f"{settings.model} does not say how large its images are; name it, 'size' in the settings")
    if size % factor_of(source):
        raise ConfigError(
            f"'size' is {size}; expected a multiple of {factor_of(source)}, which the autoencoder divides by"
        )
    captioned = settings.only is not None or (settings.data is not None and (Path(settings.data) / METADATA).is_file())
    images, held_out = read_data(settings, size, say, captioned=captioned)
    sources = {
        "other images": hash_of(images),
        "other held-out images": hash_of(held_out),
        "another autoencoder": hash_of_autoencoder(source),
    }
    claim = Claim(path, CONFIG, settings, sources, accelerator)
    if claim.is_done():
        return None
    with claim.locked():
        before = reconstruction_psnr(source.to(accelerator.device), held_out.images)
        task = _DecoderTask(accelerator, source, learns, (images, held_out), settings, path)
        loop = Loop(task, path)
        loop.run(say)
        vae = learns.vae.requires_grad_(False)
        db = reconstruction_psnr(vae, held_out.images)
        if accelerator.is_main_process:
            loop.count_time()
            card = decoder_card(vae, source, settings, (images, held_out), (before, db), task.state, accelerator)
            with writing(path, loop.kept()):
                (path / CARD).write_text(card, encoding="utf-8")
            save_autoencoder(vae, path)
    accelerator.end_training()
    return DecoderTrained(
        path=path,
        updates=task.state.updates,
        loss=recent(task.state.terms[PIXELS]),
        before=before,
        psnr=db,
        images=len(images),
        skipped=images.skipped.in_words(),
    )


def _learner(source: Autoencoder, settings: DecoderTraining) -> "_Learner":
    if settings.tiny is None:
        vae = deepcopy(source)
        vae.encoder.requires_grad_(False)
        for part in (vae.decoder, getattr(vae, "post_quant_conv", None)):
            if part is not None:
                part.requires_grad_(True)
        return _Learner(vae)
    shape = strict(settings.tiny, TinyGeometry)
    shape.check()
    levels = len(source.config.block_out_channels)
    encoder = (1,) * levels if shape.encoder_blocks is None else shape.encoder_blocks
    decoder = (2,) * levels if shape.decoder_blocks is None else shape.decoder_blocks
    for name, blocks in (("encoder_blocks", encoder), ("decoder_blocks", decoder)):
        if len(blocks) != levels:
            raise ConfigError(f"'tiny.{name}' is {list(blocks)}; expected {levels} numbers, one for each size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(shape.channels,) * levels,
            decoder_block_out_channels=(shape.channels,) * levels,
            num_encoder_blocks=encoder,
            num_decoder_blocks=decoder,
            latent_channels=source.config.latent_channels,
        )
    return _Learner(tiny)


class _Learner(nn.Module):
    """The autoencoder and the loss as one module, so that processes average the gradients of all of it."""

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae = vae
        self.encodes = isinstance(vae, AutoencoderTiny)

    def forward(self, images: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms of the loss of images [B, 3, H, W] in [-1, 1] and their latents, given noise for these."""
        made = images_of(self.vae, latents + noise)
        terms = {PIXELS: (made - images).abs().mean(), EDGES: details_error(made, images)}
        if self.encodes:
            terms[LATENTS] = (latents_of(self.vae, images) - latents).square().mean()
        return terms


def details_error(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the details of images [B, C, H, W], the mean over Haar's bands of several sizes."""
    rest, errors = made - images, []
    for _ in range(DETAIL_LEVELS):
        rest, *details = dwt2(rest)
        errors.append(torch.stack([band.abs().mean() for band in details]).mean())
    return torch.stack(errors).mean()


class _DecoderTask(MeasuredTask):
    """A visit is one update."""

    name = "decoder: "

    def __init__(
        self,
        accelerator: Accelerator,
        source: Autoencoder,
        learner: _Learner,
        images: tuple[ImageSet, ImageSet],
        settings: DecoderTraining,
        path: Path,
    ) -> None:
        self.source, self.held_out, self.path = source, images[1].images[:_MEASURED], path
        self.data = Batches(as_channels_first(images[0].images), {}, settings.seed)
        self.latents = encode(source, self.held_out)
        learner.to(accelerator.device)
        weights = [weight for weight in learner.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        super().__init__(accelerator, settings, learner, optimizer, learner, settings.updates)
        self.weights = {PIXELS: 1.0, EDGES: settings.edge_weight, LATENTS: 1.0}
        self.learner = learner

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        number, size = self.number(batch), self.settings.batch
        rng = generator(self.settings.seed, number)
        flips = torch.rand(size, generator=rng) < 0.5 if self.settings.flip else None
        x = self.data.take(number * size, size, flips)[0].to(self.device)
        with torch.no_grad():
            latents = latents_of(self.source, x)
        noise = self.settings.latent_noise * torch.randn(latents.shape, generator=rng)
        terms: dict[str, torch.Tensor] = model(x, latents, noise.to(self.device))
        return terms

    def measure(self, loop: Loop) -> float:
        with loop.averaged():
            made = decode(self.learner.vae, self.latents)
        error = float(np.abs(made.astype(np.float32) - self.held_out).mean() / 127.5)
        with writing(self.path, loop.kept()):
            write_grid(self._samples(made), self.path / SAMPLES)
            draw_losses(
                self.state.terms,
                self.path / LOSSES,
                f"decoder: {self.data.count} images, batch {self.settings.batch}",
                "terms of the loss",
                points=("pixels, held out", (*self.state.held_out, (self.state.updates, error))),
            )
        return error

    def _samples(self, made: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Held-out images, as they are, by the pipeline's own decoder and by this one, side by side."""
        chosen = self.held_out[:_NUM_SAMPLES]
        theirs = decode(self.source, self.latents[:_NUM_SAMPLES])
        return np.stack([chosen, theirs, made[: len(chosen)]], axis=1).reshape(-1, *chosen.shape[1:])
