"""A UNet that learns: noised images and what it is to predict of them, a teacher, the terms of the loss."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.load import Model
from edgediff.models.sampling import PREDICTIONS
from edgediff.models.undivided import predict
from edgediff.train.distillation import OUT, Distillation, tapped

DDPM = "ddpm"
SPATIAL = "spatial"
FREQUENCY = "frequency"


class Noising:
    """A noise schedule, ready to noise with.

    Attributes:
        prediction: What the UNet predicts.
        steps: Time steps that there are.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Reads the schedule of a scheduler of diffusers; `device` is where the images are.

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
        """Whether another schedule, on the same device, noises alike."""
        return self.steps == other.steps and torch.allclose(self._signal, other._signal)

    def noised(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noises clean images.

        Args:
            x_0: [B, C, H, W].
            noise: Standard normal, the same shape.
            t: Time steps, int64 [B].

        Returns:
            x_t and what the UNet is to predict, both [B, C, H, W].
        """
        a, s = (values[t].reshape(-1, 1, 1, 1) for values in (self._signal, self._noise))
        x_t = a * x_0 + s * noise
        if self.prediction == "epsilon":
            return x_t, noise
        return x_t, x_0 if self.prediction == "sample" else a * noise - s * x_0


class Learner(nn.Module):
    """The UNet and, for a student that distils, its aligners: all that has weights to learn.

    Attributes:
        unet: What is trained.
        distillation: The aligners and terms; None without a teacher.
    """

    def __init__(self, unet: Any, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.distillation = distillation

    def forward(
        self,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        target: torch.Tensor,
        cond: dict[str, torch.Tensor],
        teacher: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Takes the terms of the loss.

        Args:
            x_0: Clean images, [B, C, H, W].
            x_t: Noised ones, the same shape.
            t: Time steps, [B].
            target: What the UNet is to predict, [B, C, H, W].
            cond: Conditioning by name, ``class_labels`` [B] among it where there are classes.
            teacher: The teacher's features by place, where there is a teacher.

        Returns:
            Scalars by name: ``ddpm`` and, with a teacher, ``spatial`` and ``frequency``.
        """
        points = self.distillation.points if self.distillation is not None and teacher is not None else ()
        with tapped(self.unet, points) as features:
            prediction = predict(self.unet, x_t, t, cond)
        losses = {DDPM: F.mse_loss(prediction.float(), target)}
        if self.distillation is not None and teacher is not None:
            if OUT in points:
                features[OUT] = prediction
            losses[SPATIAL], losses[FREQUENCY] = self.distillation(teacher, features, x_0)
        return losses


class Teacher:
    """A trained UNet whose features are learnt from."""

    def __init__(self, unet: Any, points: tuple[str, ...]) -> None:
        """Takes a UNet in evaluation mode; `points` is where its features are taken."""
        self.unet = unet
        self.points = points

    @torch.no_grad()
    def features(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The features by place, [B, C', H', W'], of noised images [B, C, H, W] at time steps [B]."""
        with tapped(self.unet, self.points) as found:
            prediction = predict(self.unet, x_t, t, cond)
        if OUT in self.points:
            found[OUT] = prediction
        return dict(found)


def check_pair(teacher: Model, student: Model) -> None:
    """Refuses a student that cannot learn from a teacher.

    Raises:
        ConfigError: Channels, size, classes, schedule or what is predicted differ; all of it is named.
    """
    names = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
    pairs = [(name, *(getattr(m.unet.config, name, None) for m in (teacher, student))) for name in names]
    schedules = [Noising(model.scheduler, torch.device("cpu")) for model in (teacher, student)]
    pairs.append(("prediction_type", *(schedule.prediction for schedule in schedules)))
    found = [f"{name} {theirs}, the student {own}" for name, theirs, own in pairs if theirs != own]
    if teacher.labels != student.labels:
        found.append("other classes than the student")
    if not schedules[0].is_like(schedules[1]):
        found.append("another noise schedule than the student")
    if found:
        raise ConfigError(f"the teacher {teacher.name} has {'; '.join(found)}: expected the same")
