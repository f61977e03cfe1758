"""Where the steps of a schedule lie: alphas, timesteps and noise levels, before any image is touched.

Constraints that shaped this file:

- The training tables are float32, rounded where torch rounds them. ``1 - alpha`` cancels near t = 0: a
  table kept in float64 throughout would put the smallest sigma 1e-5 away from the one that every published
  model is sampled with.
- Steps are counted, never found by their timestep: Karras' levels, rounded to timesteps, repeat some of them.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError

if TYPE_CHECKING:
    from edgediff_runtime.schedulers import SchedulerConfig

_MAX_BETA = 0.999
_KARRAS_RHO = 7.0
# Alpha and beta of the Beta distribution whose quantiles are the levels of Lee et al. 2024.
_BETA_SHAPE = 0.6
# float16's smallest positive number stands in for a terminal alpha of 0, whose sigma would be infinite.
_TERMINAL_ALPHA = 2.0**-24


def alphas_cumprod(config: "SchedulerConfig") -> NDArray[np.float32]:
    """Share of signal left at each training timestep: float32 [num_train_timesteps], falling, to 0 at zero SNR."""
    alphas = np.float32(1.0) - _betas(config)
    if config.rescale_betas_zero_snr:
        alphas = _zero_terminal_snr(alphas)
    return _cumulative_product(alphas)


def spaced_timesteps(
    config: "SchedulerConfig",
    num_inference_steps: int,
    *,
    points: int | None = None,
    last: int | None = None,
    fractional: bool = False,
) -> NDArray[np.float64]:
    """Training timesteps at which the UNet is asked, float64 [N], falling.

    Args:
        points: How many points divide the schedule, of which the first N are taken; N where None.
        last: One past the highest timestep; ``num_train_timesteps`` where None. Below it, ``trailing`` takes fewer
            than N steps.
        fractional: Keep the fractions of ``linspace``.

    Raises:
        RequestError: The offset moves a timestep beyond the training schedule.

    >>> from edgediff_runtime.schedulers import SchedulerConfig
    >>> spaced_timesteps(SchedulerConfig(name="ddim", steps_offset=1), 4).tolist()
    [751.0, 501.0, 251.0, 1.0]
    """
    points = num_inference_steps if points is None else points
    last = config.num_train_timesteps if last is None else last
    timesteps: NDArray[np.floating[Any]]
    if config.timestep_spacing == "linspace":
        rising = np.linspace(0, last - 1, points)
        timesteps = (rising.astype(np.float32) if fractional else rising.round())[::-1]
    elif config.timestep_spacing == "leading":
        timesteps = (np.arange(points) * (last // points))[::-1] + float(config.steps_offset)
    else:
        stride = config.num_train_timesteps / num_inference_steps
        timesteps = np.arange(last, 0, -stride).round() - 1
    # For some N rounding gives arange one element too many, at timestep -1: 61 steps of 1000, for one.
    spaced = timesteps[:num_inference_steps].astype(np.float64)
    if spaced[0] > config.num_train_timesteps - 1:
        raise RequestError(
            f"{num_inference_steps} steps with steps_offset {config.steps_offset} start at timestep "
            f"{spaced[0]:g}: expected at most {config.num_train_timesteps - 1}; take fewer steps"
        )
    return spaced


def distilled_timesteps(config: "SchedulerConfig", num_inference_steps: int) -> NDArray[np.float64]:
    """Timesteps of a model that was distilled on ``original_inference_steps`` of them, float64 [N], falling.

    Raises:
        RequestError: There are fewer of those than steps, or more than training timesteps.
    """
    original = config.original_inference_steps
    if not num_inference_steps <= original <= config.num_train_timesteps:
        raise RequestError(
            f"{num_inference_steps} steps of {config.name} with original_inference_steps {original}: expected at least "
            f"as many original steps as steps, and at most {config.num_train_timesteps}; take fewer steps"
        )
    known = np.arange(1, original + 1) * (config.num_train_timesteps // original) - 1
    chosen = np.floor(np.linspace(0, original, num_inference_steps, endpoint=False)).astype(np.int64)
    return known[::-1][chosen].astype(np.float64)


def euler_levels(
    config: "SchedulerConfig", num_inference_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Timesteps and noise levels sigma = sqrt((1 - alpha) / alpha) of samplers that keep fractions of timesteps.

    Karras', exponential and beta levels run between the highest and lowest that the spacing reaches.

    Returns:
        float32 [N] as fed to the UNet; and float64 [N + 1], rounded to float32's values, the last where the last step
        arrives.
    """
    table = _sigma_table(config)
    timesteps = spaced_timesteps(config, num_inference_steps, fractional=True)
    sigmas = np.interp(timesteps, np.arange(len(table)), table.astype(np.float64))
    if config.spread is not None:
        sigmas = _spread(config.spread, float(sigmas[0]), float(sigmas[-1]), num_inference_steps)
        timesteps = _timesteps_of(sigmas, np.log(table))
    return _with_arrival(config, table, timesteps, sigmas)


