"""The samplers: how x_t and the UNet's output become the next, less noisy x. Each is one class, listed in `SAMPLERS`.

Constraints that shaped this file:

- Each sampler is what diffusers' class of that kind computes, checked against recorded traces of it.
- A step is a linear combination with coefficients known before the first image, so they are computed once, in
  float64, and rounded to float32; a step is then a few passes over the array, cheap on a phone.
- A scheduler is immutable. The caller keeps the state between steps, so concurrent generations are independent, and
  nothing has to be reset.
- Coefficients belong to step i. A timestep is never looked up: Karras spacing repeats timesteps.
- Every call of the UNet is a step, also where a sampler calls it twice to take one of ``num_inference_steps``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError
from edgediff_runtime.schedule_tables import (
    alphas_cumprod,
    distilled_timesteps,
    euler_levels,
    solver_levels,
    spaced_timesteps,
)

if TYPE_CHECKING:
    from edgediff_runtime.schedulers import SchedulerConfig

Array = NDArray[np.float32]
Float64 = NDArray[np.float64]
State = tuple[Array, ...]
Row = tuple[np.float32, ...]

# dpmpp_2m drops to first order at the end only of schedules shorter than this.
_LOWER_ORDER_BELOW = 15
# Weights of the outputs, the newest first, by how many there are (Liu et al. 2022, equation 12; Adams-Bashforth).
_PLMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
# Standard deviation of the data, as consistency models assume it.
_SIGMA_DATA = 0.5

_SPACING = {"timestep_spacing": "leading", "steps_offset": 0}
_SIGMAS = {
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": UNSET,
    "use_beta_sigmas": UNSET,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}


@dataclass(frozen=True, eq=False)
class Scheduler(ABC):
    """The steps of one schedule, ready to take. A subclass is a sampler.

    Attributes:
        name: The sampler's name in a manifest.
        settings: The settings that it reads, with their defaults; of the noise process it reads all but
            ``rescale_betas_zero_snr``, which is listed where it is read.
        predictions: What the UNet may return.
        diffusers_class: Name of the class in diffusers that it stands for.
        diffusers_settings: Settings of that class that make it this sampler, and what else the class takes for it.
        diffusers_ignores: Settings that the class takes and that no step of it reads.
        calls_words: Why the model is called more or less often than once in each of ``num_inference_steps``.
        timesteps: float32 [calls of the UNet], as fed to it; read-only.
        init_noise_sigma: Standard deviation of the initial latent.
        needs_noise: Whether ``step`` wants fresh noise.
        _rows: The coefficients of each step, of which the first two are those of x_0: from x_t, from the output.
        _levels: Of x_t before each step: the share of x_0 in it, and of noise.
    """

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]]
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")
    diffusers_class: ClassVar[str]
    diffusers_settings: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    diffusers_ignores: ClassVar[tuple[str, ...]] = ()
    calls_words: ClassVar[str] = ""

    timesteps: Array
    init_noise_sigma: float
    needs_noise: bool
    _rows: tuple[Row, ...]
    _levels: tuple[Row, ...]
    _clip: np.float32 | None = None

    @classmethod
    def calls(cls, num_inference_steps: int) -> int:
        """How often the UNet is called in so many steps."""
        return num_inference_steps

    @classmethod
    def call_of(cls, step: int) -> int:
        """Number of the call at which editing begins that leaves out so many of ``num_inference_steps``."""
        return step

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """Whether its steps draw fresh noise under these settings."""
        return False

    @classmethod
    @abstractmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """Computes every coefficient; what divides by zero is left to the caller to find in the rows."""

    def scale_model_input(self, i: int, x_t: Array) -> Array:
        """The UNet's input at step i, of x_t's shape; ``x_t`` itself where the sampler does not scale."""
        return x_t

    def step(
        self,
        i: int,
        x_t: Array,
        model_output: Array,
        state: State | None = None,
        noise: Array | None = None,
        first: bool = False,
    ) -> tuple[Array, State]:
        """Takes step i.

        Args:
            i: Step, from 0: one of ``timesteps``.
            x_t: float32 [B, C, H, W], the latent before the step; left as it is, and not kept.
            model_output: float32 [B, C, H, W], what the UNet returned for it; left as it is, and not kept.
            state: What step i - 1 returned; not read at the first step.
            noise: float32 [B, C, H, W], standard normal, where ``needs_noise``; not read otherwise.
            first: Whether it is the first step that is run, wherever that is: a multistep sampler is of first order
                there.

        Returns:
            The latent after the step, a new array of the same shape, and the state for step i + 1: arrays.

        Raises:
            RequestError: If the step, a shape, the state or the noise does not fit.
        """
        self._check(i)
        if model_output.shape != x_t.shape:
            raise RequestError(
                f"model output of shape {list(model_output.shape)}: expected the latent's, {list(x_t.shape)}"
            )
        if self.needs_noise and (noise is None or noise.shape != x_t.shape):
            given = "none" if noise is None else f"shape {list(noise.shape)}"
            raise RequestError(
                f"fresh noise, {given}: {self.name} draws it in each step; expected shape {list(x_t.shape)}"
            )
        before = () if first or i == 0 else state
        if before is None or any(array.shape != x_t.shape for array in before):
            given = "none" if before is None else f"of shapes {[list(array.shape) for array in before]}"
            raise RequestError(f"scheduler state, {given}: step {i} expected the state of step {i - 1}")
        return self._step(i, x_t, model_output, before, noise if self.needs_noise else None)

    def predicted(self, i: int, x_t: Array, model_output: Array) -> Array:
        """x_0 as the output of step i predicts it, a new array of x_t's shape; clipped where `step` clips it."""
        self._check(i)
        x0_x, x0_out = self._rows[i][:2]
        return self._clipped(mix((x0_x, x_t), (x0_out, model_output)))

    def add_noise(self, i: int, x_0: Array, noise: Array) -> Array:
        """What x_t before step i is for a known x_0, a new array: where editing begins, and what inpainting keeps.

        Args:
            i: Step, from 0 to the number of steps; after the last one x_t is x_0.
            x_0: float32 [B, C, H, W], finished latents.
            noise: The same shape, standard normal.
        """
        if i == len(self._levels):
            return x_0.copy()
        self._check(i)
        signal, level = self._levels[i]
        return mix((signal, x_0), (level, noise))

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self._rows):
            raise RequestError(f"step {i}: expected 0 to {len(self._rows) - 1}")

    def _clipped(self, x_0: Array) -> Array:
        """The predicted x_0 within bounds, in place."""
        if self._clip is not None:
            np.maximum(x_0, -self._clip, out=x_0)
            np.minimum(x_0, self._clip, out=x_0)
        return x_0

    @abstractmethod
    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        """Takes a step that was checked; `before` is empty at the first."""


