"""A model as a denoiser: its guess of the clean image from a noisy one, and what its gates let pass meanwhile."""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgediff.errors import UnsupportedError
from edgediff.evaluate.sampler import check_model
from edgediff.models.load import Model
from edgediff.models.sampling import PREDICTIONS
from edgediff.models.spectral import BANDS, BandGate
from edgediff.models.undivided import predict
from edgediff_runtime.errors import NotFiniteError


class Denoiser:
    """Guesses clean images, each with its own class and without guidance.

    Attributes:
        alphas_cumprod: float64 [T], the schedule's: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        """Takes a model and moves its UNet to the device.

        Raises:
            ConfigError, ModelError: It has no weights, or no scheduler.
            UnsupportedError: It makes no photographs, or its schedule or prediction type is not handled.
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
        self.unet = model.unet.to(device)
        self._shape = "x".join(map(str, model.sample_shape))
        self._device = device

    @torch.no_grad()
    def clean(self, x_t: NDArray[np.float64], t: int, classes: NDArray[np.int64] | None) -> NDArray[np.float64]:
        """Guesses x_0, unclipped, from x_t at a step of the training schedule; both float64 [B, 3, H, W].

        `classes` are int64 [B], None where there is no condition. NotFiniteError: the model's output is not finite.
        """
        alpha, sigma = np.sqrt(self.alphas_cumprod[t]), np.sqrt(1 - self.alphas_cumprod[t])
        sample = torch.from_numpy(x_t).float().to(self._device)
        cond = {} if classes is None else {"class_labels": torch.from_numpy(classes).to(self._device)}
        predicted = predict(self.unet, sample, torch.tensor([float(t)], device=self._device), cond)
        out: NDArray[np.float64] = predicted.cpu().double().numpy()
        if not np.isfinite(out).all():
            raise NotFiniteError(f"{self.name}'s output is not finite at t = {t}")
        if self.prediction_type == "epsilon":
            out = (x_t - sigma * out) / alpha
        elif self.prediction_type == "v_prediction":
            out = alpha * x_t - sigma * out
        return out

    def check_teacher(self, teacher: "Denoiser") -> None:
        """Refuses a teacher of other samples, prediction type or schedule with an UnsupportedError."""
        for what, mine, theirs in (
            ("samples", self._shape, teacher._shape),
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


class GateRecorder:
    """Records the gates of a wavelet-gated network while it runs, within `with` (Spectral Diffusion, section 4.1).

    `modules` are the gates by name, none where the network has none.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.modules = {name: module for name, module in unet.named_modules() if isinstance(module, BandGate)}
        self._means: dict[str, list[torch.Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "GateRecorder":
        modules = self.modules.items()
        self._hooks = [module.register_forward_hook(partial(self._record, name)) for name, module in modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, NDArray[np.float64]]:
        """The mean gates since the last call, over images and channels: float64 [4] by module, LL, LH, HL, HH.

        Gates that did not run are missing.
        """
        means = {
            name: np.sum([part.sum(dim=0).numpy() for part in parts], axis=0) / sum(map(len, parts))
            for name, parts in self._means.items()
        }
        self._means.clear()
        return means

    def _record(self, name: str, module: nn.Module, given: Any, gates: torch.Tensor) -> None:
        means = gates.detach().cpu().double().reshape(len(gates), len(BANDS), -1).mean(dim=2)
        self._means.setdefault(name, []).append(means)
