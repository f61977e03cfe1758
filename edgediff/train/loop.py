"""The one training loop: learning rate, averaged weights, finite losses, progress, checkpoints.

What a task draws follows from its seed, the visit and the process, so a training that was killed goes on as if it had
not been. Checkpoints are written whole or not at all: a kill at any moment loses minutes and nothing else.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn

from edgediff.data.draws import mixed
from edgediff.errors import TargetError, TrainingError
from edgediff.train.claim import CHECKPOINTS
from edgediff_runtime.errors import one_line

# Told what is being done, and the share of it that is done.
Say = Callable[[str, float], None]
LOSS = "loss"
_PARTIAL = ".partial"
_NAME = re.compile(r"visit-\d{8}")
# Numbers that random draws are made under: those of an update's dropout begin here.
_DROPOUT = 1 << 30


def silent(what: str, share: float) -> None:
    """Tells nobody."""


def cosine(share: float) -> float:
    """A cosine's fall from 1 to 0 while `share` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))


def recent(losses: Sequence[float]) -> float:
    """Mean over the last tenth of the losses; NaN where there are none."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


@dataclass
class Progress:
    """How far a training has come: what a checkpoint holds beside weights, optimizer and random states.

    Attributes:
        visits: What checkpoints are numbered by.
        updates: Optimizer steps.
        losses: Of each update.
        terms: The loss's terms of each update, by name, before they are weighted.
        seconds: Spent so far, in all runs.
        identity: Of an adaptor: the identity adaptor's errors on the first round; empty before it.
        held_out: Of a UNet: update and held-out loss, now and then.
    """

    visits: int = 0
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    identity: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


class Task:
    """What a loop trains. A subclass says what is drawn and how the loss is taken, and changes what differs.

    Attributes:
        module: All that has weights to learn.
        optimizer: Of those weights.
        averaged: The part of `module` whose averaged weights are kept.
        settings: Have `learning_rate` and `seed`, and those of the fields below that are read from them.
        visits: How many there are; between two of them a checkpoint may be written.
        weights: What each term of the loss counts.
        ema: Decay of the averaged weights; None keeps the weights as they are.
        schedule: ``cosine`` down to zero at the end, or ``constant``.
        warmup: Updates in which the learning rate rises from 0.
        clip: Largest norm of the gradient.
        name: What messages begin with.
        advice: What to do after a loss that is not finite.
    """

    weights: Mapping[str, float] = {LOSS: 1.0}
    ema: float | None = None
    schedule = "constant"
    warmup = 0
    clip = math.inf
    name = ""
    advice = "go on from it"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, averaged: nn.Module, settings: Any, visits: int
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.averaged = averaged
        self.settings = settings
        self.visits = visits
        self.state = Progress()

    def batches(self, visit: int) -> Sequence[Any]:
        """What a visit learns from: for each of its updates, what `terms` takes."""
        return (visit,)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        """The terms of the loss of one update, scalars by name; `model` is `module` as it is to be called."""
        raise NotImplementedError

    def rate(self, update: int, total: int) -> float:
        """The learning rate's share of its highest, at one of `total` updates."""
        warmup = min(self.warmup, total)
        if update < warmup:
            return (update + 1) / warmup
        return 1.0 if self.schedule == "constant" else cosine((update - warmup) / max(1, total - warmup))

    def says(self, total: int) -> str:
        """What is told after a visit."""
        return f"{self.name}update {self.state.updates} of {total}: loss {recent(self.state.losses):.4f}"

    def after_visit(self, loop: "Loop") -> None:
        """Whatever is to be done between a visit and the checkpoint after it."""

    def after_all(self, loop: "Loop") -> None:
        """Whatever is to be done after the last checkpoint, before the averaged weights are taken."""

    def may_stop(self) -> bool:
        """Whether a training can go on from here: False where the next visit needs what this one drew."""
        return True

    def is_over(self) -> bool:
        """Whether the training ends before its last visit."""
        return False


