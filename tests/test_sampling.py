"""From diffusers' scheduler settings to the runtime's: carried over, let pass, or refused by name."""

import re

import diffusers
import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from edgediff.errors import UnsupportedError
from edgediff.models.sampling import SCHEDULERS, diffusers_scheduler, scheduler_config
from edgediff_runtime.samplers import SAMPLERS
from edgediff_runtime.schedule_tables import alphas_cumprod

# diffusers' own: it hands torch tensors to numpy's array(copy=False).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("ddim", "thresholding", True),
        ("dpmpp_2m", "thresholding", True),
        ("dpmpp_2m", "solver_order", 3),
        ("dpmpp_2m", "solver_order", 1),
        ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++"),
        ("dpmpp_2m", "algorithm_type", "dpmsolver"),
        ("dpmpp_2m", "solver_type", "heun"),
        ("dpmpp_2m", "use_lu_lambdas", True),
        ("dpmpp_2m", "use_flow_sigmas", True),
        ("dpmpp_2m", "use_dynamic_shifting", True),
        ("dpmpp_2m", "prediction_type", "flow_prediction"),
        ("dpmpp_2m", "beta_schedule", "sigmoid"),
        ("dpmpp_2m_karras", "use_beta_sigmas", True),
        ("euler", "interpolation_type", "log_linear"),
        ("euler", "sigma_min", 0.1),
        ("euler", "sigma_max", 80.0),
        ("euler", "timestep_type", "continuous"),
        ("pndm", "skip_prk_steps", False),
        ("pndm", "prediction_type", "sample"),
        ("pndm", "rescale_betas_zero_snr", True),
        ("euler_ancestral", "prediction_type", "sample"),
        ("heun", "rescale_betas_zero_snr", True),
        ("heun", "beta_schedule", "exp"),
        ("lcm", "thresholding", True),
        ("lcm", "original_inference_steps", 0),
        ("tcd", "thresholding", True),
        ("dpmpp_2m_sde", "algorithm_type", "dpmsolver"),
        ("dpmpp_2m_sde", "algorithm_type", "sde-dpmsolver"),
        ("dpmpp_2m_sde", "solver_type", "heun"),
        ("unipc", "solver_order", 3),
        ("unipc", "solver_type", "bh1"),
        ("unipc", "predict_x0", False),
        ("unipc", "disable_corrector", [0]),
        ("unipc", "use_flow_sigmas", True),
        ("unipc", "sigma_max", 80.0),
        ("unipc", "shift_terminal", 0.1),
        *((name, "variance_type", kind) for name in SCHEDULERS for kind in ("learned", "learned_range")),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(name, setting, value):
    with pytest.raises(UnsupportedError, match=f"{setting} .*{re.escape(str(value))}.*expected") as raised:
        scheduler_config({setting: value}, name)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UnsupportedError, match="'ddpm': expected one of ddim, pndm, dpmpp_2m, dpmpp_2m_karras, "):
        scheduler_config({}, "ddpm")


def test_a_source_that_is_no_scheduler_is_refused():
    with pytest.raises(UnsupportedError, match="source of type int: expected a diffusers scheduler or its config"):
        scheduler_config(3, "ddim")


def test_a_setting_that_diffusers_adds_later_is_refused(monkeypatch):
    class Later:
        def __init__(self, use_new_sigmas=False):
            pass

    monkeypatch.setitem(SCHEDULERS, "ddim", Later)
    with pytest.raises(UnsupportedError, match="use_new_sigmas True: expected False"):
        scheduler_config({"use_new_sigmas": True}, "ddim")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_any_usual_source_is_read_as_diffusers_reads_it(kind, name):
    own = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    source = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **own)
    config = scheduler_config(source, name)
    expected = SCHEDULERS[name].from_config(source.config).config
    assert config == scheduler_config(source.config, name)
    read = SAMPLERS[config.name].settings.keys() & expected.keys() - {"lambda_min_clipped"}
    for field in {"beta_end", "prediction_type", *read} - {f"use_{config.spread}_sigmas"}:
        assert (getattr(config, field) or False) == expected[field]
    assert config.recipe_name == name


def test_settings_without_effect_are_let_pass():
    scheduler_config({"variance_type": "fixed_small", "skip_prk_steps": True}, "dpmpp_2m")
    scheduler_config({"variance_type": "fixed_large", "sample_max_value": 2.0}, "ddim")
    scheduler_config(UniPCMultistepScheduler(), "dpmpp_2m")


