"""Checkpoints of a training, written whole or not at all: a kill at any moment loses minutes and nothing else."""

import os
import pickle
import re
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from edgediff.errors import TargetError
from edgediff.models.load import one_line
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.progress import Progress

PARTIAL = ".partial"
NAME = re.compile(r"visit-\d{8}")


class Checkpoints:
    """The checkpoints in a training's folder; the newest is kept, and the one before it until that is whole."""

    def __init__(self, path: Path, accelerator: Accelerator, ema: EMAModel, state: Progress, minutes: float) -> None:
        """Registers what a checkpoint holds beside model, optimizer and random states.

        Args:
            path: The training's folder.
            accelerator: What prepared model and optimizer.
            ema: The averaged weights.
            state: How far the training has come.
            minutes: Between checkpoints.
        """
        self.folder = path / CHECKPOINTS
        self.accelerator = accelerator
        self.state = state
        self.minutes = minutes
        self._last = time.monotonic()
        self._began = self._last
        ema.to(accelerator.device)
        self.ema = ema
        accelerator.register_for_checkpointing(ema, state)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        if not self.folder.is_dir():
            return None
        return max((p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), default=None)

    def kept(self) -> str:
        """What is left to go on from, in words."""
        newest = self.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint before it"

    def load(self) -> None:
        """Goes on from the newest checkpoint, where there is one.

        Raises:
            TargetError: It is damaged.
        """
        newest = self.newest()
        if newest is None:
            return
        try:
            self.accelerator.load_state(str(newest))
        except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
            raise TargetError(f"{newest} is damaged ({one_line(e)[:200]}); remove {self.folder} to begin anew") from e
        # What is registered comes back on the CPU.
        self.ema.to(self.accelerator.device)

    def save_when_due(self) -> None:
        """Writes a checkpoint where the last one is old enough, by any process's watch: all write it together."""
        due = torch.tensor(float(time.monotonic() - self._last >= 60 * self.minutes), device=self.accelerator.device)
        if float(self.accelerator.reduce(due, reduction="sum")) > 0:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint, then removes the ones before it.

        Raises:
            TargetError: It cannot be written: the disk is full, or not to be written to.
        """
        self.count_time()
        self._last = time.monotonic()
        final = self.folder / f"visit-{self.state.visits:08d}"
        if final.exists():
            return
        partial = final.with_suffix(PARTIAL)
        if self.accelerator.is_main_process and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except (SafetensorError, RuntimeError, OSError) as e:
            # torch and safetensors have errors of their own for a full disk.
            raise TargetError(f"{partial} cannot be written: {one_line(e)[:200]}; {self.kept()}") from e
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(partial, final)
            for old in self.folder.glob("visit-*"):
                if old != final and old.is_dir():
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def count_time(self) -> None:
        """Adds the time since this was last called to what the training has taken."""
        now = time.monotonic()
        self.state.seconds += now - self._began
        self._began = now
