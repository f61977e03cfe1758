"""The schedulers: how x_t and the UNet's output become the next, less noisy x.

Constraints that shaped this file:

- Each kind is what diffusers' class of that kind computes (DDIMScheduler, DPMSolverMultistepScheduler,
  EulerDiscreteScheduler), checked against recorded traces of it.
- A step is a linear combination with coefficients known before the first image, so they are computed once, in
  float64, and rounded to float32; a step is then a few passes over the array, cheap on a phone.
- A scheduler is immutable. The caller keeps the state between steps, so concurrent generations are independent, and
  nothing has to be reset.
- Coefficients belong to step i. A timestep is never looked up: Karras spacing repeats timesteps.
"""

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError
from edgediff_runtime.schedule_tables import alphas_cumprod, sigma_schedule, spaced_timesteps
from edgediff_runtime.scheduler_config import SchedulerConfig

__all__ = [
    "DDIMScheduler",
    "DPMScheduler",
    "EulerScheduler",
    "Scheduler",
    "SchedulerConfig",
    "make_scheduler",
]

Array = NDArray[np.float32]
State = Any
Row = tuple[np.float32, ...]

# dpmpp_2m drops to first order at the end only of schedules shorter than this.
_LOWER_ORDER_BELOW = 15


@dataclass(frozen=True, eq=False)
class Scheduler(ABC):
    """The steps of one schedule, ready to take.

    Attributes:
        timesteps: float32 [N], as fed to the UNet; read-only.
        init_noise_sigma: Standard deviation of the initial latent.
        needs_noise: Whether ``step`` wants fresh noise.
    """

    timesteps: Array
    init_noise_sigma: float
    needs_noise: bool
    _rows: tuple[Row, ...]

    @property
    def num_inference_steps(self) -> int:
        """Number of steps, N."""
        return len(self._rows)

    def scale_model_input(self, i: int, x_t: Array) -> Array:
        """The UNet's input at step i, of x_t's shape; ``x_t`` itself where the kind does not scale."""
        return x_t

    def step(
        self,
        i: int,
        x_t: Array,
        model_output: Array,
        state: State = None,
        noise: Array | None = None,
        first: bool = False,
    ) -> tuple[Array, State]:
        """Take step i.

        Args:
            i: Step, 0 to N - 1.
            x_t: float32 [B, C, H, W], the latent before the step; left as it is.
            model_output: float32 [B, C, H, W], what the UNet returned for it; left as it is, and not kept.
            state: None at the first step, else what step i - 1 returned.
            noise: float32 [B, C, H, W], standard normal, where ``needs_noise``; not read otherwise.
            first: Whether it is the first step that is run, wherever that is: a multistep sampler is of first order
                there.

        Returns:
            The latent after the step, a new array of the same shape, and the state for step i + 1.

        Raises:
            RequestError: If the step, a shape, the state or the noise does not fit.
        """
        self._check(i)
        if model_output.shape != x_t.shape:
            raise RequestError(
                f"model output of shape {list(model_output.shape)}: expected the latent's, {list(x_t.shape)}"
            )
        return self._step(i, x_t, model_output, state, noise, first)

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self._rows):
            raise RequestError(f"step {i}: expected 0 to {len(self._rows) - 1}")

    @abstractmethod
    def _step(
        self, i: int, x_t: Array, model_output: Array, state: State, noise: Array | None, first: bool
    ) -> tuple[Array, State]:
        """Takes a step that was checked."""


