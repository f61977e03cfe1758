"""From diffusers' scheduler settings to the runtime's: carried over, let pass, or refused by name."""

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from edgediff.errors import UnsupportedError
from edgediff.models.sampling import SCHEDULERS, scheduler_config


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
        ("dpmpp_2m", "use_exponential_sigmas", True),
        ("dpmpp_2m", "use_beta_sigmas", True),
        ("dpmpp_2m", "use_lu_lambdas", True),
        ("dpmpp_2m", "use_flow_sigmas", True),
        ("dpmpp_2m", "use_dynamic_shifting", True),
        ("dpmpp_2m", "prediction_type", "flow_prediction"),
        ("dpmpp_2m", "beta_schedule", "sigmoid"),
        ("dpmpp_2m_karras", "use_beta_sigmas", True),
        ("euler", "interpolation_type", "log_linear"),
        ("euler", "use_exponential_sigmas", True),
        ("euler", "use_beta_sigmas", True),
        ("euler", "sigma_min", 0.1),
        ("euler", "sigma_max", 80.0),
        ("euler", "timestep_type", "continuous"),
        *((name, "variance_type", kind) for name in SCHEDULERS for kind in ("learned", "learned_range")),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(name, setting, value):
    with pytest.raises(UnsupportedError, match=f"{setting} .*{value}.*expected") as raised:
        scheduler_config({setting: value}, name)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UnsupportedError, match="'ddpm': expected one of ddim, dpmpp_2m, dpmpp_2m_karras, euler"):
        scheduler_config({}, "ddpm")


def test_a_source_that_is_no_scheduler_is_refused():
    with pytest.raises(UnsupportedError, match="of type int"):
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
    source = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config = scheduler_config(source, name)
    expected = SCHEDULERS[name].from_config(source.config).config
    assert config == scheduler_config(source.config, name)
    for field in ("timestep_spacing", "beta_end", "steps_offset", "prediction_type"):
        assert getattr(config, field) == expected[field]
    assert config.use_karras_sigmas == name.endswith("_karras")


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


def test_infinite_lambda_is_null():
    assert scheduler_config(DPMSolverMultistepScheduler(), "dpmpp_2m").lambda_min_clipped is None
    assert scheduler_config({"lambda_min_clipped": -5.1}, "dpmpp_2m").lambda_min_clipped == -5.1
