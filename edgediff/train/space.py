"""The space in which a UNet works where that is not pixels: an autoencoder's latents."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from edgediff.models.load import Model
from edgediff.train.latents import decode, encode

FOLDER = "vae"
_INDEX = "model_index.json"


class LatentSpace:
    """An autoencoder's two ways.

    Attributes:
        vae: The autoencoder.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def encode(self, images: NDArray[np.uint8]) -> torch.Tensor:
        """Takes images to latents of about unit variance.

        Args:
            images: uint8 [N, H, W, 3].

        Returns:
            float32 [N, C, h, w], on the CPU.
        """
        return encode(self.vae, images)

    def decode(self, samples: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Takes latents to images.

        Args:
            samples: float32 [N, C, h, w].

        Returns:
            uint8 [N, H, W, 3].
        """
        return decode(self.vae, torch.tensor(samples))

    def save(self, path: Path, model: Model) -> None:
        """Writes the autoencoder, whole, into a model's folder, and what tells that the model works on latents.

        Args:
            path: The model's folder; an autoencoder that was trained there stays as it is.
            model: The model.
        """
        if not (path / FOLDER).exists():
            partial = path / f"{FOLDER}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self.vae.save_pretrained(partial)
            os.replace(partial, path / FOLDER)
        parts = {"scheduler": model.scheduler, "unet": model.unet, "vae": self.vae}
        index: dict[str, object] = {"_class_name": "DiffusionPipeline"}
        index |= {name: [_library(type(part).__module__), type(part).__name__] for name, part in parts.items()}
        (path / _INDEX).write_text(f"{json.dumps(index, indent=1)}\n", encoding="utf-8")


def _library(module: str) -> str:
    """Where a pipeline's index looks for a class: diffusers by its name, others by their module."""
    return "diffusers" if module.startswith("diffusers.") else module
