"""From a diffusers scheduler to the runtime's: which settings travel, and which are refused by name.

Constraints that shaped this file:

- diffusers' ``from_config`` is the one authority on what a model's scheduler settings mean to another kind
  (it drops what was only a default and renames what is old), so settings are read from the object that it
  builds.
- A bundle that quietly samples otherwise than its source is worse than none: every setting of diffusers'
  class is either carried over, known to change nothing, or refused unless it stands at its default. A
  setting that a later diffusers adds falls into the last group by itself.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from edgediff.errors import UnsupportedError
from edgediff_runtime.errors import RequestError
from edgediff_runtime.schedulers import SchedulerConfig

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_karras": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}

PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Read only together with a setting that is itself refused.
_WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
}
# What the class takes besides its default to the same effect.
_AS_GOOD_AS_DEFAULT: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("deis",),
    "solver_type": ("logrho", "bh1", "bh2"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
_LEARNED_VARIANCE = ("learned", "learned_range")


def scheduler_config(source: Any, name: str) -> SchedulerConfig:
    """The runtime's settings for sampling as diffusers' class would, built from ``source``.

    Args:
        source: A diffusers scheduler of any kind, or its configuration as a mapping.
        name: One of ``SCHEDULERS``. A source that asks for Karras sigmas gets them under plain ``dpmpp_2m``
            and ``euler`` as well.

    Returns:
        The settings; ``dpmpp_2m_karras`` is ``dpmpp_2m`` with ``use_karras_sigmas``.

    Raises:
        UnsupportedError: If the name is unknown, or a setting is one that no runtime implements.

    >>> scheduler_config({"beta_schedule": "scaled_linear"}, "dpmpp_2m_karras").use_karras_sigmas
    True
    """
    return _read(diffusers_scheduler(source, name).config, name)


def diffusers_scheduler(source: Any, name: str) -> Any:
    """Build diffusers' own scheduler of that name, with the settings of ``source``.

    Args:
        source: A diffusers scheduler of any kind, or its configuration as a mapping.
        name: One of ``SCHEDULERS``.

    Returns:
        A new instance of ``SCHEDULERS[name]``, which the runtime's scheduler is held to.

    Raises:
        UnsupportedError: If the name is unknown, or a setting is one that no runtime implements.
    """
    if name not in SCHEDULERS:
        raise UnsupportedError(f"scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}")
    given = source if isinstance(source, Mapping) else getattr(source, "config", None)
    if not isinstance(given, Mapping):
        raise UnsupportedError(
            f"scheduler source of type {type(source).__name__}: expected a diffusers scheduler or its config"
        )
    settings = dict(given)
    only_defaults = set(settings.pop("_use_default_values", ()))
    settings = {key: value for key, value in settings.items() if key not in only_defaults}
    if name.endswith("_karras"):
        settings["use_karras_sigmas"] = True
    # Before diffusers sees them, whose own refusals do not always name the setting.
    _refuse_unimplemented(settings, name)
    _read(settings, name)
    try:
        return SCHEDULERS[name].from_config(settings)
    except (ValueError, TypeError, NotImplementedError) as e:
        raise UnsupportedError(f"scheduler {name}: diffusers refuses these settings: {e}") from e


def _read(settings: Mapping[str, Any], name: str) -> SchedulerConfig:
    # A built scheduler's config also keeps what its source said to other kinds.
    known = _parameters(name)
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
    # ddim and euler do not know the setting, but the UNet's output has twice the channels all the same.
    if settings.get("variance_type") in _LEARNED_VARIANCE:
        raise UnsupportedError(
            f"{name}: scheduler variance_type {settings['variance_type']!r}: expected a UNet that predicts no variance"
        )
    for key, supported in _parameters(name).items():
        if key not in settings or key in SchedulerConfig.__struct_fields__ or key in _WITHOUT_EFFECT:
            continue
        given = settings[key]
        # diffusers' flags may be null for false.
        at_default = given == supported or (given is None and supported is False)
        if not at_default and given not in _AS_GOOD_AS_DEFAULT.get(key, ()):
            raise UnsupportedError(f"{name}: scheduler {key} {given!r}: expected {supported!r}")


def _parameters(name: str) -> dict[str, Any]:
    """Each setting of diffusers' class, with its default."""
    parameters = inspect.signature(SCHEDULERS[name].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _plain(field: str, value: Any) -> Any:
    """A value of diffusers' configuration as the runtime's settings hold it."""
    if field == "lambda_min_clipped" and value == -math.inf:
        return None
    if field == "trained_betas" and value is not None:
        return tuple(float(beta) for beta in value)
    if field == "use_karras_sigmas":
        return bool(value)
    return value