@dataclass(frozen=True, eq=False)
class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models (Song et al. 2020, equation 12).

    A row is (x_0 from x_t, x_0 from the output, x_prev from x_0, from x_t, from the output, from the
    noise); where x_0 is not clipped its part is folded into the fourth and fifth.
    """

    clip: np.float32 | None

    def _step(
        self, i: int, x_t: Array, model_output: Array, state: State, noise: Array | None, first: bool
    ) -> tuple[Array, State]:
        x0_x, x0_out, of_x0, of_x, of_out, of_noise = self._rows[i]
        x_prev = x_t * of_x
        x_prev += model_output * of_out
        if self.clip is not None:
            x_0 = x_t * x0_x
            x_0 += model_output * x0_out
            np.maximum(x_0, -self.clip, out=x_0)
            np.minimum(x_0, self.clip, out=x_0)
            x_0 *= of_x0
            x_prev += x_0
        if self.needs_noise:
            if noise is None or noise.shape != x_t.shape:
                given = "none" if noise is None else f"shape {list(noise.shape)}"
                raise RequestError(f"fresh noise, {given}: ddim with eta above 0 expected shape {list(x_t.shape)}")
            x_prev += noise * of_noise
        return x_prev, None


@dataclass(frozen=True, eq=False)
class DPMScheduler(Scheduler):
    """DPM-Solver++, second-order multistep, midpoint (Lu et al. 2022, Algorithm 2).

    A row is (x_0 from x_t, x_0 from the output, x_prev from x_t, from x_0, from the step before's x_0). The
    state is x_0 as the last step predicted it.
    """

    def _step(
        self, i: int, x_t: Array, model_output: Array, state: State, noise: Array | None, first: bool
    ) -> tuple[Array, State]:
        x0_x, x0_out, of_x, of_x0, of_before = self._rows[i]
        if x0_x:
            x_0 = x_t * x0_x
            x_0 += model_output * x0_out
        else:
            # A copy: the session that made the output may write the next one into the same memory.
            x_0 = model_output * x0_out
        x_prev = x_t * of_x
        x_prev += x_0 * of_x0
        if of_before:
            if first:
                state = x_0
            if state is None or state.shape != x_t.shape:
                given = "none" if state is None else f"one of shape {list(state.shape)}"
                raise RequestError(f"scheduler state, {given}: step {i} expected the state of step {i - 1}")
            x_prev += state * of_before
        return x_prev, x_0


@dataclass(frozen=True, eq=False)
class EulerScheduler(Scheduler):
    """Euler's method in sigma (Karras et al. 2022, Algorithm 2 without churn).

    A row is (the input's scale, x_prev from x_t, from the output).
    """

    def scale_model_input(self, i: int, x_t: Array) -> Array:
        """Divide by sqrt(sigma**2 + 1); see ``Scheduler.scale_model_input``."""
        self._check(i)
        return x_t * self._rows[i][0]

    def _step(
        self, i: int, x_t: Array, model_output: Array, state: State, noise: Array | None, first: bool
    ) -> tuple[Array, State]:
        _, of_x, of_out = self._rows[i]
        x_prev = x_t * of_x
        x_prev += model_output * of_out
        return x_prev, None


def make_scheduler(config: SchedulerConfig, num_inference_steps: int) -> Scheduler:
    """A scheduler with every coefficient of its steps computed.

    Args:
        num_inference_steps: Number of steps, N, from 1 to ``config.num_train_timesteps``. Under dpmpp_2m with
            ``trailing`` spacing and ``lambda_min_clipped`` the scheduler has fewer, as diffusers' has.

    Raises:
        RequestError: If the number of steps is not such an integer, or these settings admit no such schedule.
    """
    steps = _steps(num_inference_steps, config.num_train_timesteps)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        match config.name:
            case "ddim":
                scheduler: Scheduler = _make_ddim(config, steps)
            case "dpmpp_2m":
                scheduler = _make_dpm(config, steps)
            case "euler":
                scheduler = _make_euler(config, steps)
    for i, row in enumerate(scheduler._rows):
        if not np.isfinite(row).all():
            raise RequestError(
                f"{config.name} in {steps} steps: step {i} (timestep {scheduler.timesteps[i]:g}) would "
                f"divide by zero with timestep_spacing {config.timestep_spacing}, prediction_type "
                f"{config.prediction_type}, rescale_betas_zero_snr {config.rescale_betas_zero_snr}; expected "
                "distinct noise levels (take fewer steps) and, where the terminal SNR is zero, a prediction "
                "other than epsilon"
            )
    scheduler.timesteps.flags.writeable = False
    return scheduler


def _make_ddim(config: SchedulerConfig, steps: int) -> DDIMScheduler:
    table = alphas_cumprod(config).astype(np.float64)
    timesteps = spaced_timesteps(config, steps, config.num_train_timesteps)
    now = timesteps.astype(np.int64)
    # Not the next step's timestep: under linspace and trailing spacing the two differ.
    before = now - config.num_train_timesteps // steps
    final = 1.0 if config.set_alpha_to_one else table[0]
    alpha = table[now]
    alpha_prev = np.where(before >= 0, table[before], final)

    root, noise_root = np.sqrt(alpha), np.sqrt(1 - alpha)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    std = config.eta * np.sqrt(variance)
    direction = np.sqrt(1 - alpha_prev - std**2)

    x0_x, x0_out = _x0(config, root, noise_root)
    if config.prediction_type == "epsilon":
        eps_x, eps_out = np.zeros(steps), np.ones(steps)
    elif config.prediction_type == "v_prediction":
        eps_x, eps_out = noise_root, root
    else:
        eps_x, eps_out = 1 / noise_root, -root / noise_root
    of_x0, of_x, of_out = np.sqrt(alpha_prev), direction * eps_x, direction * eps_out
    if not config.clip_sample:
        of_x, of_out = of_x + of_x0 * x0_x, of_out + of_x0 * x0_out
    return DDIMScheduler(
        timesteps=timesteps.astype(np.float32),
        init_noise_sigma=1.0,
        needs_noise=config.eta > 0,
        _rows=_rows(x0_x, x0_out, of_x0, of_x, of_out, std),
        clip=np.float32(config.clip_sample_range) if config.clip_sample else None,
    )


def _make_dpm(config: SchedulerConfig, num_inference_steps: int) -> DPMScheduler:
    timesteps, sigmas = sigma_schedule(config, num_inference_steps)
    steps = len(timesteps)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    alpha, alpha_next = 1 / np.sqrt(sigma**2 + 1), 1 / np.sqrt(sigma_next**2 + 1)
    x0_x, x0_out = _x0(config, alpha, sigma * alpha)

    ratio = sigma_next / sigma
    gain = alpha_next * (1 - ratio)
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
    return DPMScheduler(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        needs_noise=False,
        _rows=_rows(x0_x, x0_out, ratio * alpha_next / alpha, gain + extrapolation, -extrapolation),
    )


def _make_euler(config: SchedulerConfig, num_inference_steps: int) -> EulerScheduler:
    timesteps, sigmas = sigma_schedule(config, num_inference_steps)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    variance = sigma**2 + 1
    if config.prediction_type == "epsilon":
        of_x, of_out = np.ones_like(sigma), sigma_next - sigma
    elif config.prediction_type == "v_prediction":
        of_x, of_out = (sigma * sigma_next + 1) / variance, (sigma_next - sigma) / np.sqrt(variance)
    else:
        of_x, of_out = sigma_next / sigma, 1 - sigma_next / sigma
    sigma_max = float(sigmas.max())
    return EulerScheduler(
        timesteps=timesteps,
        init_noise_sigma=math.sqrt(sigma_max**2 + 1) if config.timestep_spacing == "leading" else sigma_max,
        needs_noise=False,
        _rows=_rows(1 / np.sqrt(variance), of_x, of_out),
    )


def _x0(
    config: SchedulerConfig, alpha: NDArray[np.float64], sigma: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What x_0 takes from x_t = alpha * x_0 + sigma * eps, and what from the UNet's output."""
    if config.prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if config.prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _rows(*columns: NDArray[np.float64]) -> tuple[Row, ...]:
    return tuple(tuple(row) for row in np.stack(columns, axis=1).astype(np.float32))


def _steps(given: Any, limit: int) -> int:
    try:
        steps = -1 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        steps = -1
    if not 1 <= steps <= limit:
        raise RequestError(f"num_inference_steps {given!r}: expected an integer from 1 to {limit}")
    return steps
