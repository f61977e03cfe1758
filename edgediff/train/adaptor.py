"""Training an adaptor on unrolled trajectories (Clockwork Diffusion, section 3.3).

Only the adaptor learns: on cached steps, its prediction is drawn towards the low-resolution feature that a full step
makes. Losses are relative to those of the identity, so that 1 is no better than no adaptor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from edgediff.data.batches import generator
from edgediff.errors import ConfigError
from edgediff.models.adaptors import LearnedAdaptor
from edgediff.models.clockwork import split
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model
from edgediff.models.trained import FORMAT, RECORD, AdaptorRecord, save_adaptor
from edgediff.outputs import check_drawing
from edgediff.train.claim import Claim
from edgediff.train.gain import Gain, measure_gain
from edgediff.train.loop import Loop, Say, Task, begin, recent
from edgediff.train.rollout import TARGET, Rollouts, Samples, conditioning_sources
from edgediff.train.settings import AdaptorTraining, FewStepsTraining, check_training
from edgediff.train.store import Store
from edgediff.train.training_card import CARD, LOSSES, adaptor_card, draw_losses
from edgediff_runtime.manifest import TrainedFor

FEATURE, OUTPUT = "feature", "output"


@dataclass(frozen=True)
class AdaptorTrained:
    """The result of a training.

    Attributes:
        gain: What the adaptor is worth on unseen seeds.
        loss: Mean over the last tenth of the updates, relative to the identity's.
    """

    path: Path
    gain: Gain
    updates: int
    loss: float


def train_adaptor(
    model: Model, path: str | Path, settings: AdaptorTraining | None = None, *, progress: Say | None = None
) -> AdaptorTrained | None:
    """Trains an adaptor in the folder `path`, or resumes an interrupted training of the same settings.

    The model is moved to the device where training runs, and otherwise left as it was.

    Returns:
        None where the adaptor is there already.

    Raises:
        ConfigError: The settings do not fit the model, or the trajectories do not fit the store's bound.
        ModelError: The model has no weights or no scheduler.
        UnsupportedError: It cannot be divided so, or no such adaptor fits.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
    """
    settings = check_training(AdaptorTraining() if settings is None else settings)
    path = Path(path)
    accelerator, say = begin(path, progress)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights: there is nothing to learn from")
    model.check_schedule()
    sources = {"another model": model.sha256} | conditioning_sources(model, settings.conditioning)
    claim = Claim(path, RECORD, settings, sources, accelerator)
    if claim.is_done():
        return None
    check_drawing("drawing the loss curve")
    adaptor = new_adaptor(model, settings)
    rollouts = Rollouts(model, split(model.unet, settings.cut, adaptor).to(accelerator.device), settings)
    with claim.locked():
        task = _AdaptorTask(accelerator, rollouts, path)
        loop = Loop(task, path)
        loop.run(say)
        say("measuring the gain on unseen seeds", 1.0)
        gain = measure_gain(model, rollouts)
        if accelerator.is_main_process:
            loop.count_time()
            record = record_of(model, settings, rollouts.trained_for, settings.rollout)
            draw_losses(
                {"loss": task.state.losses},
                path / LOSSES,
                f"{settings.adaptor} adaptor, {rollouts.steps} steps of {rollouts.sampler}, clock {settings.clock}, "
                f"{settings.rollout} rollout",
                "loss, relative to the identity's",
                level=(1.0, "the identity adaptor"),
            )
            card = adaptor_card(record, model, settings, gain, task.state, accelerator)
            (path / CARD).write_text(card, encoding="utf-8")
            save_adaptor(adaptor, record, path)
    accelerator.end_training()
    return AdaptorTrained(path, gain, task.state.updates, recent(task.state.losses))


def new_adaptor(model: Model, settings: AdaptorTraining | FewStepsTraining) -> LearnedAdaptor:
    """An adaptor that has learnt nothing, for a model at a cut; an UnsupportedError where no such one fits."""
    shape = adaptor_shape(split(model.unet, settings.cut), model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LearnedAdaptor(settings.adaptor, shape, settings.takes_text)


def record_of(
    model: Model,
    settings: AdaptorTraining | FewStepsTraining,
    point: TrainedFor,
    rollout: Literal["teacher", "student"],
) -> AdaptorRecord:
    """What is written beside the weights of an adaptor that was trained for a model at an operating point."""
    shape = adaptor_shape(split(model.unet, settings.cut), model)
    return AdaptorRecord(
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
        trained_for=point,
        rollout=rollout,
    )


class _AdaptorTask(Task):
    """A visit is a pass over a round of trajectories."""

    def __init__(self, accelerator: Accelerator, rollouts: Rollouts, path: Path) -> None:
        settings, self.divided = rollouts.settings, rollouts.split
        adaptor = self.divided.adaptor
        optimizer = torch.optim.Adam(adaptor.parameters(), lr=settings.learning_rate)
        super().__init__(accelerator, settings, adaptor, optimizer, adaptor, settings.rounds * settings.passes)
        self.weights = {FEATURE: 1.0, OUTPUT: settings.output_weight}
        self.rollouts = rollouts
        self.samples: Samples = {}
        self.store = None
        if settings.store_gb is not None:
            advice = "raise it, ask for fewer rounds or images, or leave it out: each round then draws new trajectories"
            self.store = Store(path, accelerator, settings.rounds, "rounds", settings.store_gb, advice)

    def batches(self, visit: int) -> Sequence[torch.Tensor]:
        """Rows of the samples, in a seeded order."""
        settings = self.settings
        # A pass visits every round that is stored; without a store, each round has its passes one after the other.
        if self.store is not None:
            index = visit % settings.rounds
            self.samples = self.store.get(index, lambda: self.rollouts.draw(self.number(index)), self.device)
        elif visit % settings.passes == 0:
            self.samples = self.rollouts.draw(self.number(visit // settings.passes))
        if not self.state.identity:
            self.state.identity = self._identity()
        order = torch.randperm(len(self.samples[TARGET]), generator=generator(settings.seed, visit))
        return torch.split(order, settings.batch)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        rows = {name: tensor[batch.to(tensor.device)] for name, tensor in self.samples.items()}
        prediction = model(*(rows[name] for name in self.divided.adaptor.inputs))[0]
        errors = self._errors(prediction, rows)
        return {name: error / unit for (name, error), unit in zip(errors.items(), self.state.identity, strict=True)}

    def _errors(self, prediction: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        """Mean squared error of the low-resolution feature and, with an `output_weight`, of the output."""
        errors = {FEATURE: F.mse_loss(prediction, samples[TARGET])}
        if self.settings.output_weight:
            part = self.divided.highres_out
            given = {**samples, "lowres_feature": prediction}
            errors[OUTPUT] = F.mse_loss(part(*(given[name] for name in part.inputs))[0], samples["out_sample"])
        return errors

    @torch.no_grad()
    def _identity(self) -> list[float]:
        """The errors of the identity adaptor on the first round: the unit of the losses."""
        errors = torch.stack([*self._errors(self.samples["cache"], self.samples).values()])
        return [max(float(error), 1e-12) for error in self.accelerator.reduce(errors, reduction="mean")]

    def says(self, total: int) -> str:
        return f"{super().says(total)} of the identity's"

    def may_stop(self) -> bool:
        # Not between the passes of a round: the student has changed, and would not draw it again.
        return self.store is not None or self.state.visits % self.settings.passes == 0
