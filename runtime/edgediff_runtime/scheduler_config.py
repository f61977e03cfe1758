"""The settings of a scheduler, as a bundle's manifest holds them.

Constraints that shaped this file:

- A field for every setting that the runtime implements and for no other, under diffusers' names and with
  diffusers' defaults, so that a manifest can be laid beside a ``scheduler_config.json``. What is not here
  is refused when the bundle is exported.
- JSON has no infinity and not every language reads it back, so ``lambda_min_clipped`` says None for it.
- A setting that a kind does not read must stay at its default: no setting is ignored silently.
"""

import math
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

import msgspec

from edgediff_runtime.errors import RequestError

SchedulerName = Literal["ddim", "dpmpp_2m", "euler"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
FinalSigmasType = Literal["zero", "sigma_min"]

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "name": get_args(SchedulerName),
    "beta_schedule": get_args(BetaSchedule),
    "prediction_type": get_args(PredictionType),
    "timestep_spacing": get_args(TimestepSpacing),
    "final_sigmas_type": get_args(FinalSigmasType),
}
_BOOLEANS: Final = (
    "rescale_betas_zero_snr",
    "clip_sample",
    "set_alpha_to_one",
    "use_karras_sigmas",
    "lower_order_final",
    "euler_at_final",
)
_KINDS: Final[dict[str, tuple[str, ...]]] = {
    "clip_sample": ("ddim",),
    "clip_sample_range": ("ddim",),
    "set_alpha_to_one": ("ddim",),
    "eta": ("ddim",),
    "use_karras_sigmas": ("dpmpp_2m", "euler"),
    "final_sigmas_type": ("dpmpp_2m", "euler"),
    "lower_order_final": ("dpmpp_2m",),
    "euler_at_final": ("dpmpp_2m",),
    "lambda_min_clipped": ("dpmpp_2m",),
}
_DEFAULT_SPACING: Final[dict[str, TimestepSpacing]] = {
    "ddim": "leading",
    "dpmpp_2m": "linspace",
    "euler": "linspace",
}


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How noise levels are laid out and stepped down.

    Attributes:
        name: ``ddim`` (Song et al. 2020), ``dpmpp_2m`` (DPM-Solver++, second-order multistep, midpoint; Lu
            et al. 2022) or ``euler`` (Karras et al. 2022, Algorithm 2 without churn).
        beta_start: First beta of ``linear`` and ``scaled_linear``.
        beta_end: Last beta of ``linear`` and ``scaled_linear``.
        beta_schedule: How betas run between them; ``squaredcos_cap_v2`` reads neither.
        trained_betas: The betas themselves, one per training timestep; they replace the three above.
        prediction_type: What the UNet returns.
        timestep_spacing: How the steps divide the training schedule; None takes the kind's own default
            (``leading`` for ddim, ``linspace`` for the others) and reads back as that.
        steps_offset: Timesteps added under ``leading`` spacing.
        rescale_betas_zero_snr: Shift the schedule so that its last timestep is pure noise (Lin et al. 2023).
        clip_sample: ddim: clip the predicted x_0.
        clip_sample_range: ddim: to plus and minus this.
        set_alpha_to_one: ddim: the last step ends at alpha 1 rather than at the first timestep's alpha.
        eta: ddim: share of fresh noise per step, 0 (none) to 1 (as DDPM).
        use_karras_sigmas: dpmpp_2m, euler: noise levels spaced as Karras et al. 2022, equation 5, with rho 7.
        final_sigmas_type: dpmpp_2m, euler: end at sigma 0 or at the training schedule's smallest.
        lower_order_final: dpmpp_2m: the last of fewer than 15 steps is first order.
        euler_at_final: dpmpp_2m: the last step is always first order.
        lambda_min_clipped: dpmpp_2m: steps start where log(alpha/sigma) is at least this; None is minus
            infinity.

    Raises:
        RequestError: If a setting is of the wrong type, not finite, out of its range, or not read by
        ``name``.
    """

    name: SchedulerName
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    eta: float = 0.0
    use_karras_sigmas: bool = False
    final_sigmas_type: FinalSigmasType = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float | None = None

    def __post_init__(self) -> None:
        """Checks each setting: its type, its range, and that its kind reads it."""
        if self.timestep_spacing is None and self.name in _DEFAULT_SPACING:
            msgspec.structs.force_setattr(self, "timestep_spacing", _DEFAULT_SPACING[self.name])
        for field, choices in _CHOICES.items():
            given = getattr(self, field)
            if not isinstance(given, str) or given not in choices:
                raise RequestError(f"scheduler {field} {given!r}: expected one of {', '.join(choices)}")
        for field in _BOOLEANS:
            if not isinstance(getattr(self, field), bool):
                raise RequestError(f"scheduler {field} {getattr(self, field)!r}: expected true or false")
        _integer("num_train_timesteps", self.num_train_timesteps, at_least=1)
        _integer("steps_offset", self.steps_offset, at_least=0)
        _betas(self)
        _number("clip_sample_range", self.clip_sample_range, "a number above 0", lambda v: v > 0)
        _number("eta", self.eta, "a number from 0 to 1", lambda v: 0 <= v <= 1)
        if self.lambda_min_clipped is not None:
            _number("lambda_min_clipped", self.lambda_min_clipped, "a finite number, or null", lambda _: True)
        _only_what_is_read(self)


def _betas(config: SchedulerConfig) -> None:
    _number("beta_start", config.beta_start, "a number above 0 and below 1", _is_beta)
    _number("beta_end", config.beta_end, "a number above 0 and below 1", _is_beta)
    betas = config.trained_betas
    if betas is not None:
        if not isinstance(betas, tuple) or len(betas) != config.num_train_timesteps:
            given = f"{len(betas)} of them" if isinstance(betas, tuple) else repr(type(betas).__name__)
            raise RequestError(
                f"scheduler trained_betas, {given}: expected a tuple of {config.num_train_timesteps} betas, "
                "one per training timestep"
            )
        for i, beta in enumerate(betas):
            _number(f"trained_betas[{i}]", beta, "a number above 0 and below 1", _is_beta)


def _only_what_is_read(config: SchedulerConfig) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(SchedulerConfig)}
    for field, kinds in _KINDS.items():
        if config.name not in kinds and getattr(config, field) != defaults[field]:
            raise RequestError(
                f"scheduler {field} {getattr(config, field)!r}: {config.name} does not read it, expected the "
                f"default {defaults[field]!r}; a setting of {' and '.join(kinds)}"
            )


def _is_beta(value: float) -> bool:
    return 0 < value < 1


def _integer(field: str, given: Any, at_least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < at_least:
        raise RequestError(f"scheduler {field} {given!r}: expected an integer of at least {at_least}")


def _number(field: str, given: Any, expected: str, holds: Callable[[float], bool]) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or not holds(given):
        raise RequestError(f"scheduler {field} {given!r}: expected {expected}")