def solver_levels(
    config: "SchedulerConfig", num_inference_steps: int, *, round_karras: bool
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The same for multistep solvers: whole timesteps, and levels that run over the whole table."""
    table = _sigma_table(config)
    if config.spread is None:
        # They divide the schedule by N + 1 and drop the lowest point.
        last = _last_timestep(config)
        timesteps = spaced_timesteps(config, num_inference_steps, points=num_inference_steps + 1, last=last)
        sigmas = np.interp(timesteps, np.arange(len(table)), table.astype(np.float64))
    else:
        sigmas = _spread(config.spread, float(table[-1]), float(table[0]), num_inference_steps)
        timesteps = _timesteps_of(sigmas, np.log(table))
        if config.spread == "karras" and round_karras:
            timesteps = timesteps.round()
    return _with_arrival(config, table, np.trunc(timesteps), sigmas)


def _with_arrival(
    config: "SchedulerConfig", table: NDArray[np.float32], timesteps: NDArray[np.float64], sigmas: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    arrival = table[0] if config.final_sigmas_type == "sigma_min" else np.float32(0.0)
    rounded = np.append(sigmas.astype(np.float32), arrival)
    return timesteps.astype(np.float32), rounded.astype(np.float64)


def _sigma_table(config: "SchedulerConfig") -> NDArray[np.float32]:
    alphas = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = _TERMINAL_ALPHA
    table: NDArray[np.float32] = np.sqrt((np.float32(1.0) - alphas) / alphas)
    return table


def _betas(config: "SchedulerConfig") -> NDArray[np.float32]:
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, dtype=np.float32)
    if config.beta_schedule == "linear":
        return _linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.square(_linspace(config.beta_start**0.5, config.beta_end**0.5, steps))
    return _cosine_betas(steps)


@lru_cache(maxsize=4)
def _cosine_betas(steps: int) -> NDArray[np.float32]:
    """Nichol and Dhariwal 2021, equation 17; the same array for each generation, so it is not to be changed."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    found = np.minimum(betas, _MAX_BETA).astype(np.float32)
    found.setflags(write=False)
    return found


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Evenly spaced float32 values as torch has them: a float32 stride from both ends, one rounding each."""
    first, final = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    stride = float((final - first) / np.float32(count - 1))
    i = np.arange(count)
    rising = float(first) + stride * i
    falling = float(final) - stride * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)


def _cumulative_product(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lin et al. 2023, Algorithm 1: shift sqrt(alpha_bar) to end at 0, scale it to begin where it began."""
    root = np.sqrt(_cumulative_product(alphas))
    first, last = root[0], root[-1]
    alpha_bar = np.square((root - last) * (first / (first - last)))
    ratios = np.append(alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1])
    # Through betas and back, for the two roundings that the published tables have.
    return np.float32(1.0) - (np.float32(1.0) - ratios)


def _last_timestep(config: "SchedulerConfig") -> int:
    """One past the highest timestep that ``lambda_min_clipped`` leaves."""
    if config.lambda_min_clipped is None:
        return config.num_train_timesteps
    alphas = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = _TERMINAL_ALPHA
    lambdas = np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1.0) - alphas))
    clipped = int(np.searchsorted(lambdas[::-1], np.float32(config.lambda_min_clipped)))
    if clipped == config.num_train_timesteps:
        raise RequestError(
            f"lambda_min_clipped {config.lambda_min_clipped!r}: expected at most {lambdas[0]:.4g}, where the "
            "training schedule begins"
        )
    return config.num_train_timesteps - clipped


def _spread(kind: str, sigma_max: float, sigma_min: float, count: int) -> NDArray[np.float64]:
    """Noise levels from the highest to the lowest: Karras et al. 2022, equation 5; even in log; or Beta quantiles."""
    ramp = np.linspace(0, 1, count)
    if kind == "karras":
        start, end = sigma_max ** (1 / _KARRAS_RHO), sigma_min ** (1 / _KARRAS_RHO)
        return np.asarray((start + ramp * (end - start)) ** _KARRAS_RHO)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return sigma_min + beta_quantiles(1 - ramp) * (sigma_max - sigma_min)


def beta_quantiles(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles of the distribution Beta(0.6, 0.6), float64, of shares from 0 to 1; exact to 1e-12.

    With y = x^a the distribution function is nearly a line in y, which Newton's method follows down to x = 0. The
    upper half mirrors the lower one.
    """
    a = _BETA_SHAPE
    k = np.arange(1, 60)
    # Coefficients of x^k in B_x(a, a) / x^a = sum of (1 - a)_k / (k! (a + k)) x^k.
    series = np.append(1.0, np.cumprod((k - a) / k)) / (a + np.append(0, k))
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    share = np.minimum(shares, 1 - shares)
    y = share * whole * a
    for _ in range(12):
        x = np.minimum(y ** (1 / a), 0.5)
        value = x**a * np.polynomial.polynomial.polyval(x, series)
        y = x**a - (value - share * whole) * a * (1 - x) ** (1 - a)
    x = np.clip(y, 0, None) ** (1 / a)
    return np.where(shares <= 0.5, x, 1 - x)


def _timesteps_of(sigmas: NDArray[np.float64], log_table: NDArray[np.float32]) -> NDArray[np.float64]:
    """Fractional timesteps of these noise levels, the table taken as linear in log(sigma)."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_table, log_sigma, side="right") - 1, 0, len(log_table) - 2)
    below, above = log_table[low], log_table[low + 1]
    w = np.clip((below - log_sigma) / (below - above), 0, 1)
    timesteps: NDArray[np.float64] = (1 - w) * low + w * (low + 1)
    return timesteps
