"""Training an adaptor on unrolled trajectories (Clockwork Diffusion, section 3.3).

Only the adaptor learns: on the steps that the clock calls cached, its prediction is drawn towards the low-resolution
feature that a full step makes. Losses are given relative to the identity's, so that 1 is what there was without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from edgediff.data.draws import generator
from edgediff.errors import ConfigError
from edgediff.models.adaptors import AdaptorShape, LearnedAdaptor
from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model
from edgediff.models.trained import FORMAT, RECORD, AdaptorRecord, save_adaptor
from edgediff.outputs import check_drawing
from edgediff.train.claim import STORE, Claim, check_output, check_place, claimed, clear_place
from edgediff.train.gain import Gain, measure_gain
from edgediff.train.loop import Loop, Say, Task, recent, silent
from edgediff.train.rollout import TARGET, Rollouts, Samples, Store
from edgediff.train.settings import AdaptorTraining, check_training
from edgediff.train.training_card import CARD, LOSSES, adaptor_card, draw_losses
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.manifest import TrainedFor

FEATURE, OUTPUT = "feature", "output"


@dataclass(frozen=True)
class AdaptorTrained:
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
) -> AdaptorTrained | None:
    """Trains an adaptor, or goes on where an interrupted training of the same settings stopped.

    Args:
        model: What it is to serve; left as it was, but moved to the device where training runs.
        path: Where the adaptor is to be.
        settings: What is asked for; None takes the defaults.
        progress: Told what is being done, and the share of it that is done.

    Returns:
        What became of it; None where the adaptor is there already.

    Raises:
        ConfigError: The settings do not fit the model, or the trajectories do not fit the store's bound.
        ModelError: The model has no weights or no scheduler.
        UnsupportedError: It cannot be divided so, or no such adaptor fits.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
    """
    settings = check_training(AdaptorTraining() if settings is None else settings)
    path = Path(path)
    check_output(path)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights: there is nothing to learn from")
    model.check_schedule()
    accelerator = Accelerator()
    say = progress if progress is not None and accelerator.is_main_process else silent
    claim = _claim(settings, model, accelerator.num_processes)
    check_place(path, claim)
    if claim.is_finished(path):
        clear_place(path, accelerator)
        return None
    check_drawing("drawing the loss curve")
    shape = adaptor_shape(split(model.unet, settings.cut), model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adaptor = LearnedAdaptor(settings.adaptor, shape, settings.takes_text)
    divided = split(model.unet, settings.cut, adaptor).to(accelerator.device)
    adaptor.train()
    rollouts = Rollouts(model, divided, settings)
    with claimed(path, claim, accelerator):
        task = _AdaptorTask(accelerator, divided, adaptor, rollouts, path)
        loop = Loop(accelerator, task, path, settings.checkpoint_minutes)
        loop.run(say)
        say("measuring the gain on unseen seeds", 1.0)
        gain = measure_gain(model, divided, rollouts)
        if accelerator.is_main_process:
            loop.count_time()
            record = _record(settings, model, shape, rollouts)
            _draw(task.state.losses, settings, path / LOSSES)
            card = adaptor_card(record, model, settings, gain, task.state, accelerator)
            (path / CARD).write_text(card, encoding="utf-8")
            save_adaptor(adaptor, record, path)
        clear_place(path, accelerator)
    accelerator.end_training()
    return AdaptorTrained(path, gain, task.state.updates, recent(task.state.losses))


def _claim(settings: AdaptorTraining, model: Model, processes: int) -> Claim:
    sources = {"another model": model.sha256}
    if settings.conditioning is not None:
        file = Path(settings.conditioning)
        if not file.is_file():
            raise ConfigError(f"conditioning {file}: no such file")
        sources[f"other embeddings in {file}"] = sha256_of(file)
    return Claim(settings, sources, processes, RECORD)


def _record(settings: AdaptorTraining, model: Model, shape: AdaptorShape, rollouts: Rollouts) -> AdaptorRecord:
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
        trained_for=TrainedFor(
            num_inference_steps=settings.steps,
            scheduler=settings.scheduler,
            clock=settings.clock,
            mask=tuple(int(full) for full in rollouts.mask),
            guidance_scale=rollouts.guidance,
        ),
        rollout=settings.rollout,
    )


def _draw(losses: list[float], settings: AdaptorTraining, path: Path) -> None:
    title = (
        f"{settings.adaptor} adaptor, {settings.steps} steps of {settings.scheduler}, clock {settings.clock}, "
        f"{settings.rollout} rollout"
    )
    what = "loss, relative to the identity's"
    draw_losses({"loss": losses}, path, title, what, level=(1.0, "the identity adaptor"))


class _AdaptorTask(Task):
    """A visit is a pass over a round of trajectories."""

    def __init__(
        self, accelerator: Accelerator, divided: SplitUNet, adaptor: LearnedAdaptor, rollouts: Rollouts, path: Path
    ) -> None:
        settings = rollouts.settings
        optimizer = torch.optim.Adam(adaptor.parameters(), lr=settings.learning_rate)
        super().__init__(adaptor, optimizer, adaptor, settings, settings.rounds * settings.passes)
        self.ema, self.schedule = settings.ema, settings.schedule
        self.weights = {FEATURE: 1.0, OUTPUT: settings.output_weight}
        self.accelerator = accelerator
        self.divided = divided
        self.rollouts = rollouts
        self.samples: Samples = {}
        self.store = None
        if settings.store_gb is not None:
            folder = path / STORE / f"process-{accelerator.process_index}"
            self.store = Store(folder, settings.store_gb / accelerator.num_processes, settings.rounds)

    def batches(self, visit: int) -> Sequence[torch.Tensor]:
        """Rows of the samples, in a seeded order."""
        settings, stored = self.settings, self.store is not None
        # What is stored is seen whole in each pass; what is not, is learnt from at once.
        if stored or visit % settings.passes == 0:
            self.samples = self._draw(visit % settings.rounds if stored else visit // settings.passes)
        count = len(self.samples[TARGET])
        if not self.state.identity:
            self.state.identity = self._identity()
        return torch.split(torch.randperm(count, generator=generator(settings.seed, visit)), settings.batch)

    def _draw(self, index: int) -> Samples:
        number = index * self.accelerator.num_processes + self.accelerator.process_index
        if self.store is None:
            return self.rollouts.draw(number)
        return self.store.get(index, lambda: self.rollouts.draw(number), self.accelerator.device)

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        rows = {name: tensor[batch.to(tensor.device)] for name, tensor in self.samples.items()}
        prediction = model(*(rows[name] for name in self.divided.adaptor.inputs))[0]
        errors = self._errors(prediction, rows)
        return {name: error / unit for (name, error), unit in zip(errors.items(), self.state.identity, strict=True)}

    def _errors(self, prediction: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        """Mean squared error of the low-resolution feature and, where it counts, of the output."""
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
        # Not between the passes of a round: a student that has moved on would not draw it again.
        return self.store is not None or self.state.visits % self.settings.passes == 0
