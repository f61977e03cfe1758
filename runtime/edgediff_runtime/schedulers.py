"""The settings of a scheduler, as a bundle's manifest holds them, and the scheduler that is made from them.

Constraints that shaped this file:

- A field for every setting that a sampler implements and for no other, under diffusers' names, so that a manifest can
  be laid beside a ``scheduler_config.json``. What is not here is refused when the bundle is exported.
- JSON has no infinity and not every language reads it back, so ``lambda_min_clipped`` says None for it.
- A setting that a sampler does not read must stay at its default: no setting is ignored silently.
"""

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from edgediff_runtime.errors import RequestError
from edgediff_runtime.samplers import SAMPLERS, Scheduler

__all__ = [
    "SCHEDULER_NAMES",
    "Scheduler",
    "SchedulerConfig",
    "make_scheduler",
    "sampler_of",
    "steps_of",
    "with_sampler",
]

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
FinalSigmasType = Literal["zero", "sigma_min"]

# How noise levels may be laid out, by the ending that a recipe's name has for it.
SPREADS: Final = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
# What a recipe may name: a sampler, or a sampler with one of these layouts.
SCHEDULER_NAMES: Final = tuple(
    name + ending
    for name, sampler in SAMPLERS.items()
    for ending in ("", *(f"_{spread}" for spread, setting in SPREADS.items() if setting in sampler.settings))
)
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "beta_schedule": get_args(BetaSchedule),
    "prediction_type": get_args(PredictionType),
    "timestep_spacing": get_args(TimestepSpacing),
    "final_sigmas_type": get_args(FinalSigmasType),
}
_BOOLEANS: Final = (
    "rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one", "use_karras_sigmas", "lower_order_final",
    "euler_at_final", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
# What is written for these where the sampler does not read them.
_UNREAD: Final[dict[str, Any]] = {
    "timestep_spacing": "leading",
    "clip_sample": True,
    "set_alpha_to_one": True,
    "eta": 0.0,
}
# What says the noise process, which every sampler reads.
_PROCESS: Final = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
)  # fmt: skip
_ANY: Final = cast(Any, UNSET)


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How noise levels are laid out and stepped down.

    A setting that is left out takes the sampler's own default, and reads back as that.

    Attributes:
        name: The sampler.
        beta_start: First beta of ``linear`` and ``scaled_linear``.
        beta_end: Last beta of ``linear`` and ``scaled_linear``.
        beta_schedule: How betas run between them; ``squaredcos_cap_v2`` reads neither.
        trained_betas: The betas themselves, one per training timestep; they replace the three above.
        prediction_type: What the UNet returns.
        timestep_spacing: How the steps divide the training schedule.
        steps_offset: Timesteps added under ``leading`` spacing.
        rescale_betas_zero_snr: Shift the schedule so that its last timestep is pure noise (Lin et al. 2023).
        clip_sample: Clip the predicted x_0.
        clip_sample_range: To plus and minus this.
        set_alpha_to_one: The last step ends at alpha 1 rather than at the first timestep's alpha.
        eta: Share of fresh noise per step, 0 (none) to 1: of DDPM's in ddim; tcd's gamma.
        use_karras_sigmas: Noise levels spaced as Karras et al. 2022, equation 5, with rho 7.
        final_sigmas_type: End at sigma 0 or at the training schedule's smallest.
        lower_order_final: The last step is first order; dpmpp_2m's only of fewer than 15 steps.
        euler_at_final: The last step is always first order.
        lambda_min_clipped: Steps start where log(alpha/sigma) is at least this; None is minus infinity.
        use_exponential_sigmas: Noise levels evenly spaced in their logarithm; left out where false.
        use_beta_sigmas: Noise levels at quantiles of Beta(0.6, 0.6) (Lee et al. 2024); left out where false.
        original_inference_steps: Steps of the teacher's schedule that the model was distilled on.
        timestep_scaling: Of the boundary condition of lcm.

    Raises:
        RequestError: If a setting is of the wrong type, not finite, out of its range, or not read by
        ``name``.
    """

    name: SamplerName
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = _ANY
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = _ANY
    eta: float = _ANY
    use_karras_sigmas: bool = False
    final_sigmas_type: FinalSigmasType = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float | None = None
    use_exponential_sigmas: bool | UnsetType = UNSET
    use_beta_sigmas: bool | UnsetType = UNSET
    original_inference_steps: int = _ANY
    timestep_scaling: float = _ANY

    def __post_init__(self) -> None:
        """Fills in the sampler's defaults, and checks each setting's type and range, and that the sampler reads it."""
        if self.name not in SAMPLERS:
            raise RequestError(f"scheduler name {self.name!r}: expected one of {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[self.name]
        _fill(self, sampler)
        for field, choices in _CHOICES.items():
            given = getattr(self, field)
            if field == "prediction_type":
                choices = sampler.predictions
            if not isinstance(given, str) or given not in choices:
                raise RequestError(f"scheduler {field} {given!r}: expected one of {', '.join(choices)} for {self.name}")
        for field in _BOOLEANS:
            given = getattr(self, field)
            if not isinstance(given, bool) and given is not UNSET:
                raise RequestError(f"scheduler {field} {given!r}: expected true or false")
        _integer("num_train_timesteps", self.num_train_timesteps, at_least=1)
        _integer("steps_offset", self.steps_offset, at_least=0)
        _betas(self)
        _number("clip_sample_range", self.clip_sample_range, "a number above 0", lambda v: v > 0)
        _number("eta", self.eta, "a number from 0 to 1", lambda v: 0 <= v <= 1)
        if self.lambda_min_clipped is not None:
            _number("lambda_min_clipped", self.lambda_min_clipped, "a finite number, or null", lambda _: True)
        if "original_inference_steps" in sampler.settings:
            _integer("original_inference_steps", self.original_inference_steps, at_least=1)
        if "timestep_scaling" in sampler.settings:
            _number("timestep_scaling", self.timestep_scaling, "a number above 0", lambda v: v > 0)
        _only_what_is_read(self, sampler)
        spreads = [setting for setting in SPREADS.values() if getattr(self, setting)]
        if len(spreads) > 1:
            raise RequestError(f"scheduler {spreads[0]} and {spreads[1]} are both True: expected one of them")

    @property
    def spread(self) -> str | None:
        """The layout of the noise levels, a key of `SPREADS`; None where the timesteps' own levels are taken."""
        return next((spread for spread, setting in SPREADS.items() if getattr(self, setting)), None)

    @property
    def recipe_name(self) -> str:
        """One of `SCHEDULER_NAMES`: the sampler and the layout of its noise levels."""
        return self.name if self.spread is None else f"{self.name}_{self.spread}"

    @property
    def draws_noise(self) -> bool:
        """Whether the steps draw fresh noise."""
        return SAMPLERS[self.name].draws_noise(self)


