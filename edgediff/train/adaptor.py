"""Training an adaptor on unrolled trajectories (Clockwork Diffusion, section 3.3).

Only the adaptor learns: on the steps that the clock calls cached, its prediction is drawn towards the low-resolution
feature that a full step makes. Losses are given relative to the identity's, so that 1 is what there was without it.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from edgediff.data.draws import generator
from edgediff.errors import ConfigError, TrainingError
from edgediff.models.adaptors import LearnedAdaptor
from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model
from edgediff.models.trained import FORMAT, RECORD, AdaptorRecord, save_adaptor
from edgediff.outputs import check_drawing
from edgediff.train.adaptor_card import adaptor_card
from edgediff.train.checkpoint import Checkpoints
from edgediff.train.claim import STORE, Claim, check_place, claim_place, clear_place, is_finished
from edgediff.train.curve import draw_losses
from edgediff.train.gain import Gain, measure_gain
from edgediff.train.progress import Progress, Say, recent, silent
from edgediff.train.rollout import TARGET, Rollouts, Samples
from edgediff.train.settings import AdaptorTraining, check_training
from edgediff.train.store import Store
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.manifest import TrainedFor

FREE = ("learning_rate", "checkpoint_minutes", "store_gb")
FREE_AFTER = ("checkpoint_minutes", "store_gb")
LOSSES = "loss.png"
CARD = "README.md"


@dataclass
class AdaptorProgress(Progress):
    """How far a training of an adaptor has come.

    Attributes:
        identity: The identity adaptor's errors on the first round; empty before it.
    """

    identity: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """What became of a training.

    Attributes:
        path: The adaptor's folder.
        gain: What the adaptor is worth on unseen seeds.
        updates: How many there were.
        loss: Mean over the last tenth of the updates, relative to the identity's.
    """

    path: Path
    gain: Gain
    updates: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Updates, loss and gain as plain data."""
        return {"updates": self.updates, "loss": self.loss, "gain": asdict(self.gain)}


