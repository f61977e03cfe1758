"""The space in which a UNet works where that is not pixels: an autoencoder's latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from edgediff.train.latents import decode, encode

FOLDER = "vae"
_INDEX = """{
 "_class_name": "DiffusionPipeline",
 "scheduler": ["diffusers", "DDPMScheduler"],
 "unet": ["diffusers", "UNet2DModel"],
 "vae": ["diffusers", "AutoencoderKL"]
}
"""


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

    def save(self, path: Path) -> None:
        """Writes the autoencoder into a model's folder, and what tells that the model works on latents.

        Args:
            path: The model's folder.
        """
        if not (path / FOLDER / "config.json").is_file():
            self.vae.save_pretrained(path / FOLDER)
        (path / "model_index.json").write_text(_INDEX, encoding="utf-8")
