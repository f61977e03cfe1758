"""A store of what a training learns from again and again: drawn once, kept on disk until the training is finished."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from edgediff.errors import ConfigError, TargetError
from edgediff.outputs import write_whole
from edgediff.train.claim import STORE, writing

GB = 1e9

Tensors = dict[str, torch.Tensor]


class Store:
    """A folder with a file, complete or absent, for each entry; a resumed training uses them again."""

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        entries: int,
        what: str,
        bound_gb: float | None = None,
        advice: str = "",
    ) -> None:
        """Begins with what is there already; each process has a store of its own.

        Args:
            path: The training's folder.
            entries: How many there will be in each process.
            what: What an entry is called, in the plural.
            bound_gb: Most GB that those of all processes may take; None leaves that to the disk.
            advice: What to do where they would take more.
        """
        self.folder = path / STORE / f"process-{accelerator.process_index}"
        self.processes, self.entries, self.what = accelerator.num_processes, entries, what
        self.bound = None if bound_gb is None else int(bound_gb * GB)
        self.advice = advice

    def get(self, index: int, draw: Callable[[], Tensors], device: torch.device) -> Tensors:
        """Reads an entry, or draws and stores it; `draw` gives contiguous tensors, as they are read.

        Raises:
            ConfigError: All entries would take more than the bound; nothing is stored then.
            TargetError: The disk has less room than they take, is full, or the entry's file is damaged.
        """
        path = self.folder / f"{index:06d}.safetensors"
        if path.exists():
            try:
                return load_file(path, device=str(device))
            except SafetensorError as e:
                raise TargetError(f"{path} is damaged ({e}); remove the file to draw it again") from e
        drawn = draw()
        self._check(sum(tensor.nbytes for tensor in drawn.values()))
        data = save({name: tensor.cpu() for name, tensor in drawn.items()})
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda scratch: scratch.write_bytes(data))
        return drawn

    def _check(self, size: int) -> None:
        count = self.entries * self.processes
        total, store = size * count, self.folder.parent
        said = f"{count} {self.what} of {size / GB:.3g} GB take {total / GB:.3g} GB"
        if self.bound is not None and total > self.bound:
            raise ConfigError(f"{said}, more than store_gb: {self.bound / GB:.3g}; {self.advice}")
        held = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        free = shutil.disk_usage(next(p for p in (store, *store.parents) if p.is_dir())).free
        if total - held > free:
            raise TargetError(f"{said}; the disk has {free / GB:.3g} GB left: make room, or ask for fewer {self.what}")
