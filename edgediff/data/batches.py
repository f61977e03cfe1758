"""Images as a training draws them: batches that follow from the seed, the update and the process alone."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.data.draws import generator
from edgediff.data.image_folder import ImageSet


class Batches:
    """Images (or latents), float32 or uint8 [N, C, H, W], and classes, drawn without replacement within each pass."""

    def __init__(
        self, x_0: torch.Tensor, mirrored: torch.Tensor | None, labels: NDArray[np.int64] | None, seed: int
    ) -> None:
        """Takes the data, `labels` int64 [N] or None.

        `mirrored` are the mirrored images, where they are learnt from too and mirroring `x_0` would not give them.
        """
        self.x_0 = x_0
        self.mirrored = mirrored
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.count = len(x_0)
        self._seed = seed
        self._passes: dict[int, torch.Tensor] = {}

    def take(self, first: int, size: int, flips: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes the images at some places of the endless row of shuffled passes; `flips`, bool [size], are mirrored.

        Returns:
            float32 [size, C, H, W] in [-1, 1] for images, and int64 [size] or None.
        """
        places = range(first, first + size)
        chosen = torch.stack([self._order(place // self.count)[place % self.count] for place in places])
        x_0 = scaled(self.x_0[chosen])
        if flips is not None:
            other = x_0.flip(3) if self.mirrored is None else scaled(self.mirrored[chosen])
            x_0 = torch.where(flips.reshape(-1, 1, 1, 1), other, x_0)
        return x_0, None if self.labels is None else self.labels[chosen]

    def _order(self, number: int) -> torch.Tensor:
        """The order of a pass; the last two are kept."""
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = torch.randperm(self.count, generator=generator(self._seed, number))
        return self._passes[number]


def scaled(x: torch.Tensor) -> torch.Tensor:
    """Puts uint8 images into [-1, 1], float32; what is float already stays."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def as_channels_first(images: NDArray[np.uint8]) -> torch.Tensor:
    """From uint8 [N, H, W, 3] to uint8 [N, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def hash_of(data: ImageSet) -> str:
    """sha256 over images, classes and names, which tells one set from another."""
    digest = hashlib.sha256(np.ascontiguousarray(data.images).data)
    digest.update(data.labels.tobytes())
    digest.update("\0".join(data.names).encode())
    return digest.hexdigest()
