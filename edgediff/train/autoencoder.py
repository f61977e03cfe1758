"""A small KL autoencoder, for teachers that learn latents in the place of pixels.

diffusers' `AutoencoderKL`, trained as latent diffusion's is (Rombach et al., section 3.1) without its perceptual and
adversarial losses, which need networks of their own. Everything drawn follows from the seed, the update and the
process, so that an interrupted training goes on as if it had not been.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from edgediff.config.strict import check_ranges, retyped
from edgediff.data.batches import Batches, as_channels_first
from edgediff.data.draws import generator
from edgediff.data.image_folder import ImageSet, divide
from edgediff.errors import ConfigError, TargetError, TrainingError
from edgediff.models.load import WEIGHTS, one_line
from edgediff.train.checkpoint import Checkpoints
from edgediff.train.claim import Claim, check_place, claim_place, clear_place, is_finished
from edgediff.train.latents import CONFIG, encode, load_autoencoder, reconstruction_psnr
from edgediff.train.progress import Progress, recent, silent

WEIGHTS_FILE = f"{WEIGHTS}.safetensors"
HELD_OUT = 0.1
# Settings that make no other weights, and those that a training that has begun may still change.
FREE_AFTER = ("checkpoint_minutes",)
FREE = ("learning_rate", *FREE_AFTER)
_CLIP = 1.0

# Settings


class AutoencoderTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A small autoencoder and its training.

    Attributes:
        latent_channels: Channels of a latent.
        block_out_channels: Channels of each level; every level but the first halves the map.
        layers_per_block: Residual blocks of a level.
        norm_num_groups: Groups of the normalisations; divides the channels of every level.
        updates: Optimizer steps.
        batch: Images of an update, in each process.
        learning_rate: AdamW's highest; it falls to 0 along a cosine.
        kl_weight: Weight of a latent's divergence from the standard normal beside the absolute error of a pixel's
            channel, both summed, as in latent diffusion.
        ema: Decay of the averaged weights, which are what is kept.
        flip: Whether images are mirrored at random.
        checkpoint_minutes: Between checkpoints.
        seed: Of weights, order and noise.
    """

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    updates: int = 5000
    batch: int = 16
    learning_rate: float = 1e-3
    kl_weight: float = 1e-6
    ema: float = 0.999
    flip: bool = True
    checkpoint_minutes: float = 5.0
    seed: int = 0

    @property
    def factor(self) -> int:
        """How many pixels of a side become one of a latent."""
        return int(2 ** (len(self.block_out_channels) - 1))


POSITIVE = ("latent_channels", "layers_per_block", "norm_num_groups", "updates", "batch", "learning_rate",
            "checkpoint_minutes")  # fmt: skip


def check_autoencoder(settings: AutoencoderTraining, size: int | None = None) -> AutoencoderTraining:
    """Holds the rules that types cannot.

    Args:
        settings: Any settings, also built by hand.
        size: Height and width of the images, in pixels, where it is known.

    Returns:
        The same, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    settings = retyped(settings)
    check_ranges(settings, POSITIVE, ("kl_weight",), ("ema",))
    widths, groups = settings.block_out_channels, settings.norm_num_groups
    if not widths or any(width < 1 or width % groups for width in widths):
        expected = f"one or more multiples of norm_num_groups: {groups}"
        raise ConfigError(f"'block_out_channels' is {list(widths)}; expected {expected}")
    if size is not None and size % settings.factor:
        raise ConfigError(
            f"images are {size}x{size}; expected a multiple of {settings.factor}, which the {len(widths)} levels of "
            f"'block_out_channels' divide by"
        )
    return settings


# Training


def train_autoencoder(
    images: ImageSet,
    settings: AutoencoderTraining | None,
    path: str | Path,
    *,
    accelerator: Accelerator,
    held_out: ImageSet | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> AutoencoderKL:
    """Trains an autoencoder, or goes on where an interrupted training of the same settings stopped.

    The loss is the absolute error, which blurs less than the squared one and bears an image that is unlike the others.
    The latents of the images end with a mean of 0 and, times ``scaling_factor``, unit variance.

    Args:
        images: What is learnt from; square.
        settings: What is asked for; None takes the defaults.
        path: The folder where the autoencoder is to be, as diffusers saves it.
        accelerator: Nothing is prepared with it, before and afterwards.
        held_out: What reconstructions are measured on; None holds back a tenth of each class of `images`.
        progress: Told what is being done, and the share of it that is done.

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
        images, held_out = divide(images, HELD_OUT, settings.seed)
    sources = {"other images": hashlib.sha256(np.ascontiguousarray(images.images).data).hexdigest()}
    claim = Claim(settings, sources, accelerator.num_processes, product=CONFIG, free=FREE, free_after=FREE_AFTER)
    check_place(path, claim)
    finished = is_finished(path, claim)
    accelerator.wait_for_everyone()
    if finished:
        _clear(path, accelerator)
        return load_autoencoder(path).to(accelerator.device)
    if accelerator.is_main_process:
        claim_place(path, claim)
    accelerator.wait_for_everyone()
    try:
        vae = _Loop(accelerator, images.images, settings, path).run(say)
    finally:
        # What is prepared goes into all checkpoints of an accelerator, also into those of what is trained next.
        accelerator.free_memory()
        accelerator._custom_objects.clear()
    _standardise(vae, images.images, settings)
    measured = held_out if len(held_out) else images
    what = f"{len(measured)} held-out images" if len(held_out) else f"the {len(measured)} images it learnt from"
    db = reconstruction_psnr(vae, measured.images)
    if accelerator.is_main_process:
        _save(vae, path)
    _clear(path, accelerator)
    say(f"autoencoder: {db:.1f} dB on {what}", 1.0)
    return vae


