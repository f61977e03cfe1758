"""What a denoiser learns from: noised images and the prediction that belongs to them, in the scheduler's own terms."""

from typing import Any

import torch

from edgediff.errors import UnsupportedError
from edgediff.models.sampling import PREDICTIONS


class Noising:
    """A noise schedule, ready to noise with.

    Attributes:
        prediction: What the UNet predicts.
        steps: Time steps that there are.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Reads the schedule.

        Args:
            scheduler: diffusers' scheduler.
            device: Where images lie.

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
        """Whether another schedule noises alike.

        Args:
            other: The other, on the same device.
        """
        return self.steps == other.steps and torch.allclose(self._signal, other._signal)

    def noised(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noises images.

        Args:
            x_0: Clean images, [B, C, H, W].
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