def sampler_of(name: str) -> type[Scheduler]:
    """The sampler of one of `SCHEDULER_NAMES`.

    Raises:
        RequestError: It is none of them.
    """
    if name not in SCHEDULER_NAMES:
        raise RequestError(f"scheduler {name!r}: expected one of {', '.join(SCHEDULER_NAMES)}")
    return SAMPLERS[name] if name in SAMPLERS else SAMPLERS[name.rpartition("_")[0]]


def steps_of(name: str, calls: int) -> int:
    """How many ``num_inference_steps`` take so many calls of the UNet.

    Raises:
        RequestError: No number does, or the name is unknown.

    >>> steps_of("ddim", 15), steps_of("heun", 15)
    (15, 8)
    """
    sampler = sampler_of(name)
    for steps in range(1, calls + 1):
        if sampler.calls(steps) == calls:
            return steps
    raise RequestError(f"{calls} model calls: {sampler.calls_words}; expected such a number of calls")


def with_sampler(config: SchedulerConfig, name: str) -> SchedulerConfig:
    """A bundle's settings for another sampler: the same noise process, and of the rest what both read.

    Where the bundle's own does not read them, x_0 is not clipped and the last step ends at the first timestep's alpha,
    as in Stable Diffusion.

    Args:
        name: One of `SCHEDULER_NAMES`.

    Raises:
        RequestError: There is no such sampler, or it does not take the model's prediction or its zero terminal SNR.
    """
    if name == config.recipe_name:
        return config
    sampler, own = sampler_of(name), SAMPLERS[config.name].settings
    given = {field: getattr(config, field) for field in _PROCESS}
    if config.rescale_betas_zero_snr:  # of the noise process too: refused by a sampler that does not read it
        given["rescale_betas_zero_snr"] = True
    given |= {field: False for field in ("clip_sample", "set_alpha_to_one") if field in sampler.settings}
    shared = [field for field in sampler.settings if field in own and field != "eta" and field not in SPREADS.values()]
    given |= {field: getattr(config, field) for field in shared}
    given |= {SPREADS[ending]: True for ending in SPREADS if name == f"{sampler.name}_{ending}"}
    return SchedulerConfig(name=sampler.name, **given)


