"""A store of what a training learns from again and again: drawn once, kept on disk until the training is finished."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from edgediff.errors import ConfigError, TargetError
from edgediff.outputs import write_whole
from edgediff.train.claim import STORE

GB = 1e9

Tensors = dict[str, torch.Tensor]


class Store:
    """A folder with a file, complete or absent, for each entry; a resumed training uses them again."""

    def __init__(self, path: Path, process: int, entries: int, what: str, bound_gb: float | None = None) -> None:
        """Begins with what is there already.

        Args:
            path: The training's folder.
            process: Each process has a store of its own.
            entries: How many there will be.
            what: What an entry is called, in the plural.
            bound_gb: Most GB that they may take, in this process; None leaves that to the disk.
        """
        self.folder = path / STORE / f"process-{process}"
        self.entries, self.what = entries, what
        self.bound = None if bound_gb is None else int(bound_gb * GB)

    def get(self, index: int, draw: Callable[[], Tensors], device: torch.device) -> Tensors:
        """Reads an entry, or draws and stores it.

        Raises:
            ConfigError: All entries would take more than the bound; nothing is stored then.
            TargetError: The disk has less room than they take, or the entry's file is damaged.
        """
        path = self.folder / f"{index:06d}.safetensors"
        if path.exists():
            try:
                return load_file(path, device=str(device))
            except SafetensorError as e:
                raise TargetError(f"{path} is damaged ({e}); remove the file to draw it again") from e
        drawn = draw()
        self._check(sum(tensor.nbytes for tensor in drawn.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save({name: tensor.cpu().contiguous() for name, tensor in drawn.items()})
        write_whole(path, lambda scratch: scratch.write_bytes(data))
        return drawn

    def _check(self, size: int) -> None:
        total = size * self.entries
        said = f"{self.entries} {self.what} of {size / GB:.3g} GB take {total / GB:.3g} GB"
        if self.bound is not None and total > self.bound:
            raise ConfigError(
                f"{said}, more than store_gb: {self.bound / GB:.3g}; raise it, ask for fewer {self.what}, "
                "or leave it out: what is learnt from is then drawn anew"
            )
        held = sum(file.stat().st_size for file in self.folder.iterdir()) if self.folder.is_dir() else 0
        free = shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.is_dir())).free
        if total - held > free:
            raise TargetError(f"{said}; the disk has {free / GB:.3g} GB left")
