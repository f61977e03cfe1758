"""Trajectories on disk, within a bound: drawn once, learnt from in every pass."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from edgediff.errors import ConfigError, TargetError
from edgediff.train.rollout import Samples

GB = 1e9


class Store:
    """A folder with one file for each round of trajectories.

    What an interrupted training left is used again: a file is there whole or not at all.
    """

    def __init__(self, folder: Path, bound_gb: float, rounds: int) -> None:
        """Opens a store.

        Args:
            folder: Made where it is missing.
            bound_gb: What it may take, in GB.
            rounds: How many rounds will be stored.
        """
        self.folder = folder
        self.bound = int(bound_gb * GB)
        self.rounds = rounds

    def get(self, index: int, draw: Callable[[], Samples], device: torch.device) -> Samples:
        """Reads a round, or draws and stores it.

        Args:
            index: Its number.
            draw: Draws it.
            device: Where its tensors are to live.

        Returns:
            The samples.

        Raises:
            ConfigError: All rounds would take more than the bound; nothing is stored then.
            TargetError: The disk has less room than they take.
        """
        path = self.folder / f"round-{index:06d}.safetensors"
        if path.exists():
            try:
                return load_file(path, device=str(device))
            except SafetensorError as e:
                raise TargetError(f"{path} is damaged ({e}); remove the file, it is drawn anew") from e
        samples = draw()
        self._check(sum(tensor.nbytes for tensor in samples.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in samples.items()}))
        os.replace(partial, path)
        return samples

    def _check(self, size: int) -> None:
        total = size * self.rounds
        if total > self.bound:
            raise ConfigError(
                f"{self.rounds} rounds of {size / GB:.3g} GB take {total / GB:.3g} GB, more than store_gb: "
                f"{self.bound / GB:.3g}; raise it, ask for fewer rounds or images, or leave it out: trajectories are "
                "then made anew in each round"
            )
        held = sum(file.stat().st_size for file in self.folder.iterdir()) if self.folder.is_dir() else 0
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.is_dir())).free
        if total - held > free:
            raise TargetError(f"the trajectories take {total / GB:.3g} GB; the disk has {free / GB:.3g} GB left")
