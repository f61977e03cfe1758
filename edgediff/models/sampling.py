"""From a diffusers scheduler to the runtime's: what is carried over, and what is refused by name.

- diffusers' ``from_config`` decides what settings mean to another class (it drops the sampler's defaults and renames
  old settings), so settings are read from the object that it builds.
- The noise process belongs to the model: its settings are carried over even if they are the source class's defaults,
  which differ between classes. A class of another process is refused.
- Any other setting is carried over, has no effect, or is refused unless it is at its default; so is one that a later
  diffusers adds.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin

from edgediff.errors import UnsupportedError
from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.schedulers import SchedulerConfig

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_karras": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}

PREDICTIONS = ("epsilon", "v_prediction", "sample")

_PROCESS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
# How one sampler takes its steps: another does not read it.
_OF_ONE_SAMPLER = {
    "algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector", "eta",
    "euler_at_final", "final_sigmas_type", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "predict_x0", "predictor_order", "set_alpha_to_one", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "steps_offset", "tau_func", "timestep_spacing", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type",
}  # fmt: skip
# Read only together with a setting that is itself refused.
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
# Values with the same effect as the default.
_SAME_AS_DEFAULT: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("deis",),
    "solver_type": ("logrho", "bh1", "bh2"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_LEARNED_VARIANCE = ("learned", "learned_range")


def scheduler_config(source: Any, name: str) -> SchedulerConfig:
    """The runtime's settings for sampling as diffusers' class does that is built from ``source``.

    Args:
        source: A diffusers scheduler of any class, or its configuration as a mapping.
        name: One of ``SCHEDULERS``. A source with Karras sigmas keeps them under plain ``dpmpp_2m`` and ``euler`` too;
            ``dpmpp_2m_karras`` is ``dpmpp_2m`` with ``use_karras_sigmas``.

    Raises:
        UnsupportedError: The name is unknown, the source's noise process differs, or no runtime implements a setting.

    >>> scheduler_config({"beta_schedule": "scaled_linear"}, "dpmpp_2m_karras").use_karras_sigmas
    True
    """
    return _read(diffusers_scheduler(source, name).config, name)


def diffusers_scheduler(source: Any, name: str) -> Any:
    """The scheduler of that name, diffusers' own; arguments and errors as in `scheduler_config`."""
    if name not in SCHEDULERS:
        raise UnsupportedError(f"scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    given = source if isinstance(source, Mapping) else getattr(source, "config", None)
    if not isinstance(given, Mapping):
        raise UnsupportedError(
            f"scheduler source of type {type(source).__name__}: expected a diffusers scheduler or its config"
        )
    kind = type(source) if isinstance(source, SchedulerMixin) else scheduler_class(given)
    target = SCHEDULERS[name]
    if kind is not None and target.__name__ not in (kind.__name__, *kind._compatibles):
        raise UnsupportedError(
            f"scheduler {kind.__name__}: {name} does not follow its noise process; expected a model saved with a "
            "scheduler that diffusers lists as compatible (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC, ...)"
        )
    defaults = {*given.get("_use_default_values", ())} - {*_PROCESS}
    settings = {key: value for key, value in given.items() if key[:1] != "_" and key not in defaults}
    own = {} if kind is None else _parameters(kind)
    settings = {key: own[key] for key in _PROCESS if key in own} | settings
    if name.endswith("_karras"):
        settings["use_karras_sigmas"] = True
    # Before `from_config`, whose own errors do not always name the setting.
    _refuse_unimplemented(settings, name)
    read = settings if kind is None else {key: given.get(key, default) for key, default in own.items()}
    _refuse_foreign(read, name)
    _read(settings, name)
    try:
        return target.from_config(settings)
    except (ValueError, TypeError, NotImplementedError) as e:
        raise UnsupportedError(f"scheduler {name}: diffusers refuses these settings: {one_line(e)}") from e


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """The class that a scheduler's configuration names; None where it is not a scheduler of diffusers."""
    found: Any = getattr(diffusers, str(config.get("_class_name")), None)
    return found if SchedulerMixin in getattr(found, "__mro__", ()) else None


def _read(settings: Mapping[str, Any], name: str) -> SchedulerConfig:
    # A built scheduler's config also contains its source's settings for other classes.
    known = _parameters(SCHEDULERS[name])
    fields: dict[str, Any] = {
        field: _plain(field, settings[field])
        for field in SchedulerConfig.__struct_fields__
        if field in settings and field in known
    }
    kind: Any = name.removesuffix("_karras")
    try:
        return SchedulerConfig(name=kind, **fields)
    except RequestError as e:
        raise UnsupportedError(f"{name}: {e}") from e


def _refuse_unimplemented(settings: Mapping[str, Any], name: str) -> None:
    """Refuses settings of the target's class that the runtime does not implement."""
    # ddim and euler do not read the setting, but the UNet's output has twice the channels.
    if settings.get("variance_type") in _LEARNED_VARIANCE:
        raise UnsupportedError(
            f"{name}: scheduler variance_type {settings['variance_type']!r}: expected a UNet that predicts no variance"
        )
    for key, supported in _parameters(SCHEDULERS[name]).items():
        if key not in settings or key in SchedulerConfig.__struct_fields__ or key in _WITHOUT_EFFECT:
            continue
        given = settings[key]
        # diffusers' flags may be null for false.
        at_default = given == supported or (given is None and supported is False)
        if not at_default and given not in _SAME_AS_DEFAULT.get(key, ()):
            raise UnsupportedError(f"{name}: scheduler {key} {given!r}: expected {supported!r}")


def _refuse_foreign(settings: Mapping[str, Any], name: str) -> None:
    """Refuses settings that the source's class reads and the target's does not, unless off or of one sampler."""
    neutral = {key: value for kind in SCHEDULERS.values() for key, value in _parameters(kind).items()}
    for key, given in settings.items():
        known = key in _parameters(SCHEDULERS[name]) or key in _OF_ONE_SAMPLER or key in _WITHOUT_EFFECT
        if not known and given is not None and given is not False and given != neutral.get(key):
            raise UnsupportedError(
                f"{name}: scheduler {key} {given!r}: {name} does not read it; expected {neutral.get(key)!r}"
            )


def _parameters(kind: Any) -> dict[str, Any]:
    """The settings of a scheduler's class with their defaults."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _plain(field: str, value: Any) -> Any:
    """A value of diffusers' configuration in the form of the runtime's."""
    if field == "lambda_min_clipped" and value == -math.inf:
        return None
    if field == "trained_betas" and value is not None:
        return tuple(float(beta) for beta in value)
    if field == "use_karras_sigmas":
        return bool(value)
    return value