def make_scheduler(config: SchedulerConfig, num_inference_steps: int) -> Scheduler:
    """A scheduler with every coefficient of its steps computed.

    Args:
        num_inference_steps: Number of steps, N, from 1 to ``config.num_train_timesteps``. Heun and pndm call the UNet
            more often, and each call is a step of the scheduler. Under dpmpp_2m with ``trailing`` spacing and
            ``lambda_min_clipped`` it has fewer, as diffusers' has.

    Raises:
        RequestError: If the number of steps is not such an integer, or these settings admit no such schedule.
    """
    steps = _steps(num_inference_steps, config.num_train_timesteps)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scheduler = SAMPLERS[config.name].make(config, steps)
    for i, row in enumerate(scheduler._rows):
        if not np.isfinite(row).all():
            raise RequestError(
                f"{config.name} in {steps} steps: step {i} (timestep {scheduler.timesteps[i]:g}) would "
                f"divide by zero with timestep_spacing {config.timestep_spacing}, prediction_type "
                f"{config.prediction_type}, final_sigmas_type {config.final_sigmas_type}, rescale_betas_zero_snr "
                f"{config.rescale_betas_zero_snr}; expected distinct noise levels (take fewer steps) and, where the "
                "terminal SNR is zero, a prediction other than epsilon"
            )
    scheduler.timesteps.flags.writeable = False
    return scheduler


def _fill(config: SchedulerConfig, sampler: type[Scheduler]) -> None:
    for field in SchedulerConfig.__struct_fields__:
        given = getattr(config, field)
        if given is UNSET or (field == "timestep_spacing" and given is None):
            msgspec.structs.force_setattr(config, field, sampler.settings.get(field, _UNREAD.get(field, UNSET)))
    for field in ("use_exponential_sigmas", "use_beta_sigmas"):
        if getattr(config, field) is False:
            msgspec.structs.force_setattr(config, field, UNSET)


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


def _only_what_is_read(config: SchedulerConfig, sampler: type[Scheduler]) -> None:
    readable = {setting for each in SAMPLERS.values() for setting in each.settings}
    for field in msgspec.structs.fields(SchedulerConfig):
        unread = _UNREAD.get(field.name, field.default)
        given = getattr(config, field.name)
        if field.name in readable and field.name not in sampler.settings and given != unread:
            readers = [name for name, each in SAMPLERS.items() if field.name in each.settings]
            raise RequestError(
                f"scheduler {field.name} {given!r}: {config.name} does not read it; expected "
                f"{'none' if unread is UNSET else repr(unread)}; it is a setting of {', '.join(readers)}"
            )


def _is_beta(value: float) -> bool:
    return 0 < value < 1


def _integer(field: str, given: Any, at_least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < at_least:
        raise RequestError(f"scheduler {field} {given!r}: expected an integer of at least {at_least}")


def _number(field: str, given: Any, expected: str, holds: Callable[[float], bool]) -> None:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or not holds(given):
        raise RequestError(f"scheduler {field} {given!r}: expected {expected}")


def _steps(given: Any, limit: int) -> int:
    try:
        steps = -1 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        steps = -1
    if not 1 <= steps <= limit:
        raise RequestError(f"num_inference_steps {given!r}: expected an integer from 1 to {limit}")
    return steps
