"""A model as a denoiser: its guess of the clean image from a noisy one, whatever its output stands for."""

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.errors import UnsupportedError
from edgediff.evaluate.comparable import check_model
from edgediff.models.load import Model
from edgediff.models.sampling import PREDICTIONS
from edgediff.models.undivided import predict
from edgediff_runtime.errors import NotFiniteError


class Denoiser:
    """Guesses clean images, each with the prediction of its own class and without guidance.

    Attributes:
        name: The model's.
        alphas_cumprod: float64 [T], the schedule's: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
        prediction_type: What the model's output stands for.
        unet: The network, on its device.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        """Takes a model.

        Args:
            model: Its UNet is moved to the device.
            device: Where it runs.

        Raises:
            ConfigError: It is a geometry without weights.
            ModelError: It has no scheduler.
            UnsupportedError: It makes no photographs, its scheduler has no such schedule, or its output stands for
                something else.
        """
        check_model(model)
        schedule = getattr(model.scheduler, "alphas_cumprod", None)
        kind = type(model.scheduler).__name__
        if schedule is None:
            raise UnsupportedError(f"{model.name}: {kind} has no alphas_cumprod; expected a scheduler as DDPM's")
        self.name = model.name
        self.alphas_cumprod: NDArray[np.float64] = np.asarray(schedule, dtype=np.float64)
        self.prediction_type = str(getattr(model.scheduler, "config", {}).get("prediction_type"))
        if self.prediction_type not in PREDICTIONS:
            raise UnsupportedError(
                f"{model.name}: prediction_type {self.prediction_type!r}; expected one of {', '.join(PREDICTIONS)}"
            )
        self.shape = model.sample_shape
        self.unet = model.unet.to(device)
        self._device = device

    @torch.no_grad()
    def clean(self, x_t: NDArray[np.float64], t: int, classes: NDArray[np.int64] | None) -> NDArray[np.float64]:
        """Guesses the clean images; nothing is clipped.

        Args:
            x_t: float64 [B, 3, H, W].
            t: Time step of the training schedule.
            classes: int64 [B]; None where there is no condition.

        Returns:
            float64 [B, 3, H, W], x_0 as the model has it.

        Raises:
            NotFiniteError: The model's output is not finite.
        """
        alpha, sigma = np.sqrt(self.alphas_cumprod[t]), np.sqrt(1 - self.alphas_cumprod[t])
        sample = torch.from_numpy(x_t).float().to(self._device)
        cond = {} if classes is None else {"class_labels": torch.from_numpy(classes).to(self._device)}
        said = predict(self.unet, sample, torch.tensor([float(t)], device=self._device), cond)
        out: NDArray[np.float64] = said.cpu().double().numpy()
        if not np.isfinite(out).all():
            raise NotFiniteError(f"{self.name}'s output is not finite at t = {t}")
        if self.prediction_type == "epsilon":
            out = (x_t - sigma * out) / alpha
        elif self.prediction_type == "v_prediction":
            out = alpha * x_t - sigma * out
        return out

    def check_teacher(self, teacher: "Denoiser") -> None:
        """Refuses a teacher whose guesses could not be laid beside these.

        Args:
            teacher: The other one.

        Raises:
            UnsupportedError: It differs in what is denoised, in what its output stands for, or in the schedule.
        """
        for what, mine, theirs in (
            ("samples", _spell(self.shape), _spell(teacher.shape)),
            ("prediction_type", self.prediction_type, teacher.prediction_type),
        ):
            if mine != theirs:
                raise UnsupportedError(
                    f"teacher {teacher.name} has {what} {theirs}, {self.name} {mine}; expected the same"
                )
        one, other = self.alphas_cumprod, teacher.alphas_cumprod
        if one.shape != other.shape or not np.allclose(one, other, rtol=1e-4, atol=1e-8):
            raise UnsupportedError(
                f"teacher {teacher.name} has another noise schedule than {self.name}; expected the same"
            )


def _spell(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