def test_karras_in_the_source_is_honoured():
    source = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    assert scheduler_config(source, "dpmpp_2m") == scheduler_config(source, "dpmpp_2m_karras")
    assert scheduler_config(source, "euler").use_karras_sigmas
    assert not scheduler_config(source, "ddim").use_karras_sigmas
    plain = DPMSolverMultistepScheduler()
    assert not scheduler_config(plain, "dpmpp_2m").use_karras_sigmas
    assert scheduler_config(plain, "dpmpp_2m_karras").use_karras_sigmas


@pytest.mark.parametrize("spread", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if "use_beta_sigmas" in kind.settings])
def test_layouts_in_the_source_are_honoured(name, spread):
    asked = scheduler_config({f"use_{spread}_sigmas": True}, name)
    assert asked == scheduler_config({}, f"{name}_{spread}")
    assert asked.spread == spread


def test_what_makes_a_sampler_of_its_class_is_given_to_the_class():
    assert diffusers_scheduler({}, "pndm").config.skip_prk_steps
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "deis"):
        made = diffusers_scheduler({"algorithm_type": algorithm}, "dpmpp_2m_sde_karras")
        assert made.config.algorithm_type == "sde-dpmsolver++"
    assert diffusers_scheduler(DPMSolverMultistepScheduler(), "unipc").config.solver_type == "bh2"
    with pytest.raises(UnsupportedError, match="pndm: scheduler skip_prk_steps False: expected True"):
        scheduler_config(PNDMScheduler(), "pndm")


def test_distilled_models_keep_their_sampler():
    for kind, name in ((LCMScheduler, "lcm"), (TCDScheduler, "tcd")):
        source = kind(original_inference_steps=40, timestep_spacing="trailing")
        assert scheduler_config(source, name).original_inference_steps == 40
        # An adapter turns any model of the usual process into such a one.
        assert scheduler_config(DDIMScheduler(), name).original_inference_steps == 50
    assert scheduler_config({}, "tcd").eta == 0.3
    with pytest.raises(UnsupportedError, match="LCMScheduler: tcd does not follow"):
        scheduler_config(LCMScheduler(), "tcd")


def test_infinite_lambda_is_null():
    assert scheduler_config(DPMSolverMultistepScheduler(), "dpmpp_2m").lambda_min_clipped is None
    assert scheduler_config({"lambda_min_clipped": -5.1}, "dpmpp_2m").lambda_min_clipped == -5.1


# The noise process is the model's


def _schedulers():
    logging.set_verbosity_error()
    kinds = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    return [kind for kind in kinds if isinstance(kind, type) and SchedulerMixin in kind.__mro__]


@pytest.mark.filterwarnings("ignore")  # diffusers' own, of classes that it is about to drop
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", _schedulers(), ids=lambda kind: kind.__name__)
def test_every_scheduler_of_diffusers_keeps_its_noise_process_or_is_refused(kind, name):
    try:
        source = kind()
    except (ImportError, TypeError, ValueError) as e:
        pytest.skip(f"diffusers builds none by default: {e}")
    try:
        config = scheduler_config(source, name)
    except UnsupportedError:
        return
    theirs = np.asarray(source.alphas_cumprod, dtype=np.float64)
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        diffusers.EDMDPMSolverMultistepScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.ScoreSdeVeScheduler(),
        diffusers.CogVideoXDDIMScheduler(),
        diffusers.LCMScheduler(),
    ],
    ids=lambda source: type(source).__name__,
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scheduler_of_another_noise_process_is_refused(source, as_mapping, name):
    if type(source).__name__ == SAMPLERS[name].diffusers_class:
        return
    if as_mapping:
        source = {**source.config, "_class_name": type(source).__name__}
    with pytest.raises(UnsupportedError, match=r"noise process|snr_shift_scale 3\.0"):
        scheduler_config(source, name)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        (EulerDiscreteScheduler, "timestep_type", "continuous"),
        (EulerDiscreteScheduler, "sigma_max", 700.0),
        (DPMSolverMultistepScheduler, "use_flow_sigmas", True),
        (None, "use_dynamic_shifting", True),
        (DDPMScheduler, "thresholding", True),
    ],
)
def test_a_setting_that_the_sampler_does_not_know_is_refused_too(kind, setting, value, name):
    source = kind(**{setting: value}) if kind else {setting: value}
    with pytest.raises(UnsupportedError, match=f"{setting} {value!r}.*expected"):
        scheduler_config(source, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_defaults_of_the_source_s_class_are_its_noise_process(name):
    config = scheduler_config(HeunDiscreteScheduler(), name)
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)
    bare = {"_class_name": "HeunDiscreteScheduler"}
    assert scheduler_config(bare, name).beta_end == 0.012
