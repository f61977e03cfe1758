"""Where the steps of a schedule lie: alphas, timesteps and noise levels, before any image is touched.

Constraints that shaped this file:

- The training tables are float32, rounded where torch rounds them. ``1 - alpha`` cancels near t = 0: a
  table kept in float64 throughout would put the smallest sigma 1e-5 away from the one that every published
  model is sampled with.
- The kinds differ in how they divide the schedule (dpmpp_2m leaves room for a last step that it does not
  take; ddim and euler do not; only euler keeps fractions), so spacing is asked for by kind.
- Steps are counted, never found by their timestep: Karras' levels, rounded to timesteps, repeat some of them.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError
from edgediff_runtime.scheduler_config import SchedulerConfig

_MAX_BETA = 0.999
_KARRAS_RHO = 7.0
# float16's smallest positive number stands in for a terminal alpha of 0, whose sigma would be infinite.
_TERMINAL_ALPHA = 2.0**-24


def alphas_cumprod(config: SchedulerConfig) -> NDArray[np.float32]:
    """Share of signal left at each training timestep: float32 [num_train_timesteps], falling.

    Rescaled to zero terminal SNR, ddim's ends at 0 and the others' at 2**-24.
    """
    alphas = np.float32(1.0) - _betas(config)
    if config.rescale_betas_zero_snr:
        alphas = _zero_terminal_snr(alphas)
    table = _cumulative_product(alphas)
    if config.rescale_betas_zero_snr and config.name != "ddim":
        table[-1] = _TERMINAL_ALPHA
    return table


def spaced_timesteps(config: SchedulerConfig, num_inference_steps: int, last: int) -> NDArray[np.float64]:
    """Training timesteps at which the UNet is asked, float64 [N], falling, before Karras spacing.

    They are whole numbers, except under euler's ``linspace``. `last` is one past the highest that may be used, below
    ``num_train_timesteps`` only where dpmpp_2m clips lambda; ``trailing`` then takes fewer than N steps.

    Raises:
        RequestError: If the offset moves a timestep beyond the training schedule.

    >>> spaced_timesteps(SchedulerConfig(name="ddim", steps_offset=1), 4, 1000).tolist()
    [751.0, 501.0, 251.0, 1.0]
    """
    # dpmpp_2m divides by N + 1 and drops the lowest point.
    points = num_inference_steps + (config.name == "dpmpp_2m")
    timesteps: NDArray[np.floating[Any]]
    if config.timestep_spacing == "linspace":
        rising = np.linspace(0, last - 1, points)
        if config.name == "euler":
            timesteps = rising.astype(np.float32).astype(np.float64)[::-1]
        else:
            timesteps = rising.round()[::-1]
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


def sigma_schedule(
    config: SchedulerConfig, num_inference_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Timesteps and noise levels of the kinds that step in sigma = sqrt((1 - alpha) / alpha).

    Returns:
        float32 [N] as fed to the UNet; and float64 [N + 1], rounded to float32's values, the last where the last step
        arrives.

    Raises:
        RequestError: If the offset moves a timestep beyond the training schedule.
    """
    alphas = alphas_cumprod(config)
    table: NDArray[np.float32] = np.sqrt((np.float32(1.0) - alphas) / alphas)
    dpm = config.name == "dpmpp_2m"

    if dpm and config.use_karras_sigmas:
        # dpmpp_2m spans the whole table, whatever the spacing; euler only what its timesteps reach.
        sigmas = table[[-1, 0]].astype(np.float64)
    else:
        timesteps = spaced_timesteps(config, num_inference_steps, _last_timestep(config, alphas))
        sigmas = np.interp(timesteps, np.arange(len(table)), table.astype(np.float64))

    if config.use_karras_sigmas:
        sigmas = _karras(float(sigmas[0]), float(sigmas[-1]), num_inference_steps)
        timesteps = _timesteps_of(sigmas, np.log(table))
        if dpm and config.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    if dpm:
        timesteps = np.trunc(timesteps)

    arrival = table[0] if config.final_sigmas_type == "sigma_min" else np.float32(0.0)
    rounded = np.append(sigmas.astype(np.float32), arrival)
    return timesteps.astype(np.float32), rounded.astype(np.float64)


def _betas(config: SchedulerConfig) -> NDArray[np.float32]:
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, dtype=np.float32)
    if config.beta_schedule == "linear":
        return _linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.square(_linspace(config.beta_start**0.5, config.beta_end**0.5, steps))

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(betas, _MAX_BETA).astype(np.float32)


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


def _last_timestep(config: SchedulerConfig, alphas: NDArray[np.float32]) -> int:
    if config.lambda_min_clipped is None:
        return config.num_train_timesteps
    lambdas = np.log(np.sqrt(alphas)) - np.log(np.sqrt(np.float32(1.0) - alphas))
    clipped = int(np.searchsorted(lambdas[::-1], np.float32(config.lambda_min_clipped)))
    if clipped == config.num_train_timesteps:
        raise RequestError(
            f"lambda_min_clipped {config.lambda_min_clipped!r}: expected at most {lambdas[0]:.4g}, where the "
            "training schedule begins"
        )
    return config.num_train_timesteps - clipped


def _karras(sigma_max: float, sigma_min: float, count: int) -> NDArray[np.float64]:
    """Karras et al. 2022, equation 5: noise levels evenly spaced in sigma**(1/rho)."""
    start, end = sigma_max ** (1 / _KARRAS_RHO), sigma_min ** (1 / _KARRAS_RHO)
    levels: NDArray[np.float64] = (start + np.linspace(0, 1, count) * (end - start)) ** _KARRAS_RHO
    return levels


def _timesteps_of(sigmas: NDArray[np.float64], log_table: NDArray[np.float32]) -> NDArray[np.float64]:
    """Fractional timesteps of these noise levels, the table taken as linear in log(sigma)."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_table, log_sigma, side="right") - 1, 0, len(log_table) - 2)
    below, above = log_table[low], log_table[low + 1]
    w = np.clip((below - log_sigma) / (below - above), 0, 1)
    timesteps: NDArray[np.float64] = (1 - w) * low + w * (low + 1)
    return timesteps
