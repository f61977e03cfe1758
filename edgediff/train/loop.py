"""The one training loop: learning rate, averaged weights, finite losses, progress, checkpoints.

All random draws follow from the seed, the visit and the process, so a training that was killed and resumed ends with
the weights of one that was not. A checkpoint is written completely or not at all.
"""

import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from edgediff.data.batches import mixed
from edgediff.errors import TargetError, TrainingError
from edgediff.train.claim import CHECKPOINTS, check_output, writing
from edgediff_runtime.errors import one_line

# Called with what is being done, and the share of it that is done.
Say = Callable[[str, float], None]
LOSS = "loss"
_CHECKPOINT = "visit-" + 8 * "[0-9]"
# Dropout's numbers begin here, apart from those of a task's other draws.
_DROPOUT = 1 << 30


def silent(what: str, share: float) -> None:
    """Reports nothing."""


def begin(path: Path, progress: Say | None, precision: str | None = None) -> tuple[Accelerator, Say]:
    """Makes the accelerator of a training in a folder, and what reports its progress: in the main process alone.

    `precision` is ``fp32``, ``bf16`` or ``auto``; None is what `accelerate launch` was given.

    Raises:
        TargetError: The folder cannot be written, or another training runs there.
    """
    if precision == "auto":
        precision = "bf16" if is_fast_in_bf16() else "fp32"
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    check_output(path, accelerator)
    return accelerator, progress if progress is not None and accelerator.is_main_process else silent


def is_fast_in_bf16() -> bool:
    """Whether this machine multiplies matrices faster in bf16: an NVIDIA GPU, or a CPU with AMX."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def cosine(share: float) -> float:
    """Falls from 1 to 0 while `share` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * share))


def recent(losses: Sequence[float]) -> float:
    """Mean over the last tenth of the losses; NaN where there are none."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


@dataclass
class Progress:
    """How far a training has come: what a checkpoint has beside weights, optimizer and random states.

    Attributes:
        visits: Checkpoints are numbered by them.
        updates: Optimizer steps.
        losses: Of each update.
        terms: The loss's terms of each update, by name, unweighted.
        seconds: Spent so far, in all runs.
        identity: The identity adaptor's errors on the first round, where an adaptor is trained.
        held_out: Updates and held-out losses, where a UNet is trained.
    """

    visits: int = 0
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    identity: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        vars(self).update(state)


class Task(ABC):
    """What a loop trains. A subclass says what is drawn and how the loss is computed.

    Attributes:
        module: Everything with weights to learn; it may consist of several modules.
        averaged: The part of `module` whose averaged weights are the result.
        settings: Have `learning_rate` and `seed`; their `ema`, `schedule`, `warmup` and `clip` replace those below.
        visits: How many there are; between two of them a checkpoint may be written.
        weights: Weight of each term of the loss.
        ema: Decay of the averaged weights; None averages none.
        warmup: Updates in which the learning rate rises from 0.
        clip: Largest norm of the gradient.
        name: What messages begin with.
    """

    weights: Mapping[str, float] = {LOSS: 1.0}
    ema: float | None = None
    schedule = "constant"
    warmup = 0
    clip = math.inf
    name = ""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Any,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        averaged: nn.Module,
        visits: int,
    ) -> None:
        self.accelerator = accelerator
        self.device = accelerator.device
        self.settings = settings
        self.module = module
        self.optimizer = optimizer
        self.averaged = averaged
        self.visits = visits
        self.state = Progress()
        for name in ("ema", "schedule", "warmup", "clip"):
            setattr(self, name, getattr(settings, name, getattr(self, name)))

    def number(self, index: int) -> int:
        """Numbers an update or a round: another number in each process."""
        return int(index * self.accelerator.num_processes + self.accelerator.process_index)

    def batches(self, visit: int) -> Sequence[Any]:
        """What `terms` takes, for each update of a visit."""
        return (visit,)

    @abstractmethod
    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        """The terms of the loss of one update, scalars by name; `model` is `module` as it is to be called."""

    def rate(self, update: int, total: int) -> float:
        """The learning rate's share of its highest, at one of `total` updates."""
        warmup = min(self.warmup, total)
        if update < warmup:
            return (update + 1) / warmup
        return 1.0 if self.schedule == "constant" else cosine((update - warmup) / max(1, total - warmup))

    def says(self, total: int) -> str:
        """What is reported after a visit."""
        return f"{self.name}update {self.state.updates} of {total}: loss {recent(self.state.losses):.4f}"

    def after_visit(self, loop: "Loop") -> None:  # noqa: B027 - most tasks have nothing to do here
        """Called between a visit and the checkpoint after it."""

    def after_all(self, loop: "Loop") -> None:  # noqa: B027
        """Called after the last checkpoint, before the averaged weights are taken."""

    def may_stop(self) -> bool:
        """Whether a training can resume from here: False where the next visit needs what this one drew."""
        return True

    def is_over(self) -> bool:
        """Whether the training ends before its last visit."""
        return False