def _clear(path: Path, accelerator: Accelerator) -> None:
    """Removes what a finished training no longer needs."""
    if accelerator.is_main_process:
        clear_place(path)
    accelerator.wait_for_everyone()


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


class _Loop:
    """Updates and checkpoints."""

    def __init__(
        self, accelerator: Accelerator, images: NDArray[np.uint8], settings: AutoencoderTraining, path: Path
    ) -> None:
        size = images.shape[1]
        side = size // settings.factor
        self.accelerator = accelerator
        self.batches = Batches(as_channels_first(images), None, None, settings.seed)
        self.settings = settings
        self.noise_shape = (settings.batch, settings.latent_channels, side, side)
        loss = _Loss(_new(settings, size), settings.kl_weight)
        self.model, self.optimizer = accelerator.prepare(
            loss, torch.optim.AdamW(loss.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        )
        self.ema = EMAModel(loss.parameters(), decay=settings.ema)
        self.state = Progress()
        self.checkpoints = Checkpoints(path, accelerator, self.ema, self.state, settings.checkpoint_minutes)

    def run(self, say: Callable[[str, float], None]) -> AutoencoderKL:
        """Runs what is left of the training; the autoencoder with its averaged weights."""
        settings, state = self.settings, self.state
        self.checkpoints.load()
        while state.updates < settings.updates:
            self._update(state.updates * self.accelerator.num_processes + self.accelerator.process_index)
            share = state.updates / settings.updates
            say(f"autoencoder: update {state.updates} of {settings.updates}: loss {recent(state.losses):.4f}", share)
            self.checkpoints.save_when_due()
        self.checkpoints.save()
        model = self.accelerator.unwrap_model(self.model)
        self.ema.copy_to(model.parameters())
        return model.vae.eval().requires_grad_(False)

    def _update(self, number: int) -> None:
        settings, state = self.settings, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * state.updates / settings.updates))
        rng = generator(settings.seed, number)
        flips = torch.rand(settings.batch, generator=rng) < 0.5 if settings.flip else None
        x, _ = self.batches.take(number * settings.batch, settings.batch, flips)
        noise = torch.randn(self.noise_shape, generator=rng)
        device = self.accelerator.device
        loss = self.model(x.to(device), noise.to(device))
        shown = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(shown):
            raise TrainingError(
                f"the autoencoder's loss is not finite at update {state.updates}; {self.checkpoints.kept()}; go on "
                f"from it with a lower learning_rate than {settings.learning_rate:g}"
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.ema.step(self.accelerator.unwrap_model(self.model).parameters())
        state.visits += 1
        state.updates += 1
        state.losses.append(shown)


@torch.no_grad()
def _standardise(vae: AutoencoderKL, images: NDArray[np.uint8], settings: AutoencoderTraining) -> None:
    """Gives the images' latents a mean of 0 in each channel and unit variance over all of them.

    The factor is the configuration's. The mean goes into the two convolutions of one pixel beside the latents, so that
    nothing that decodes has to know of it, and images come back as they did.
    """
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), float(latents.std((0, 2, 3), correction=0).square().mean().sqrt())
    if not (math.isfinite(std) and std > 1e-6):
        raise TrainingError(
            f"the autoencoder's latents are all alike (their standard deviation is {std:g}); choose another folder and "
            f"a kl_weight below {settings.kl_weight:g}, or other images"
        )
    mean = mean.to(vae.device)
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=1 / std)


def _save(vae: AutoencoderKL, path: Path) -> None:
    """Writes weights, then the configuration, by which the training is known to be finished."""
    partial = path / "autoencoder.partial"
    try:
        vae.save_pretrained(partial)
        for name in (WEIGHTS_FILE, CONFIG):
            os.replace(partial / name, path / name)
        partial.rmdir()
    except (SafetensorError, OSError) as e:
        raise TargetError(f"{path} cannot be written: {one_line(e)[:200]}") from e
