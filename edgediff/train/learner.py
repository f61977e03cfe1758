"""A UNet that learns: noised images, what it is to predict of them, and the terms of the loss."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgediff.data.batches import TOKENS
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.load import Model
from edgediff.models.sampling import PREDICTIONS
from edgediff.models.undivided import predict
from edgediff.train.distillation import Distillation, predict_with_features
from edgediff.train.text import STATES, encode

DDPM = "ddpm"
SPATIAL = "spatial"
FREQUENCY = "frequency"


class Noising:
    """A noise schedule: its time steps, and what the UNet predicts."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Reads it from a scheduler of diffusers; `device` is where the images are.

        Raises:
            UnsupportedError: The scheduler has no such schedule, or predicts something else.
        """
        self.prediction = str(scheduler.config.get("prediction_type", "epsilon"))
        if self.prediction not in PREDICTIONS:
            raise UnsupportedError(
                f"scheduler prediction_type {self.prediction!r} cannot be trained; choices: {', '.join(PREDICTIONS)}"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UnsupportedError(f"a {type(scheduler).__name__} has no noise schedule of its own to train with")
        alphas = scheduler.alphas_cumprod.to(device, torch.float32)
        self.steps = len(alphas)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()

    def is_like(self, other: "Noising") -> bool:
        """Whether another schedule, on the same device, adds the same noise."""
        return self.steps == other.steps and torch.allclose(self._signal, other._signal)

    def noised(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and what the UNet is to predict, of clean images and noise [B, C, H, W] at time steps, int64 [B]."""
        a, s = (values[t].reshape(-1, 1, 1, 1) for values in (self._signal, self._noise))
        x_t = a * x_0 + s * noise
        if self.prediction == "epsilon":
            return x_t, noise
        return x_t, x_0 if self.prediction == "sample" else a * noise - s * x_0


class Learner(nn.Module):
    """The UNet, a text encoder that learns beside it, the aligners of a student: all that has weights to learn."""

    def __init__(self, unet: Any, distillation: Distillation | None = None, text_encoder: Any = None) -> None:
        super().__init__()
        self.unet = unet
        self.distillation = distillation
        self.text_encoder = text_encoder

    def forward(
        self,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        target: torch.Tensor,
        cond: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss, scalars by name: ``ddpm`` and, with a teacher, ``spatial`` and ``frequency``.

        `x_0`, `x_t` and `target` are [B, C, H, W], `t` is [B], `teacher` has the teacher's features by place. Token ids
        in `cond` are encoded first.
        """
        if self.text_encoder is not None:
            cond = {STATES: encode(self.text_encoder, cond[TOKENS])}
        if self.distillation is None or teacher is None:
            return {DDPM: F.mse_loss(predict(self.unet, x_t, t, cond).float(), target)}
        prediction, features = predict_with_features(self.unet, self.distillation.points, x_t, t, cond)
        ddpm = F.mse_loss(prediction.float(), target)
        spatial, frequency = self.distillation(teacher, features, x_0)
        return {DDPM: ddpm, SPATIAL: spatial, FREQUENCY: frequency}


def check_pair(teacher: Model, student: Model) -> None:
    """Refuses a student that cannot learn from a teacher.

    Raises:
        ConfigError: Channels, size, conditioning, schedule or what is predicted differ; all of it is named.
    """
    names = ["in_channels", "out_channels", "sample_size", "num_class_embeds"]
    if "text" in (teacher.conditioning.kind, student.conditioning.kind):
        names.append("cross_attention_dim")
    pairs = [(name, *(getattr(m.unet.config, name, None) for m in (teacher, student))) for name in names]
    schedules = [Noising(model.scheduler, torch.device("cpu")) for model in (teacher, student)]
    pairs.append(("prediction_type", *(schedule.prediction for schedule in schedules)))
    found = [f"{name} {theirs}, the student {own}" for name, theirs, own in pairs if theirs != own]
    if teacher.conditioning.kind != student.conditioning.kind:
        found.append(f"conditioning {teacher.conditioning.kind}, the student {student.conditioning.kind}")
    if teacher.labels != student.labels:
        found.append("other classes than the student")
    if not schedules[0].is_like(schedules[1]):
        found.append("another noise schedule than the student")
    if found:
        raise ConfigError(f"the teacher {teacher.name} has {'; '.join(found)}: expected the same")