class MeasuredTask(Task):
    """A task whose averaged weights are measured on held-out data every `sample_every` updates, and at the end."""

    @abstractmethod
    def measure(self, loop: "Loop") -> float:
        """Takes the held-out loss, and draws curves and samples; called in the main process alone."""

    def after_visit(self, loop: "Loop") -> None:
        """Measures where it is time to."""
        every = self.settings.sample_every
        if every is not None and self.state.updates % every == 0:
            self._measure(loop)

    def after_all(self, loop: "Loop") -> None:
        """Measures the end, unless that has been done."""
        if not self.state.held_out or self.state.held_out[-1][0] != self.state.updates:
            self._measure(loop)

    def _measure(self, loop: "Loop") -> None:
        held_out = self.measure(loop) if self.accelerator.is_main_process else math.nan
        # On every process, since it decides whether this runs again at the end.
        self.state.held_out.append((self.state.updates, held_out))
        self.accelerator.wait_for_everyone()


class Loop:
    """Runs a task: updates, checkpoints, averaged weights; `state` is how far it has come."""

    def __init__(self, task: Task, path: Path | None = None) -> None:
        """Prepares model, optimizer and averaged weights; nothing else is prepared with the task's accelerator.

        `path` is the training's folder; None writes no checkpoints.
        """
        self.task, self.state, self.accelerator = task, task.state, task.accelerator
        self.folder = None if path is None else path / CHECKPOINTS
        self.model, self.optimizer = self.accelerator.prepare(task.module, task.optimizer)
        self.ema = None if task.ema is None else EMAModel(task.averaged.parameters(), decay=task.ema)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(*([] if self.ema is None else [self.ema]), self.state)
        self._saved = self._began = time.monotonic()

    def run(self, say: Say = silent) -> None:
        """Runs what is left of the training; the module ends in evaluation mode with the averaged weights.

        Raises:
            TargetError: The disk is full, or the newest checkpoint is damaged.
            TrainingError: The loss is not finite. The last good checkpoint is kept in all cases.
        """
        device = self.accelerator.device
        try:
            # Dropout draws from torch's own generator: it is seeded for every update, and restored at the end.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self._run(say)
        finally:
            # Otherwise what is prepared is in the checkpoints of what the accelerator trains next.
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
            if self.folder is not None and task.may_stop():
                self._save_when_due()
        self._save()
        task.after_all(self)
        if self.ema is not None:
            self.ema.copy_to(task.averaged.parameters())
        task.module.eval()

    def _update(self, batch: Any, total: int) -> None:
        task, state, accelerator = self.task, self.state, self.accelerator
        torch.manual_seed(mixed(task.settings.seed, _DROPOUT + task.number(state.updates)))
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
        if math.isfinite(number):
            return
        settings = self.task.settings
        resumes = self._newest() is not None and "learning_rate" in settings.free
        raise TrainingError(
            f"{self.task.name}the {what} is not finite at update {self.state.updates}; {self.kept()}; "
            f"{'resume from it' if resumes else 'start again'} with a lower learning_rate than "
            f"{settings.learning_rate:g}"
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights in place, in evaluation mode, until the block ends."""
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
        """Adds the time since the last call to what the training has taken."""
        now = time.monotonic()
        self.state.seconds += now - self._began
        self._began = now

    # Checkpoints

    def kept(self) -> str:
        """What is left to resume from, in words."""
        newest = self._newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint before it"

    def _newest(self) -> Path | None:
        found = [] if self.folder is None else [p for p in self.folder.glob(_CHECKPOINT) if p.is_dir()]
        return max(found, default=None)

    def _resume(self) -> None:
        newest = self._newest()
        if newest is None:
            return
        try:
            self.accelerator.load_state(str(newest))
        except Exception as e:  # a damaged file raises whatever its reader runs into
            raise TargetError(f"{newest} is damaged ({one_line(e)[:200]}); remove {self.folder} to start again") from e
        if self.ema is not None:  # it is read to the CPU
            self.ema.to(self.accelerator.device)

    def _save_when_due(self) -> None:
        """Writes a checkpoint where the last one is old enough by the clock of any process: all write it together."""
        old = time.monotonic() - self._saved >= 60 * self.task.settings.checkpoint_minutes
        due = torch.tensor(float(old), device=self.accelerator.device)
        if float(self.accelerator.reduce(due, reduction="sum")) > 0:
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint, then removes those before it."""
        self.count_time()
        self._saved = self._began
        if self.folder is None:
            return
        final = self.folder / f"visit-{self.state.visits:08d}"
        if final.exists():
            return
        partial = final.with_suffix(".partial")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(partial, self.kept()):
            self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if main:
            os.replace(partial, final)
            for old in self.folder.glob("visit-*"):
                if old != final and old.is_dir():
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
