"""A small KL autoencoder, for teachers that learn latents instead of pixels.

diffusers' `AutoencoderKL`, trained as latent diffusion's is (Rombach et al., section 3.1) without its perceptual and
adversarial losses, which need networks of their own.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn

from edgediff.data.batches import Batches, as_channels_first, generator
from edgediff.data.image_folder import ImageSet, divide
from edgediff.errors import ConfigError, TrainingError
from edgediff.train.claim import Claim
from edgediff.train.dataset import HELD_OUT_SHARE
from edgediff.train.latents import CONFIG, encode, load_autoencoder, reconstruction_psnr, save_autoencoder
from edgediff.train.loop import LOSS, Loop, Say, Task, silent
from edgediff.train.settings import AutoencoderTraining, check_training


def check_autoencoder(settings: AutoencoderTraining, size: int) -> AutoencoderTraining:
    """Checks settings for images of a height and width in pixels; a ConfigError where they do not fit."""
    settings = check_training(settings)
    if size % settings.factor:
        raise ConfigError(
            f"images are {size}x{size}; expected a multiple of {settings.factor}, which the "
            f"{len(settings.block_out_channels)} levels of 'block_out_channels' divide by"
        )
    return settings


def train_autoencoder(
    images: ImageSet,
    settings: AutoencoderTraining | None,
    path: str | Path,
    *,
    accelerator: Accelerator,
    held_out: ImageSet | None = None,
    progress: Say | None = None,
) -> AutoencoderKL:
    """Trains an autoencoder in the folder `path`, or resumes an interrupted training of the same settings.

    The loss is the absolute error, which blurs less than the squared one and gives unusual images less weight. The
    latents of the images end with a mean of 0 and, times ``scaling_factor``, unit variance.

    Args:
        images: Square ones.
        settings: None takes the defaults.
        path: Where the autoencoder is written as diffusers does.
        accelerator: Nothing is prepared with it, before and afterwards.
        held_out: What reconstructions are measured on; None holds out a tenth of each class of `images`.
        progress: Called with what is being done, and the share of it that is done.

    Returns:
        The autoencoder in evaluation mode, float32; read from `path` where it is there already.

    Raises:
        ConfigError: A setting is out of range or does not fit the images.
        TargetError: Something else is in the folder, or the disk is full.
        TrainingError: The loss is not finite (the last good checkpoint is kept), or the latents are all alike.
    """
    settings = check_autoencoder(AutoencoderTraining() if settings is None else settings, images.images.shape[1])
    path = Path(path)
    say = progress if progress is not None and accelerator.is_main_process else silent
    if held_out is None:
        images, held_out = divide(images, HELD_OUT_SHARE, settings.seed)
    sources = {"other images": hashlib.sha256(np.ascontiguousarray(images.images).data).hexdigest()}
    claim = Claim(path, CONFIG, settings, sources, accelerator)
    if claim.is_done():
        return load_autoencoder(path).to(accelerator.device)
    with claim.locked():
        task = _AutoencoderTask(accelerator, images.images, settings)
        Loop(task, path).run(say)
        vae = task.vae.requires_grad_(False)
        _standardise(vae, images.images, settings)
        measured = held_out if len(held_out) else images
        what = f"{len(measured)} held-out images" if len(held_out) else f"the {len(measured)} images it learnt from"
        db = reconstruction_psnr(vae, measured.images)
        if accelerator.is_main_process:
            save_autoencoder(vae, path)
    say(f"autoencoder: {db:.1f} dB on {what}", 1.0)
    return vae


def _new(settings: AutoencoderTraining, size: int) -> AutoencoderKL:
    levels = len(settings.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.block_out_channels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_num_groups,
            sample_size=size,
            scaling_factor=1.0,
        )


class _Loss(nn.Module):
    """Both halves and the loss as one module, so that processes average the gradients of all of it."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The loss of images [B, 3, H, W] in [-1, 1], given standard normal noise of their latents' shape."""
        posterior = self.vae.encode(x).latent_dist
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = (reconstruction - x).abs().sum() + self.kl_weight * posterior.kl().sum()
        loss: torch.Tensor = error / x.numel()
        return loss


class _AutoencoderTask(Task):
    """A visit is one update."""

    schedule = "cosine"
    clip = 1.0
    name = "autoencoder: "

    def __init__(self, accelerator: Accelerator, images: NDArray[np.uint8], settings: AutoencoderTraining) -> None:
        side = images.shape[1] // settings.factor
        self.data = Batches(as_channels_first(images), {}, settings.seed)
        self.noise_shape = (settings.batch, settings.latent_channels, side, side)
        self.vae = _new(settings, images.shape[1])
        loss = _Loss(self.vae, settings.kl_weight)
        optimizer = torch.optim.AdamW(loss.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        super().__init__(accelerator, settings, loss, optimizer, loss, settings.updates)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        number, size = self.number(batch), self.settings.batch
        rng = generator(self.settings.seed, number)
        flips = torch.rand(size, generator=rng) < 0.5 if self.settings.flip else None
        x, _ = self.data.take(number * size, size, flips)
        noise = torch.randn(self.noise_shape, generator=rng)
        return {LOSS: model(x.to(self.device), noise.to(self.device))}


@torch.no_grad()
def _standardise(vae: AutoencoderKL, images: NDArray[np.uint8], settings: AutoencoderTraining) -> None:
    """Gives the images' latents a mean of 0 in each channel and unit variance over all of them.

    The factor goes into the configuration, the mean into the two 1x1 convolutions beside the latents: decoding needs
    nothing new, and decoded images stay the same.
    """
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), float(latents.std((0, 2, 3), correction=0).square().mean().sqrt())
    if not (math.isfinite(std) and std > 1e-6):
        raise TrainingError(
            f"the autoencoder's latents are constant (their standard deviation is {std:g}); choose another folder and "
            f"a kl_weight below {settings.kl_weight:g}, or other images"
        )
    mean = mean.to(vae.device)
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=1 / std)
