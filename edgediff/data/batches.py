"""Images as a training draws them: everything random follows from a seed and a number, so that it can be resumed."""

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.data.image_folder import ImageSet

# 2^32 over the golden ratio: seeds are far apart, and seed 0 is the number itself.
_APART = 0x9E3779B9
# torch's generator on the CPU takes no more of a seed than this.
_BITS = 2**32
# What captions are called in a batch.
TOKENS = "input_ids"


def generator(seed: int, number: int) -> torch.Generator:
    """A generator on the CPU, another one for each seed and number (of an update or a pass, below 2^32)."""
    return torch.Generator().manual_seed(mixed(seed, number))


def mixed(seed: int, number: int) -> int:
    """One seed, 0 to 2^32 - 1, of a training's and a number below 2^32."""
    return (number + seed * _APART) % _BITS


class Wordings:
    """Token ids of captions, for batches to draw: an image has one or more forms, and a form one or more wordings."""

    def __init__(self, ids: torch.Tensor, forms: torch.Tensor, cut: int = 0) -> None:
        """Takes ids, int64 [M, S], the empty caption's first, and int64 [N, F, 2]: each form's first row and number.

        `cut` is how many captions were too long.
        """
        self.ids, self.forms, self.cut = ids, forms, cut

    def take(self, chosen: torch.Tensor, choice: torch.Tensor | None, drop: torch.Tensor | None) -> torch.Tensor:
        """Token ids, int64 [B, S], of the images of these indices.

        `choice`, [B, 2] from 0 to below 1, picks a form and a wording of it, None the first; `drop` makes empty.
        """
        choice = torch.zeros(len(chosen), 2) if choice is None else choice
        form = (choice[:, 0] * self.forms.shape[1]).long()
        first, count = self.forms[chosen, form].unbind(1)
        rows = first + (choice[:, 1] * count).long()
        return self.ids[rows if drop is None else torch.where(drop, 0, rows)]


class Batches:
    """Images (or latents) with their conditioning, drawn without replacement within each pass."""

    def __init__(
        self,
        x_0: torch.Tensor,
        cond: Mapping[str, torch.Tensor],
        seed: int,
        *,
        mirrored: torch.Tensor | None = None,
        null: Mapping[str, torch.Tensor] | None = None,
        wordings: Wordings | None = None,
    ) -> None:
        """Takes the data and the seed of the order.

        Args:
            x_0: float32 or uint8 [N, C, H, W].
            cond: Conditioning by name, each [N, ...].
            mirrored: The mirrored images, where mirroring `x_0` would not give them: their latents.
            null: The unconditional row of each `cond`, [...]; None where the model has none.
            wordings: Captions, which come as `TOKENS`.
        """
        self.x_0, self.mirrored = x_0, mirrored
        self.cond, self.null = cond, {} if null is None else null
        self.wordings = wordings
        self.count = len(x_0)
        self._seed = seed
        self._passes: dict[int, torch.Tensor] = {}

    def take(
        self,
        first: int,
        size: int,
        flips: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        choice: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Takes `size` images, beginning with number `first` of the endless sequence of shuffled passes.

        `flips` and `drop`, bool [size], say which of them are mirrored and which are made unconditional; `choice` is
        the wordings'.

        Returns:
            float32 [size, C, H, W], in [-1, 1] for images, and the conditioning by name, [size, ...].
        """
        places = range(first, first + size)
        chosen = torch.stack([self._order(place // self.count)[place % self.count] for place in places])
        x_0 = scaled(self.x_0[chosen])
        if flips is not None:
            other = x_0.flip(3) if self.mirrored is None else scaled(self.mirrored[chosen])
            x_0 = torch.where(flips.reshape(-1, 1, 1, 1), other, x_0)
        cond = {name: rows[chosen] for name, rows in self.cond.items()}
        if drop is not None:
            for name, row in self.null.items():
                cond[name] = torch.where(drop.reshape(-1, *(1,) * row.dim()), row, cond[name])
        if self.wordings is not None:
            cond[TOKENS] = self.wordings.take(chosen, choice, drop)
        return x_0, cond

    def _order(self, number: int) -> torch.Tensor:
        """The order of a pass; the last two are kept."""
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = torch.randperm(self.count, generator=generator(self._seed, number))
        return self._passes[number]


def scaled(x: torch.Tensor) -> torch.Tensor:
    """Scales uint8 images to [-1, 1], float32; what is float already stays."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def as_channels_first(images: NDArray[np.uint8]) -> torch.Tensor:
    """From uint8 [N, H, W, 3] to uint8 [N, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def hash_of(data: ImageSet) -> str:
    """sha256 over images, classes, names and captions."""
    digest = hashlib.sha256(np.ascontiguousarray(data.images).data)
    digest.update(data.labels.tobytes())
    digest.update("\0".join(data.names).encode())
    if data.captions:
        digest.update(msgspec.json.encode(data.captions))
    return digest.hexdigest()