def train_adaptor(
    model: Model, path: str | Path, settings: AdaptorTraining | None = None, *, progress: Say | None = None
) -> Training | None:
    """Trains an adaptor, or goes on where an interrupted training of the same settings stopped.

    Args:
        model: What it is to serve; left as it was, but moved to the device where training runs.
        path: Where the adaptor is to be.
        settings: What is asked for.
        progress: Told what is being done, and the share of it that is done.

    Returns:
        What became of it; None where the adaptor is there already.

    Raises:
        ConfigError: The settings do not fit the model, or the trajectories do not fit the store's bound.
        ModelError: The model has no weights or no scheduler.
        UnsupportedError: It cannot be divided so, or no such adaptor fits.
        TargetError: Something else is in the folder, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
    """
    settings = check_training(AdaptorTraining() if settings is None else settings)
    say: Say = progress if progress is not None else silent
    path = Path(path)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights: there is nothing to learn from")
    model.check_schedule()
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        say = silent
    claim = _claim(settings, model, accelerator.num_processes)
    check_place(path, claim)
    if is_finished(path, claim):
        clear_place(path)
        return None
    check_drawing("drawing the loss curve")
    shape = adaptor_shape(split(model.unet, settings.cut), model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adaptor = LearnedAdaptor(settings.adaptor, shape, settings.takes_text)
    divided = split(model.unet, settings.cut, adaptor).to(accelerator.device)
    adaptor.train()
    rollouts = Rollouts(model, divided, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        claim_place(path, claim)
    accelerator.wait_for_everyone()
    loop = _Loop(accelerator, divided, adaptor, rollouts, settings, path)
    loop.run(say)
    loop.checkpoints.save()
    loop.ema.copy_to(adaptor.parameters())
    adaptor.eval()
    say("measuring the gain on unseen seeds", 1.0)
    gain = measure_gain(model, divided, rollouts)
    state = loop.state
    if accelerator.is_main_process:
        record = AdaptorRecord(
            edgediff_adaptor=FORMAT,
            kind=settings.adaptor,
            takes_text=settings.takes_text,
            model=model.name,
            model_sha256=model.sha256,
            cut=settings.cut,
            highres=shape.highres,
            lowres=shape.lowres,
            emb=shape.emb,
            text=shape.text if settings.takes_text else None,
            trained_for=TrainedFor(
                num_inference_steps=settings.steps,
                scheduler=settings.scheduler,
                clock=settings.clock,
                mask=tuple(int(full) for full in rollouts.mask),
                guidance_scale=rollouts.guidance,
            ),
            rollout=settings.rollout,
        )
        _draw(state.losses, settings, path / LOSSES)
        loop.checkpoints.count_time()
        card = adaptor_card(record, model, settings, gain, state.losses, state.seconds, accelerator)
        (path / CARD).write_text(card, encoding="utf-8")
        save_adaptor(adaptor, record, path)
        clear_place(path)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Training(path, gain, state.updates, recent(state.losses))


def is_main_process() -> bool:
    """Whether this process is the one that speaks: of several that train together, the first."""
    return bool(PartialState().is_main_process)


def _claim(settings: AdaptorTraining, model: Model, processes: int) -> Claim:
    sources = {"another model": model.sha256}
    if settings.conditioning is not None:
        sources[f"other embeddings in {settings.conditioning}"] = sha256_of(Path(settings.conditioning))
    return Claim(settings, sources, processes, product=RECORD, free=FREE, free_after=FREE_AFTER)


def _draw(losses: list[float], settings: AdaptorTraining, path: Path) -> None:
    title = (
        f"{settings.adaptor} adaptor, {settings.steps} steps of {settings.scheduler}, clock {settings.clock}, "
        f"{settings.rollout} rollout"
    )
    what = "loss, relative to the identity's"
    draw_losses({"loss": losses}, path, title, what, level=(1.0, "the identity adaptor"))


class _Loop:
    """Rounds, updates and checkpoints."""

    def __init__(
        self,
        accelerator: Accelerator,
        divided: SplitUNet,
        adaptor: LearnedAdaptor,
        rollouts: Rollouts,
        settings: AdaptorTraining,
        path: Path,
    ) -> None:
        self.accelerator = accelerator
        self.divided = divided
        self.rollouts = rollouts
        self.settings = settings
        self.model, self.optimizer = accelerator.prepare(
            adaptor, torch.optim.Adam(adaptor.parameters(), lr=settings.learning_rate)
        )
        self.ema = EMAModel(adaptor.parameters(), decay=settings.ema)
        self.state = AdaptorProgress()
        self.checkpoints = Checkpoints(path, accelerator, self.ema, self.state, settings.checkpoint_minutes)
        self.store = None
        if settings.store_gb is not None:
            folder = path / STORE / f"process-{accelerator.process_index}"
            share = settings.store_gb / accelerator.num_processes
            self.store = Store(folder, share, settings.rounds)

    def run(self, say: Say) -> None:
        """Runs what is left of the training."""
        settings, state = self.settings, self.state
        self.checkpoints.load()
        visits = settings.rounds * settings.passes
        while state.visits < visits:
            # What is stored is seen whole in each pass; what is not, is learnt from at once.
            stored = self.store is not None
            index = state.visits % settings.rounds if stored else state.visits // settings.passes
            if stored or state.visits % settings.passes == 0:
                samples = self._samples(index)
            count = len(samples[TARGET])
            total = visits * math.ceil(count / settings.batch)
            if not state.identity:
                state.identity = self._identity(samples)
            order = torch.randperm(count, generator=generator(settings.seed, state.visits))
            for first in range(0, count, settings.batch):
                chosen = order[first : first + settings.batch]
                batch = {name: tensor[chosen.to(tensor.device)] for name, tensor in samples.items()}
                self._update(batch, state.updates / total)
            state.visits += 1
            done = state.visits / visits
            say(f"update {state.updates} of {total}: loss {recent(state.losses):.4f} of the identity's", done)
            # Not between the passes of a round: a student that has moved on would not draw it again.
            if stored or state.visits % settings.passes == 0:
                self.checkpoints.save_when_due()

    def _samples(self, index: int) -> Samples:
        accelerator = self.accelerator
        number = index * accelerator.num_processes + accelerator.process_index
        if self.store is None:
            return self.rollouts.draw(number)
        return self.store.get(index, lambda: self.rollouts.draw(number), accelerator.device)

    def _update(self, batch: Samples, done: float) -> None:
        settings, state = self.settings, self.state
        share = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        prediction = self.model(*(batch[name] for name in self.rollouts.split.adaptor.inputs))[0]
        errors = self._errors(prediction, batch)
        loss = errors[0] / state.identity[0]
        if settings.output_weight:
            loss = loss + settings.output_weight * errors[1] / state.identity[1]
        shown = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(shown):
            raise TrainingError(
                f"the loss is not finite at update {state.updates} (round {state.visits // settings.passes}); "
                f"{self.checkpoints.kept()}; go on from it with a lower learning_rate than {settings.learning_rate:g}"
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.ema.step(self.accelerator.unwrap_model(self.model).parameters())
        state.updates += 1
        state.losses.append(shown)

    def _errors(self, prediction: torch.Tensor, batch: Samples) -> list[torch.Tensor]:
        """Mean squared error of the low-resolution feature and, where it counts, of the output."""
        errors = [F.mse_loss(prediction, batch[TARGET])]
        if self.settings.output_weight:
            part = self.divided.highres_out
            given = {**batch, "lowres_feature": prediction}
            errors.append(F.mse_loss(part(*(given[name] for name in part.inputs))[0], batch["out_sample"]))
        return errors

    @torch.no_grad()
    def _identity(self, samples: Samples) -> list[float]:
        """The errors of the identity adaptor on the first round: the unit of the losses."""
        errors = torch.stack(self._errors(samples["cache"], samples))
        return [max(float(error), 1e-12) for error in self.accelerator.reduce(errors, reduction="mean")]
