"""Latents of images and images of latents, by a KL autoencoder of diffusers."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import SafetensorError

from edgediff.errors import ConfigError, ModelError
from edgediff.models.classifier import as_input
from edgediff.models.load import Model
from edgediff.models.model_files import read_json
from edgediff_runtime.errors import one_line
from edgediff_runtime.image import to_uint8

CONFIG = "config.json"
FOLDER = "vae"
_INDEX = "model_index.json"
_AT_ONCE = 64


def load_autoencoder(path: str | Path) -> AutoencoderKL:
    """Reads an autoencoder from its folder, or from that of a pipeline with a ``vae``.

    Returns:
        The autoencoder in evaluation mode, float32, on the CPU.

    Raises:
        ModelError: There is none, its files cannot be read, or it is not one of RGB images.
    """
    path = Path(path)
    path = path / FOLDER if (path / FOLDER).is_dir() else path
    config = read_json(path / CONFIG)
    if config.get("_class_name") != "AutoencoderKL":
        raise ModelError(f"{path / CONFIG} is of class {config.get('_class_name')!r}; expected AutoencoderKL")
    try:
        vae = AutoencoderKL.from_pretrained(
            path, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, SafetensorError) as e:
        raise ModelError(f"{path} cannot be read as an autoencoder: {one_line(e)[:300]}") from e
    if vae.config.in_channels != 3 or vae.config.out_channels != 3:
        raise ModelError(f"{path} has {vae.config.in_channels} channels; expected an autoencoder of RGB images")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: NDArray[np.uint8], batch: int = _AT_ONCE) -> torch.Tensor:
    """Makes latents: the mean of each image's posterior, scaled to about unit variance.

    Args:
        vae: In evaluation mode.
        images: uint8 [N, H, W, 3].
        batch: Images at once.

    Returns:
        float32 [N, C, h, w], on the CPU.

    Raises:
        ConfigError: The autoencoder's levels do not divide the images.
    """
    factor = factor_of(vae)
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ConfigError(f"images are {width}x{height}; the autoencoder takes multiples of {factor}")
    shift, scale = _affine(vae)
    made = []
    for first in range(0, len(images), batch):
        x = as_input(images[first : first + batch]).to(vae.device)
        made.append(((vae.encode(x).latent_dist.mean - shift) * scale).float().cpu())
    return torch.cat(made)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = _AT_ONCE) -> NDArray[np.uint8]:
    """Makes images, uint8 [N, H, W, 3], of latents, float32 [N, C, h, w], scaled as `encode` does."""
    shift, scale = _affine(vae)
    made = []
    for first in range(0, len(latents), batch):
        z = latents[first : first + batch].to(vae.device) / scale + shift
        made.append(to_uint8(vae.decode(z).sample.float().cpu().numpy()))
    return np.concatenate(made)


def hash_of_autoencoder(vae: AutoencoderKL) -> str:
    """sha256 over the weights, on the CPU, and what scales the latents."""
    digest = hashlib.sha256(repr(_affine(vae)).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def factor_of(vae: AutoencoderKL) -> int:
    """By how much an autoencoder divides height and width: a power of 2."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def reconstruction_psnr(vae: AutoencoderKL, images: NDArray[np.uint8], batch: int = _AT_ONCE) -> float:
    """How near images, uint8 [N, H, W, 3], come back: ``20 log10(255 / rmse)`` over all of them, in dB."""
    squares = 0.0
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        squares += float(np.sum((decode(vae, encode(vae, some)).astype(np.float64) - some) ** 2))
    rmse = math.sqrt(squares / images.size)
    return 20 * math.log10(255 / rmse) if rmse > 0 else math.inf


def save_beside(vae: AutoencoderKL, path: Path, model: Model) -> None:
    """Writes an autoencoder, whole, into a model's folder, and an index that tells that the model works on latents.

    An autoencoder that was trained there stays as it is.
    """
    if not (path / FOLDER).exists():
        partial = path / f"{FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        vae.save_pretrained(partial)
        os.replace(partial, path / FOLDER)
    parts = {"scheduler": model.scheduler, "unet": model.unet, FOLDER: vae}
    index: dict[str, object] = {"_class_name": "DiffusionPipeline"}
    index |= {name: [_library(type(part).__module__), type(part).__name__] for name, part in parts.items()}
    (path / _INDEX).write_text(f"{json.dumps(index, indent=1)}\n", encoding="utf-8")


def _affine(vae: AutoencoderKL) -> tuple[float, float]:
    """What latents are shifted by, then multiplied with; only others' autoencoders shift."""
    shift = vae.config.get("shift_factor")
    return 0.0 if shift is None else shift, vae.config.scaling_factor


def _library(module: str) -> str:
    """Where a pipeline's index looks for a class: diffusers by its name, others by their module."""
    return "diffusers" if module.startswith("diffusers.") else module