class Ddim(Scheduler):
    """Denoising diffusion implicit models (Song et al. 2020, equation 12).

    A row is (x_0 from x_t, x_0 from the output, x_prev from x_0, from x_t, from the output, from the
    noise); where x_0 is not clipped its part is folded into the fourth and fifth.
    """

    name = "ddim"
    settings: ClassVar = {
        **_SPACING, **_ZERO_SNR, "clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True, "eta": 0.0,
    }  # fmt: skip
    diffusers_class = "DDIMScheduler"

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """See ``Scheduler.draws_noise``."""
        return config.eta > 0

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps = spaced_timesteps(config, num_inference_steps)
        # Not the next step's timestep: under linspace and trailing spacing the two differ.
        before = timesteps - config.num_train_timesteps // num_inference_steps
        alpha, alpha_prev = _alphas(config, timesteps), _alphas(config, before)

        root, noise_root = np.sqrt(alpha), np.sqrt(1 - alpha)
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        std = config.eta * np.sqrt(variance)
        direction = np.sqrt(1 - alpha_prev - std**2)

        x0_x, x0_out = _x0(config, root, noise_root)
        eps_x, eps_out = _eps(config, root, noise_root)
        of_x0, of_x, of_out = np.sqrt(alpha_prev), direction * eps_x, direction * eps_out
        if not config.clip_sample:
            of_x, of_out = of_x + of_x0 * x0_x, of_out + of_x0 * x0_out
        return cls(
            timesteps=timesteps.astype(np.float32),
            init_noise_sigma=1.0,
            needs_noise=cls.draws_noise(config),
            _rows=_rows(x0_x, x0_out, of_x0, of_x, of_out, std),
            _levels=_rows(root, noise_root),
            _clip=_clip_of(config),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x0, of_x, of_out, of_noise = self._rows[i][2:]
        x_0 = None if self._clip is None else self.predicted(i, x_t, out)
        return mix((of_x, x_t), (of_out, out), (of_x0, x_0), (of_noise, noise)), ()


class Pndm(Scheduler):
    """Pseudo linear multistep (Liu et al. 2022, equations 11 and 12), without Runge-Kutta steps at the beginning.

    The second call corrects the first step. A row is (x_0 from x_t, from the output, x_prev from x_t, from the
    combined outputs). The state is the last three outputs, the newest first; after the first call also, before them,
    what it adds to the second's x_prev.
    """

    name = "pndm"
    settings: ClassVar = {**_SPACING, "set_alpha_to_one": False}
    predictions = ("epsilon", "v_prediction")
    diffusers_class = "PNDMScheduler"
    diffusers_settings: ClassVar = {"skip_prk_steps": (True,)}
    calls_words = "pndm calls the model twice in the first step"

    @classmethod
    def calls(cls, num_inference_steps: int) -> int:
        """See ``Scheduler.calls``."""
        return num_inference_steps + 1 if num_inference_steps > 1 else 1

    @classmethod
    def call_of(cls, step: int) -> int:
        """See ``Scheduler.call_of``; the second call belongs to the first step."""
        return step + 1 if step else 0

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps = spaced_timesteps(config, num_inference_steps)
        if len(timesteps) > 1:
            timesteps = np.insert(timesteps, 1, timesteps[1])
        stride = config.num_train_timesteps // num_inference_steps
        begin, end = timesteps.copy(), timesteps - stride
        begin[1:2], end[1:2] = timesteps[1:2] + stride, timesteps[1:2]
        alpha, alpha_prev = _alphas(config, begin), _alphas(config, end)
        of_x = np.sqrt(alpha_prev / alpha)
        of_eps = (alpha - alpha_prev) / (
            alpha * np.sqrt(1 - alpha_prev) + np.sqrt(alpha * (1 - alpha) * alpha_prev)
        )  # equation 11
        eps_x, eps_out = _eps(config, np.sqrt(alpha), np.sqrt(1 - alpha))
        at = _alphas(config, timesteps)  # the second call's is not where the step that it corrects begins
        root, noise_root = np.sqrt(at), np.sqrt(1 - at)
        return cls(
            timesteps=timesteps.astype(np.float32),
            init_noise_sigma=1.0,
            needs_noise=False,
            _rows=_rows(*_x0(config, root, noise_root), of_x + of_eps * eps_x, of_eps * eps_out),
            _levels=_rows(root, noise_root),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_out = self._rows[i][2:]
        if i == 1 and before:
            return mix((1, before[0]), (of_out / 2, out)), before[1:]
        kept = out.copy()
        if i == 1:  # nothing to correct
            return x_t.copy(), (kept,)
        weights = _PLMS[len(before)]
        terms = [(of_out * np.float32(w), eps) for w, eps in zip(weights, (kept, *before), strict=True)]
        x_prev = mix((of_x, x_t), *terms)
        if i == 0 and len(self._rows) > 1:
            of_x, of_out = self._rows[1][2:]
            return x_prev, (mix((of_x, x_t), (of_out / 2, out)), kept)
        return x_prev, (kept, *before[:2])


class Dpm(Scheduler):
    """DPM-Solver++, second-order multistep, midpoint (Lu et al. 2022, Algorithm 2).

    A row is (x_0 from x_t, x_0 from the output, x_prev from x_t, from x_0, from the step before's x_0, from the
    noise). The state is x_0 as the last step predicted it.
    """

    name = "dpmpp_2m"
    settings: ClassVar = {
        **_SIGMAS, **_ZERO_SNR, "final_sigmas_type": "zero", "lower_order_final": True, "euler_at_final": False,
        "lambda_min_clipped": None,
    }  # fmt: skip
    diffusers_class = "DPMSolverMultistepScheduler"
    diffusers_settings: ClassVar = {
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    }
    _stochastic: ClassVar[bool] = False

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """See ``Scheduler.draws_noise``."""
        return cls._stochastic

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        timesteps, sigmas = solver_levels(config, num_inference_steps, round_karras=not cosine)
        steps = len(timesteps)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        alpha, alpha_next = 1 / np.sqrt(sigma**2 + 1), 1 / np.sqrt(sigma_next**2 + 1)
        x0_x, x0_out = _x0(config, alpha, sigma * alpha)

        ratio = sigma_next / sigma
        # With fresh noise as much again of the old noise goes (Lu et al. 2022, SDE-DPM-Solver++).
        kept = ratio**2 if cls._stochastic else ratio
        gain = alpha_next * (1 - kept)
        std = alpha_next * sigma_next * np.sqrt(np.maximum(1 - ratio**2, 0))
        second_order = np.arange(steps) > 0
        second_order[-1] &= not (
            config.final_sigmas_type == "zero"
            or config.euler_at_final
            or (config.lower_order_final and steps < _LOWER_ORDER_BELOW)
        )
        # h is the step's length in lambda = log(alpha / sigma) = -log of the sigma here.
        h = np.log(sigma) - np.log(np.where(sigma_next > 0, sigma_next, 1.0))
        extrapolation = np.zeros(steps)
        later = np.flatnonzero(second_order)
        extrapolation[later] = 0.5 * gain[later] * h[later] / h[later - 1]
        return cls(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            needs_noise=cls._stochastic,
            _rows=_rows(x0_x, x0_out, kept * alpha_next / alpha, gain + extrapolation, -extrapolation, std),
            _levels=_rows(alpha, sigma * alpha),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_x0, of_before, of_noise = self._rows[i][2:]
        x_0 = self.predicted(i, x_t, out)
        (x_0_before,) = before or (x_0,)
        return mix((of_x, x_t), (of_x0, x_0), (of_before, x_0_before), (of_noise, noise)), (x_0,)


class DpmSde(Dpm):
    """DPM-Solver++ of the stochastic equation: the same with fresh noise in each step."""

    name = "dpmpp_2m_sde"
    diffusers_settings: ClassVar = {
        **Dpm.diffusers_settings,
        "algorithm_type": ("sde-dpmsolver++", "dpmsolver++", "deis"),
    }
    _stochastic = True


class UniPC(Scheduler):
    """UniPC of second order, bh2, on the predicted x_0 (Zhao et al. 2023, Algorithms 1 and 2).

    The output first corrects x_t, then the next x is predicted from that. A row is (x_0 from x_t, from the output;
    the corrected x after a step of first order from the x before, x_0 before, x_0; the same after one of second order
    from the x before, x_0 before, x_0 before that, x_0; x_prev by first order from the corrected x, x_0; by second
    order from the corrected x, x_0, x_0 before; whether second order may be used). The state is the corrected x, x_0
    and, where the step was of second order, the x_0 before.
    """

    name = "unipc"
    settings: ClassVar = {**_SIGMAS, **_ZERO_SNR, "final_sigmas_type": "zero", "lower_order_final": True}
    diffusers_class = "UniPCMultistepScheduler"
    diffusers_settings: ClassVar = {"solver_type": ("bh2", "midpoint", "heun", "logrho")}

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps, sigmas = solver_levels(config, num_inference_steps, round_karras=True)
        alphas = 1 / np.sqrt(sigmas**2 + 1)
        x0_x, x0_out = _x0(config, alphas[:-1], (sigmas * alphas)[:-1])
        # Of the step from i to i + 1: its length in lambda, and that of the step before it.
        h = np.log(sigmas[:-1]) - np.log(sigmas[1:])
        h_before = np.concatenate([[np.nan], h[:-1]])
        of_x = (sigmas * alphas)[1:] / (sigmas * alphas)[:-1]
        gain = -alphas[1:] * np.expm1(-h)  # of x_0; it also is -alpha * B(h) of bh2
        second = np.arange(len(h)) > 0
        if config.lower_order_final:
            second[-1] = False
        slope = h / h_before  # of the difference of the last two x_0, for a step of this length
        # The corrector's weights: of the x_0 that the step led to, and of the slope.
        phi_1 = np.expm1(-h) / -h - 1
        b_1, b_2 = phi_1 / np.expm1(-h), 2 * (phi_1 / -h - 0.5) / np.expm1(-h)
        r = -h_before / h
        old = (b_1 - b_2) / (1 - r)
        new = b_1 - old
        first_order = np.stack([of_x, gain * 0.5, gain * 0.5], axis=1)
        second_order = np.stack([of_x, gain * (1 - old / r - new), gain * old / r, gain * new], axis=1)
        predict_2 = np.stack([of_x, gain * (1 + 0.5 * slope), -gain * 0.5 * slope], axis=1)
        second_order[~second], predict_2[~second] = 0, 0
        after = [np.roll(each, 1, axis=0) for each in (first_order, second_order)]
        for each in after:
            each[0] = 0
        columns = np.concatenate([*after, np.stack([of_x, gain], axis=1), predict_2], axis=1)
        return cls(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            needs_noise=False,
            _rows=_rows(x0_x, x0_out, *columns.T, second.astype(np.float64)),
            _levels=_rows(alphas[:-1], (sigmas * alphas)[:-1]),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        row, x_0 = self._rows[i][2:], self.predicted(i, x_t, out)
        weights = (1,) if not before else row[:3] if len(before) == 2 else row[3:7]
        terms = (*before, x_0) if before else (x_t,)
        x = mix(*zip(weights, terms, strict=True))
        if before and row[12]:
            return mix((row[9], x), (row[10], x_0), (row[11], before[1])), (x, x_0, before[1])
        return mix((row[7], x), (row[8], x_0)), (x, x_0)


class Euler(Scheduler):
    """Euler's method in sigma (Karras et al. 2022, Algorithm 2 without churn).

    A row is (x_0 from x_t, from the output, the input's scale, x_prev from x_t, from the output, from the noise).
    """

    name = "euler"
    settings: ClassVar = {**_SIGMAS, **_ZERO_SNR, "final_sigmas_type": "zero"}
    diffusers_class = "EulerDiscreteScheduler"

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps, sigmas = euler_levels(config, num_inference_steps)
        sigma = sigmas[:-1]
        to, std = cls._arrivals(sigma, sigmas[1:])
        x0_x, x0_out = _x0_of_sigma(config, sigma)
        of_x0 = 1 - to / sigma
        return cls(
            timesteps=timesteps,
            init_noise_sigma=_euler_noise(config, sigmas),
            needs_noise=cls.draws_noise(config),
            _rows=_rows(x0_x, x0_out, 1 / np.sqrt(sigma**2 + 1), to / sigma + of_x0 * x0_x, of_x0 * x0_out, std),
            _levels=_rows(np.ones_like(sigma), sigma),
        )

    @staticmethod
    def _arrivals(sigma: Float64, sigma_next: Float64) -> tuple[Float64, Float64]:
        """Where the ordinary step ends, and how much fresh noise is added there."""
        return sigma_next, np.zeros_like(sigma)

    def scale_model_input(self, i: int, x_t: Array) -> Array:
        """Divide by sqrt(sigma**2 + 1); see ``Scheduler.scale_model_input``."""
        self._check(i)
        return x_t * self._rows[i][2]

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_out, of_noise = self._rows[i][3:]
        return mix((of_x, x_t), (of_out, out), (of_noise, noise)), ()


class EulerAncestral(Euler):
    """Euler's method below the next level, and fresh noise up to it (Karras et al. 2022, k-diffusion's euler_a)."""

    name = "euler_ancestral"
    settings: ClassVar = {**_SPACING, "timestep_spacing": "linspace", **_ZERO_SNR}
    predictions = ("epsilon", "v_prediction")
    diffusers_class = "EulerAncestralDiscreteScheduler"

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """See ``Scheduler.draws_noise``."""
        return True

    @staticmethod
    def _arrivals(sigma: Float64, sigma_next: Float64) -> tuple[Float64, Float64]:
        """The variance that remains of the ordinary step and the noise add up to the next level's."""
        return sigma_next**2 / sigma, sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)


class Heun(Euler):
    """Heun's method in sigma (Karras et al. 2022, Algorithm 1): Euler's step, then the mean of both ends' slopes.

    A row is (x_0 from x_t, x_0 from the output, the input's scale, x_prev from x_t, from x_0; what x_t and x_0 add to
    the correction). The state is what the first call adds to the second's x_prev.
    """

    name = "heun"
    settings: ClassVar = {**_SIGMAS, "clip_sample": False, "clip_sample_range": 1.0}
    diffusers_class = "HeunDiscreteScheduler"
    calls_words = "heun calls the model twice in each step but the last"

    @classmethod
    def calls(cls, num_inference_steps: int) -> int:
        """See ``Scheduler.calls``."""
        return 2 * num_inference_steps - 1

    @classmethod
    def call_of(cls, step: int) -> int:
        """See ``Scheduler.call_of``."""
        return 2 * step

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps, sigmas = euler_levels(config, num_inference_steps)
        # Calls 2k and 2k + 1 take the step from level k to level k + 1, and are made at the one and at the other.
        step = np.arange(cls.calls(num_inference_steps)) // 2
        at = (np.arange(len(step)) + 1) // 2
        sigma, begin, end = sigmas[at], sigmas[step], sigmas[step + 1]
        x0_x, x0_out = _x0_of_sigma(config, sigma)
        half = (end - begin) / (2 * sigma)  # of x_t - x_0, for half of the step
        return cls(
            timesteps=timesteps[at],
            init_noise_sigma=_euler_noise(config, sigmas),
            needs_noise=False,
            _rows=_rows(x0_x, x0_out, 1 / np.sqrt(sigma**2 + 1), 1 + 2 * half, -2 * half, half),
            _levels=_rows(np.ones_like(sigma), sigma),
            _clip=_clip_of(config),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_x0, half = self._rows[i][3:]
        x_0 = self.predicted(i, x_t, out)
        if i % 2 == 0:
            return mix((of_x, x_t), (of_x0, x_0)), (mix((1 + half, x_t), (-half, x_0)),)
        if not before:  # nothing to correct
            return x_t.copy(), ()
        return mix((1, before[0]), (half, x_t), (-half, x_0)), ()


class Lcm(Scheduler):
    """Latent consistency models (Luo et al. 2023, Algorithm 3): predict x_0, add noise of the next level.

    A row is (x_0 from x_t, x_0 from the output, x_prev from x_t, from x_0, from the noise).
    """

    name = "lcm"
    settings: ClassVar = {
        **_ZERO_SNR, "clip_sample": False, "clip_sample_range": 1.0, "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }  # fmt: skip
    diffusers_class = "LCMScheduler"
    diffusers_ignores = ("timestep_spacing", "steps_offset", "set_alpha_to_one")

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """See ``Scheduler.draws_noise``."""
        return True

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps = distilled_timesteps(config, num_inference_steps)
        alpha = _alphas(config, timesteps)
        alpha_prev = np.append(alpha[1:], 1.0)  # the last step adds no noise
        signal, level = np.sqrt(alpha), np.sqrt(1 - alpha)
        x0_x, x0_out = _x0(config, signal, level)
        # Boundary condition of consistency models: x itself at timestep 0.
        scaled = timesteps * config.timestep_scaling
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        gain = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)
        root = np.sqrt(alpha_prev)
        return cls(
            timesteps=timesteps.astype(np.float32),
            init_noise_sigma=1.0,
            needs_noise=True,
            _rows=_rows(x0_x, x0_out, root * skip, root * gain, np.sqrt(1 - alpha_prev)),
            _levels=_rows(signal, level),
            _clip=_clip_of(config),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_x0, of_noise = self._rows[i][2:]
        return mix((of_x, x_t), (of_x0, self.predicted(i, x_t, out)), (of_noise, noise)), ()


class Tcd(Scheduler):
    """Trajectory consistency distillation (Zheng et al. 2024, Algorithm 4, strategic stochastic sampling).

    To timestep floor((1 - eta) * next) without noise, then up to the next with it. A row is (x_0 from x_t, from the
    output, x_prev from x_t, from the output, from the noise).
    """

    name = "tcd"
    settings: ClassVar = {**_ZERO_SNR, "original_inference_steps": 50, "eta": 0.3}
    diffusers_class = "TCDScheduler"
    diffusers_ignores = (
        "timestep_spacing", "steps_offset", "set_alpha_to_one", "timestep_scaling", "clip_sample", "clip_sample_range",
    )  # fmt: skip

    @classmethod
    def draws_noise(cls, config: "SchedulerConfig") -> bool:
        """See ``Scheduler.draws_noise``."""
        return config.eta > 0

    @classmethod
    def make(cls, config: "SchedulerConfig", num_inference_steps: int) -> Self:
        """See ``Scheduler.make``."""
        timesteps = distilled_timesteps(config, num_inference_steps)
        arrivals = np.append(timesteps[1:], 0.0)
        below = np.floor(np.float32(1 - config.eta) * arrivals.astype(np.float32))
        alpha, alpha_prev, alpha_below = (_alphas(config, each) for each in (timesteps, arrivals, below))
        root, noise_root = np.sqrt(alpha), np.sqrt(1 - alpha)
        x0_x, x0_out = _x0(config, root, noise_root)
        eps_x, eps_out = _eps(config, root, noise_root)
        kept = alpha_prev / alpha_below
        of_x0, of_eps = np.sqrt(kept * alpha_below), np.sqrt(kept * (1 - alpha_below))
        return cls(
            timesteps=timesteps.astype(np.float32),
            init_noise_sigma=1.0,
            needs_noise=cls.draws_noise(config),
            _rows=_rows(
                x0_x, x0_out, of_x0 * x0_x + of_eps * eps_x, of_x0 * x0_out + of_eps * eps_out, np.sqrt(1 - kept)
            ),
            _levels=_rows(root, noise_root),
        )

    def _step(self, i: int, x_t: Array, out: Array, before: State, noise: Array | None) -> tuple[Array, State]:
        of_x, of_out, of_noise = self._rows[i][2:]
        return mix((of_x, x_t), (of_out, out), (of_noise, noise)), ()


SAMPLERS: dict[str, type[Scheduler]] = {
    sampler.name: sampler for sampler in (Ddim, Pndm, Dpm, DpmSde, UniPC, Euler, EulerAncestral, Heun, Lcm, Tcd)
}


def mix(*terms: tuple[Any, Array | None]) -> Array:
    """The sum of coefficients times arrays, a new array; terms with coefficient 0 are left out."""
    total: Array | None = None
    for coefficient, array in terms:
        if coefficient and array is not None:
            part = array * np.float32(coefficient)
            total = part if total is None else np.add(total, part, out=total)
    if total is None:
        total = np.zeros_like(next(array for _, array in terms if array is not None))
    return total


def _alphas(config: "SchedulerConfig", timesteps: NDArray[Any]) -> Float64:
    """Share of signal at whole timesteps; below 0 the schedule's end."""
    table = alphas_cumprod(config).astype(np.float64)
    final = 1.0 if config.set_alpha_to_one else table[0]
    index = timesteps.astype(np.int64)
    return np.where(index >= 0, table[index], final)


def _x0(config: "SchedulerConfig", alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """What x_0 takes from x_t = alpha * x_0 + sigma * eps, and what from the UNet's output."""
    if config.prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if config.prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _eps(config: "SchedulerConfig", alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """The same of the noise."""
    if config.prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if config.prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def _x0_of_sigma(config: "SchedulerConfig", sigma: Float64) -> tuple[Float64, Float64]:
    """The same of x_0 from x = x_0 + sigma * eps, which the UNet is shown divided by sqrt(sigma**2 + 1)."""
    scale = 1 / np.sqrt(sigma**2 + 1)
    x0_x, x0_out = _x0(config, scale, sigma * scale)
    return x0_x * scale, x0_out


def _euler_noise(config: "SchedulerConfig", sigmas: Float64) -> float:
    sigma_max = float(sigmas.max())
    return math.sqrt(sigma_max**2 + 1) if config.timestep_spacing == "leading" else sigma_max


def _clip_of(config: "SchedulerConfig") -> np.float32 | None:
    return np.float32(config.clip_sample_range) if config.clip_sample else None


def _rows(*columns: Float64) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in np.stack(columns, axis=1).astype(np.float32))
