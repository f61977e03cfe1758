"""Latents of images and images of latents, by an autoencoder of diffusers: AutoencoderKL or AutoencoderTiny."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from safetensors import SafetensorError

from edgediff.errors import ConfigError, ModelError
from edgediff.models.classifier import as_input
from edgediff.models.load import Model
from edgediff.models.model_files import read_json
from edgediff.train.claim import writing
from edgediff_runtime.errors import one_line
from edgediff_runtime.image import to_uint8

CONFIG = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FOLDER = "vae"
_AT_ONCE = 64

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
CLASSES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Reads an autoencoder from its folder or a pipeline's: in evaluation mode, float32, on the CPU.

    Raises:
        ModelError: There is none, its files cannot be read, or it is not one of RGB images.
    """
    path = Path(path)
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    config = read_json(path / CONFIG)
    kind = CLASSES.get(str(config.get("_class_name")))
    if kind is None:
        choices = " or ".join(CLASSES)
        raise ModelError(f"{path / CONFIG} is of class {config.get('_class_name')!r}; expected {choices}")
    try:
        vae = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, SafetensorError) as e:
        raise ModelError(f"{path} cannot be read as an autoencoder: {one_line(e)[:300]}") from e
    if vae.config.in_channels != 3 or vae.config.out_channels != 3:
        raise ModelError(f"{path} has {vae.config.in_channels} channels; expected an autoencoder of RGB images")
    return vae.eval().requires_grad_(False)


def autoencoder_of(model: Model) -> tuple[Autoencoder | None, int]:
    """A model's autoencoder, None where it works on pixels, and height and width of its images in pixels.

    Raises:
        ConfigError: The UNet takes no squares, or other channels than images or the autoencoder's latents have.
        ModelError: The autoencoder cannot be loaded.
    """
    channels, height, width = model.sample_shape
    if height != width:
        raise ConfigError(f"the UNet takes {height}x{width}; expected a square, since images are cropped to one")
    vae = None if model.space == "pixel" else load_autoencoder(model.home / FOLDER)
    expected = 3 if vae is None else vae.config.latent_channels
    if (channels, model.out_channels) != (expected, expected):
        raise ConfigError(
            f"{model.name} has in_channels {channels} and out_channels {model.out_channels}; expected {expected}, as "
            f"{'images' if vae is None else 'the latents of its autoencoder'} have"
        )
    return vae, height * (1 if vae is None else factor_of(vae))


@torch.no_grad()
def encode(
    vae: Autoencoder,
    images: NDArray[np.uint8],
    batch: int = _AT_ONCE,
    progress: Callable[[str, float], None] | None = None,
) -> torch.Tensor:
    """Encodes images, uint8 [N, H, W, 3], to latents, float32 [N, C, h, w] on the CPU.

    They are the means of the posteriors, scaled to about unit variance.

    Raises:
        ConfigError: The autoencoder's levels do not divide the images.
    """
    factor = factor_of(vae)
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ConfigError(f"images are {width}x{height}; the autoencoder takes multiples of {factor}")
    made = []
    for first in range(0, len(images), batch):
        if progress is not None:
            progress(f"encoding images: {first} of {len(images)}", first / len(images))
        made.append(latents_of(vae, as_input(images[first : first + batch]).to(vae.device)).float().cpu())
    return torch.cat(made)


@torch.no_grad()
def decode(vae: Autoencoder, latents: torch.Tensor, batch: int = _AT_ONCE) -> NDArray[np.uint8]:
    """Decodes latents, float32 [N, C, h, w], scaled as `encode` does, to images, uint8 [N, H, W, 3]."""
    made = []
    for first in range(0, len(latents), batch):
        x = images_of(vae, latents[first : first + batch].to(vae.device))
        made.append(to_uint8(x.float().cpu().numpy()))
    return np.concatenate(made)


def latents_of(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1], scaled to about unit variance; means, where they vary."""
    shift, scale = _affine(vae)
    encoded = vae.encode(images)
    means = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mean
    scaled: torch.Tensor = (means - shift) * scale
    return scaled


def images_of(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W], about [-1, 1], of latents as `latents_of` makes them."""
    shift, scale = _affine(vae)
    decoded: torch.Tensor = vae.decode(latents / scale + shift).sample
    return decoded


def hash_of_autoencoder(vae: Autoencoder) -> str:
    """sha256 over the weights, on the CPU, and what scales the latents."""
    digest = hashlib.sha256(repr(_affine(vae)).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def factor_of(vae: Autoencoder) -> int:
    """What an autoencoder divides height and width by: a power of 2."""
    levels = vae.config.get("block_out_channels", vae.config.get("encoder_block_out_channels"))
    return int(2 ** (len(levels) - 1))


def reconstruction_psnr(vae: Autoencoder, images: NDArray[np.uint8], batch: int = _AT_ONCE) -> float:
    """PSNR of images, uint8 [N, H, W, 3], encoded and decoded: ``20 log10(255 / rmse)`` over all of them, in dB."""
    squares = 0.0
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        squares += float(np.sum((decode(vae, encode(vae, some)).astype(np.float64) - some) ** 2))
    rmse = math.sqrt(squares / images.size)
    return 20 * math.log10(255 / rmse) if rmse > 0 else math.inf


def save_autoencoder(vae: Autoencoder, path: Path) -> None:
    """Writes weights, then the configuration, by which the training is known to be finished."""
    partial = path / "autoencoder.partial"
    with writing(path):
        write_autoencoder(vae, partial)
        for name in (WEIGHTS_FILE, CONFIG):
            os.replace(partial / name, path / name)
        partial.rmdir()


def write_autoencoder(vae: Autoencoder, folder: Path) -> None:
    """Saves an autoencoder as diffusers does, without what diffusers itself warns of when it reads it again."""
    vae.save_pretrained(folder)
    if isinstance(vae, AutoencoderTiny):  # it keeps its decoder's channels under a second name
        config = read_json(folder / CONFIG)
        config.pop("block_out_channels", None)
        (folder / CONFIG).write_text(f"{json.dumps(config, indent=2, sort_keys=True)}\n", encoding="utf-8")


def _affine(vae: Autoencoder) -> tuple[float, float]:
    """What latents are shifted by, then multiplied with; autoencoders trained here do not shift."""
    shift = vae.config.get("shift_factor")
    return 0.0 if shift is None else shift, vae.config.scaling_factor
