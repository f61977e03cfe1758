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
from diffusers import SchedulerMixin

from edgediff.errors import UnsupportedError
from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.samplers import SAMPLERS
from edgediff_runtime.schedulers import SCHEDULER_NAMES, SPREADS, SchedulerConfig, sampler_of

# The class in diffusers that each name stands for.
SCHEDULERS: dict[str, Any] = {name: getattr(diffusers, sampler_of(name).diffusers_class) for name in SCHEDULER_NAMES}
# What models are trained with: it names a noise process, not how few steps are taken. This sampler stands for it.
TRAINED_WITH, USUAL = "DDPMScheduler", "dpmpp_2m"
PREDICTIONS = ("epsilon", "v_prediction", "sample")

_PROCESS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
# How one sampler takes its steps: another does not read it.
_OF_ONE_SAMPLER = {
    *(key for sampler in SAMPLERS.values() for key in (*sampler.settings, *sampler.diffusers_settings)),
    "corrector_order", "disable_corrector", "interpolation_type", "predict_x0", "predictor_order", "solver_order",
    "solver_p", "tau_func", "use_lu_lambdas", "variance_type",
} - {*_PROCESS}  # fmt: skip
# Read only together with a setting that is itself refused.
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
# Read by samplers of other names only, whose step draws noise.
_FIXED_VARIANCE = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
_LEARNED_VARIANCE = ("learned", "learned_range")


def scheduler_config(source: Any, name: str) -> SchedulerConfig:
    """The runtime's settings for sampling as diffusers' class does that is built from ``source``.

    Args:
        source: A diffusers scheduler of any kind, or its configuration as a mapping.
        name: One of ``SCHEDULERS``. A source that asks for Karras sigmas gets them under plain ``dpmpp_2m``
            as well; ``dpmpp_2m_karras`` is ``dpmpp_2m`` with ``use_karras_sigmas``, and so for other samplers and
            layouts of noise levels.

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
    if kind is not None and not _follows(target, kind):
        raise UnsupportedError(
            f"scheduler {kind.__name__}: {name} does not follow its noise process; expected a model saved with a "
            "scheduler that diffusers lists as compatible (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC, ...)"
        )
    defaults = {*given.get("_use_default_values", ())} - {*_PROCESS}
    settings = {key: value for key, value in given.items() if key[:1] != "_" and key not in defaults}
    own = {} if kind is None else _parameters(kind)
    settings = {key: own[key] for key in _PROCESS if key in own} | settings
    sampler = sampler_of(name)
    if name != sampler.name:
        settings[SPREADS[name.rpartition("_")[2]]] = True
    read = settings if kind is None else {key: given.get(key, default) for key, default in own.items()}
    # Before `from_config`, whose own errors do not always name the setting.
    for key, values in sampler.diffusers_settings.items():
        if read.get(key, values[0]) not in values:
            raise UnsupportedError(f"{name}: scheduler {key} {read[key]!r}: expected {values[0]!r}")
        settings[key] = values[0]
    _refuse_unimplemented(settings, name)
    _refuse_foreign(read, name)
    _read(settings, name)
    if not target._compatibles:  # it would log the others as ignored
        settings = {key: value for key, value in settings.items() if key in _parameters(target)}
    try:
        return target.from_config(settings)
    except (ValueError, TypeError, NotImplementedError) as e:
        raise UnsupportedError(f"scheduler {name}: diffusers refuses these settings: {one_line(e)}") from e


def own_sampler(source: SchedulerMixin) -> str:
    """The name of the sampler that a model was saved with; dpmpp_2m for a model saved with ``DDPMScheduler``.

    Raises:
        UnsupportedError: No sampler here is that one, or it has a setting that is not implemented.
    """
    kind, why = type(source).__name__, ""
    if kind == TRAINED_WITH:
        return USUAL
    for name, sampler in SAMPLERS.items():
        if sampler.diffusers_class == kind:
            try:
                scheduler_config(source, name)
                return name
            except UnsupportedError as e:
                why = why or f" ({e})"
    raise UnsupportedError(
        f"the model's own scheduler {kind} cannot be followed{why}; name another one: {', '.join(SAMPLERS)}"
    )


def is_for_few_steps(source: SchedulerMixin) -> bool:
    """Whether a scheduler is that of a model distilled to a few steps.

    Those are LCM's and TCD's, and Euler's with trailing timesteps and no other setting that asks for them
    (SDXL-Turbo, SD-Turbo): such a model is sampled without guidance.
    """
    kind, config = type(source).__name__, source.config
    if kind in ("LCMScheduler", "TCDScheduler"):
        return True
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    is_euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    return is_euler and trailing and config.get("prediction_type") == "epsilon"


def _follows(target: Any, kind: Any) -> bool:
    """Whether one class follows the noise process of another's settings."""
    # The classes of distilled models list no others; what they are distilled from is what DDIM follows.
    distilled = not target._compatibles and SCHEDULERS["ddim"].__name__ in kind._compatibles
    return distilled or target.__name__ in (kind.__name__, *kind._compatibles)


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """The class that a scheduler's configuration names; None where it is not a scheduler of diffusers."""
    found: Any = getattr(diffusers, str(config.get("_class_name")), None)
    return found if SchedulerMixin in getattr(found, "__mro__", ()) else None


def _read(settings: Mapping[str, Any], name: str) -> SchedulerConfig:
    # A built scheduler's config also contains its source's settings for other classes.
    sampler, known = sampler_of(name), _parameters(SCHEDULERS[name])
    fields: dict[str, Any] = {
        field: _plain(field, settings[field])
        for field in (*_PROCESS, *sampler.settings)
        if field in settings and field in known
    }
    try:
        return SchedulerConfig(name=sampler.name, **fields)
    except RequestError as e:
        raise UnsupportedError(f"{name}: {e}") from e


def _refuse_unimplemented(settings: Mapping[str, Any], name: str) -> None:
    """Refuses settings of the target's class that the runtime does not implement."""
    # ddim and euler do not read the setting, but the UNet's output has twice the channels.
    if settings.get("variance_type") in _LEARNED_VARIANCE:
        raise UnsupportedError(
            f"{name}: scheduler variance_type {settings['variance_type']!r}: expected a UNet that predicts no variance"
        )
    sampler = sampler_of(name)
    carried = {*_PROCESS, *sampler.settings, *sampler.diffusers_settings}
    for key, supported in _parameters(SCHEDULERS[name]).items():
        if key not in settings or key in carried or key in _WITHOUT_EFFECT or key in sampler.diffusers_ignores:
            continue
        given = settings[key]
        # diffusers' flags may be null for false.
        at_default = given == supported or (given is None and supported is False)
        if not at_default and (key != "variance_type" or given not in _FIXED_VARIANCE):
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
    if field in SPREADS.values():
        return bool(value)
    return value
