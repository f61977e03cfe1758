"""A UNet that learns: the terms of its loss, by name."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgediff.errors import ConfigError
from edgediff.models.load import Model
from edgediff.models.undivided import predict
from edgediff.train.distillation import OUT, Distillation, tapped
from edgediff.train.noising import Noising

DDPM = "ddpm"
SPATIAL = "spatial"
FREQUENCY = "frequency"


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
        """Takes the UNet.

        Args:
            unet: In evaluation mode, where it is to run.
            points: Where its features are taken.
        """
        self.unet = unet
        self.points = points

    @torch.no_grad()
    def features(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the teacher.

        Args:
            x_t: Noised images, [B, C, H, W].
            t: Time steps, [B].
            cond: Conditioning by name.

        Returns:
            Its features by place, [B, C', H', W'].
        """
        with tapped(self.unet, self.points) as found:
            prediction = predict(self.unet, x_t, t, cond)
        if OUT in self.points:
            found[OUT] = prediction
        return dict(found)


def check_pair(teacher: Model, student: Model) -> None:
    """Refuses a student that cannot learn from a teacher.

    Args:
        teacher: The teacher.
        student: The student.

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