class Loop:
    """Runs a task: updates, checkpoints, averaged weights.

    Attributes:
        state: How far it has come.
    """

    def __init__(
        self, accelerator: Accelerator, task: Task, path: Path | None = None, minutes: float = math.inf
    ) -> None:
        """Prepares model, optimizer and averaged weights.

        Args:
            accelerator: Where it runs; nothing is prepared with it, before `run` and afterwards.
            task: What is trained.
            path: The training's folder; None writes no checkpoints.
            minutes: Between checkpoints.
        """
        self.accelerator = accelerator
        self.task = task
        self.state = task.state
        self.folder = None if path is None else path / CHECKPOINTS
        self.minutes = minutes
        self.model, self.optimizer = accelerator.prepare(task.module, task.optimizer)
        self.ema = None if task.ema is None else EMAModel(task.averaged.parameters(), decay=task.ema)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        accelerator.register_for_checkpointing(*([] if self.ema is None else [self.ema]), self.state)
        self._saved = self._began = time.monotonic()

    def run(self, say: Say = silent) -> None:
        """Runs what is left of the training; the module ends in evaluation mode with the averaged weights.

        Raises:
            TargetError: The disk is full, or the newest checkpoint is damaged.
            TrainingError: The loss is not finite. The last good checkpoint is kept in all cases.
        """
        device = self.accelerator.device
        try:
            # Dropout draws from torch's own generator: it is seeded for every update, and given back as it was.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self._run(say)
        finally:
            # What is prepared goes into all checkpoints of an accelerator, also into those of what is trained next.
            self.accelerator.free_memory()
            self.accelerator._custom_objects.clear()

    def _run(self, say: Say) -> None:
        task, state = self.task, self.state
        self._resume()
        self.model.train()
        while state.visits < task.visits and not task.is_over():
            batches = task.batches(state.visits)
            total = task.visits * len(batches)
            for batch in batches:
                self._update(batch, total)
            state.visits += 1
            say(task.says(total), state.visits / task.visits)
            task.after_visit(self)
            if task.may_stop():
                self._save_when_due()
        self.save()
        task.after_all(self)
        if self.ema is not None:
            self.ema.copy_to(task.averaged.parameters())
        task.module.eval()

    def _update(self, batch: Any, total: int) -> None:
        task, state, accelerator = self.task, self.state, self.accelerator
        number = state.updates * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(mixed(task.settings.seed, _DROPOUT + number))
        for group in self.optimizer.param_groups:
            group["lr"] = task.settings.learning_rate * task.rate(state.updates, total)
        with accelerator.autocast():
            terms = task.terms(self.model, batch)
            loss: Any = sum(task.weights[name] * term for name, term in terms.items())
        shown = torch.stack([loss.detach(), *(term.detach().float() for term in terms.values())])
        mean, *values = accelerator.reduce(shown, reduction="mean").tolist()
        self._check_finite(mean, "loss")
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        self._check_finite(float(accelerator.clip_grad_norm_(self.model.parameters(), task.clip)), "gradient")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.step(task.averaged.parameters())
        state.updates += 1
        state.losses.append(mean)
        for name, value in zip(terms, values, strict=True):
            state.terms.setdefault(name, []).append(value)

    def _check_finite(self, number: float, what: str) -> None:
        if not math.isfinite(number):
            raise TrainingError(
                f"{self.task.name}the {what} is not finite at update {self.state.updates}; {self.kept()}; "
                f"{self.task.advice} with a lower learning_rate than {self.task.settings.learning_rate:g}"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights in place, in evaluation mode, for as long as the block takes."""
        assert self.ema is not None
        module = self.task.averaged
        self.ema.store(module.parameters())
        self.ema.copy_to(module.parameters())
        module.eval()
        try:
            yield
        finally:
            self.ema.restore(module.parameters())
            module.train()

    def count_time(self) -> None:
        """Adds the time since this was last called to what the training has taken."""
        now = time.monotonic()
        self.state.seconds += now - self._began
        self._began = now

    # Checkpoints

    def kept(self) -> str:
        """What is left to go on from, in words."""
        newest = self._newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint before it"

    def _newest(self) -> Path | None:
        """The newest whole checkpoint."""
        if self.folder is None or not self.folder.is_dir():
            return None
        return max((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), default=None)

    def _resume(self) -> None:
        newest = self._newest()
        if newest is None:
            return
        try:
            self.accelerator.load_state(str(newest))
        except Exception as e:  # a damaged file raises whatever its reader runs into
            raise TargetError(f"{newest} is damaged ({one_line(e)[:200]}); remove {self.folder} to start again") from e
        if self.ema is not None:  # it comes back on the CPU
            self.ema.to(self.accelerator.device)

    def _save_when_due(self) -> None:
        """Writes a checkpoint where the last one is old enough, by the clock of any process: all write it together."""
        due = torch.tensor(float(time.monotonic() - self._saved >= 60 * self.minutes), device=self.accelerator.device)
        if float(self.accelerator.reduce(due, reduction="sum")) > 0:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint, then removes the ones before it.

        Raises:
            TargetError: It cannot be written.
        """
        self.count_time()
        self._saved = self._began
        if self.folder is None:
            return
        final = self.folder / f"visit-{self.state.visits:08d}"
        if final.exists():
            return
        partial = final.with_suffix(_PARTIAL)
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except (SafetensorError, RuntimeError, OSError) as e:
            # torch and safetensors have their own errors for a full disk.
            raise TargetError(f"{partial} cannot be written: {one_line(e)[:200]}; {self.kept()}") from e
        self.accelerator.wait_for_everyone()
        if main:
            os.replace(partial, final)
            for old in self.folder.glob("visit-*"):
                if old != final and old.is_dir():
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
