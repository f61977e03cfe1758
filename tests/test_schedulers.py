"""The schedulers: checked against recorded traces and diffusers itself, and what they refuse."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edgediff.models.sampling import diffusers_scheduler, scheduler_config
from edgediff_runtime.errors import RequestError
from edgediff_runtime.noise import noise
from edgediff_runtime.samplers import SAMPLERS
from edgediff_runtime.schedule_tables import beta_quantiles
from edgediff_runtime.schedulers import SCHEDULER_NAMES, SchedulerConfig, make_scheduler, sampler_of, steps_of

# diffusers' own: it hands torch tensors to numpy's array(copy=False).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FOLDER = Path(__file__).parents[1] / "runtime/golden"
BY_EXPORT = ("bundle", "manifests/class", "manifests/text", "manifests/pipeline")
GOLDEN = sorted((FOLDER / "schedulers").glob("*.json"))
TOLERANCE = 1e-5


def _load_make():
    spec = importlib.util.spec_from_file_location("golden_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_make"] = module
    spec.loader.exec_module(module)
    return module


make = _load_make()
Case, SD15, COSINE, V, SAMPLE, ZERO_SNR = (
    make.Case,
    make.SD15,
    make.COSINE,
    make.V,
    make.SAMPLE,
    make.ZERO_SNR,
)
LDM = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
READS_ZERO_SNR = [name for name, sampler in SAMPLERS.items() if "rescale_betas_zero_snr" in sampler.settings]
TRAINED = {"trained_betas": np.linspace(1e-4, 0.03, 100).tolist(), "num_train_timesteps": 100}


def read_trace(path):
    """A golden file with its arrays as numpy's."""
    trace = json.loads(path.read_text())
    for step in trace["steps"]:
        for key, values in step.items():
            step[key] = None if values is None else np.array(values, np.float32).reshape(trace["shape"])
    trace["timesteps"] = np.array(trace["timesteps"], np.float32)
    return trace


def hold(scheduler, trace):
    """Assert that a scheduler takes every step of a trace, alone and, where it says so, in a row."""
    steps = trace["steps"]
    np.testing.assert_allclose(scheduler.timesteps, trace["timesteps"], rtol=0, atol=1e-3)
    assert len(scheduler.timesteps) == len(steps)
    assert scheduler.init_noise_sigma == pytest.approx(float(trace["init_noise_sigma"]), rel=TOLERANCE)
    state = None
    for i, step in enumerate(steps):
        within = TOLERANCE * np.abs(step["x_t"]).max()
        scaled = scheduler.scale_model_input(i, step["x_t"])
        np.testing.assert_allclose(scaled, step["scaled_input"], rtol=0, atol=within)
        x_prev, state = scheduler.step(i, step["x_t"], step["model_output"], state, step["noise"])
        assert x_prev.dtype == np.float32
        np.testing.assert_allclose(x_prev, step["x_prev"], rtol=0, atol=within, err_msg=f"step {i}")
    x_0, under = noise(11, trace["shape"]), noise(12, trace["shape"])
    for i, (signal, level) in enumerate(np.reshape(np.array(trace["levels"], np.float32), (-1, 2))):
        within = TOLERANCE * max(1, level) * np.abs(under).max()
        np.testing.assert_allclose(
            scheduler.add_noise(i, x_0, under), signal * x_0 + level * under, rtol=0, atol=within
        )
    assert np.size(trace["levels"]) == 2 * len(steps)
    np.testing.assert_array_equal(scheduler.add_noise(len(steps), x_0, under), x_0)
    if trace["hold_trajectory"]:
        x, state = steps[0]["x_t"], None
        for i, step in enumerate(steps):
            x, state = scheduler.step(i, x, step["model_output"], state, step["noise"])
        within = TOLERANCE * max(np.abs(step["x_t"]).max() for step in steps)
        np.testing.assert_allclose(x, steps[-1]["x_prev"], rtol=0, atol=within)


# --- the golden files ---


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_trace(path):
    trace = read_trace(path)
    config = msgspec.convert(trace["config"], SchedulerConfig)
    hold(make_scheduler(config, trace["num_inference_steps"]), trace)


def test_the_comparison_itself_fails_on_a_wrong_schedule():
    trace = read_trace(FOLDER / "schedulers/dpmpp_2m_sd15_8.json")
    config = msgspec.convert(trace["config"], SchedulerConfig)
    nearly = msgspec.structs.replace(config, beta_end=config.beta_end * 1.001)
    with pytest.raises(AssertionError):
        hold(make_scheduler(nearly, 8), trace)


def test_the_golden_files_are_what_make_would_write(tmp_path):
    make.write(tmp_path)
    fresh = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    # What an exporter makes depends on its version; tests/test_golden.py runs it.
    exported = [*FOLDER.glob("bundle/**/*.json"), *(FOLDER / f"{name}.json" for name in BY_EXPORT)]
    assert fresh == sorted(path.relative_to(FOLDER) for path in {*FOLDER.rglob("*.json")} - {*exported})
    for path in fresh:
        assert_close(json.loads((tmp_path / path).read_text()), json.loads((FOLDER / path).read_text()), path)


def assert_close(given, expected, where, size=1.0):
    if isinstance(expected, dict):
        assert given.keys() == expected.keys(), where
        # A step's result is a difference of numbers as large as its x_t, which processors round in their own ways; the
        # next step begins with it, and models look at what they are given.
        own = np.abs(expected.get("x_t", 0.0)).max()
        sizes = {"steps": max([size, *(np.abs(step.get("x_t", 0.0)).max() for step in expected.get("steps", []))])}
        sizes |= {"x_t": size, "scaled_input": size, "x_prev": size, "model_output": max(1.0, own)}
        for key in expected.keys() - {"diffusers"}:
            assert_close(given[key], expected[key], f"{where}: {key}", sizes.get(key, 1.0))
    elif isinstance(expected, list) and expected and isinstance(expected[0], float):
        within = TOLERANCE * max(size, np.abs(expected).max())
        np.testing.assert_allclose(given, expected, rtol=0, atol=within, err_msg=str(where))
    elif isinstance(expected, list):
        assert len(given) == len(expected), where
        for i, (one, other) in enumerate(zip(given, expected, strict=True)):
            assert_close(one, other, f"{where}[{i}]", size)
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, rel=TOLERANCE), where
    else:
        assert given == expected, where


def test_the_golden_folder_is_small():
    """What runtimes read: without what writes it."""
    files = (path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".py")
    assert sum(path.stat().st_size for path in files) < 1_200_000


def test_a_golden_trace_repeats_timesteps():
    timesteps = read_trace(FOLDER / "schedulers/dpmpp_2m_karras_repeats_20.json")["timesteps"]
    assert len(set(timesteps.tolist())) < len(timesteps)


# --- diffusers, live ---


def _spaced(name, base, spacing, prediction, steps):
    """A case; a prediction that the sampler does not take is its first one instead."""
    known = prediction.get("prediction_type", "epsilon") in sampler_of(name).predictions
    return Case({**base, "timestep_spacing": spacing, **(prediction if known else {})}, name, steps)


LIVE = [
    _spaced(name, base, spacing, prediction, steps)
    for name in SCHEDULER_NAMES
    for base in (SD15, LDM)
    for spacing, prediction, steps in (
        ("leading", {}, 3),
        ("linspace", V, 10),
        ("trailing", SAMPLE, 15),
        ("trailing", {}, 4),
        ("leading", V, 25),
        ("linspace", {}, 50),
    )
    if base is SD15 or name in ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler", "pndm", "unipc")
    # Beta's levels crowd at both ends, where diffusers' float32 is off by 1.5e-5 (unipc, 50 steps, against float64).
    if not name.endswith("_beta") or 4 <= steps <= 25
] + [
    # From cosine's last timestep heun and pndm take differences of numbers a thousand times larger than x_t.
    *(
        Case({**COSINE, **V, "timestep_spacing": "leading" if name in ("heun", "pndm") else "linspace"}, name, 8)
        for name in SAMPLERS
    ),
    *(Case({**ZERO_SNR, "timestep_spacing": "linspace"}, name, 5) for name in READS_ZERO_SNR),
    *(Case(ZERO_SNR, name, 20) for name in READS_ZERO_SNR),
    *(Case({**TRAINED, "clip_sample": False}, name, 9) for name in SAMPLERS),
    *(Case({"num_train_timesteps": 50}, name, steps) for name in SAMPLERS for steps in (1, 24)),
    *(Case({"set_alpha_to_one": flag, "clip_sample_range": 0.5}, "ddim", 6, 0.3) for flag in (True, False)),
    Case({"timestep_spacing": "trailing", "clip_sample": False}, "ddim", 6, 1.0),
    *(
        Case(
            {**SD15, "final_sigmas_type": final, "lower_order_final": low, "euler_at_final": euler},
            name,
            steps,
        )
        for name in ("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_karras")
        for final in ("zero", "sigma_min")
        for low in (True, False)
        for euler in (True, False)
        for steps in (14, 15)
    ),
    *(
        Case({**SD15, "final_sigmas_type": "sigma_min", "lower_order_final": low}, name, 6)
        for name in ("unipc", "unipc_karras")
        for low in (True, False)
    ),
    *(
        Case({**COSINE, **V, "lambda_min_clipped": -5.1, "timestep_spacing": spacing}, name, 20)
        for name in ("dpmpp_2m", "dpmpp_2m_sde")
        for spacing in ("linspace", "leading", "trailing")
    ),
    *(
        Case(
            {**SD15, f"use_{spread}_sigmas": True, "timestep_spacing": spacing, "final_sigmas_type": final},
            "euler",
            9,
        )
        for spread in ("karras", "exponential", "beta")
        for spacing in ("linspace", "leading", "trailing")
        for final in ("zero", "sigma_min")
    ),
    *(Case({**SD15, **V}, "tcd", 4, eta) for eta in (0.0, 0.5, 1.0)),
    Case({"set_alpha_to_one": True, "skip_prk_steps": True}, "pndm", 7),
    *(Case({**SD15, **prediction, "clip_sample": True}, "heun", 6) for prediction in ({}, V, SAMPLE)),
    *(Case({**SD15, "timestep_scaling": 2.0, "original_inference_steps": n}, "lcm", 4) for n in (4, 33)),
]


@pytest.mark.parametrize("case", LIVE, ids=lambda case: f"{case.name}-{case.steps}")
def test_each_step_is_diffusers(case):
    trace = make.trace(case, seed=5)
    # Outputs that do not follow x_t let diffusers' float32 coefficients drift: after 50 Karras steps it is
    # 2e-4 from a float64 trajectory, six times farther than this scheduler.
    trace["hold_trajectory"] &= case.steps <= 25
    hold(make_scheduler(case.config(), case.steps), trace)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_a_whole_generation_is_diffusers(name, steps):
    """A smooth function of input and timestep stands in for the UNet: errors may grow along the way."""

    def model(x, t):
        return np.tanh(x + np.float32(t / 1000)) * np.float32(0.9)

    reference = diffusers_scheduler(SD15, name)
    reference.set_timesteps(steps)
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(0)
    config = scheduler_config(SD15, name)
    scheduler = make_scheduler(config, steps)
    x = noise(9, (1, 3, 8, 8)) * np.float32(scheduler.init_noise_sigma)
    y, state, largest = torch.from_numpy(x), None, 0.0
    for i, t in enumerate(reference.timesteps):
        largest = max(largest, np.abs(x).max())
        fresh = noise(9, x.shape, draw=i + 1) if scheduler.needs_noise else None
        out = model(reference.scale_model_input(y, t).numpy(), float(t))
        y = torch.from_numpy(make.diffusers_step(reference, t, out, y.numpy(), config, fresh))
        out = model(scheduler.scale_model_input(i, x), float(scheduler.timesteps[i]))
        x, state = scheduler.step(i, x, out, state, fresh)
    np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=TOLERANCE * largest)


def test_trailing_spacing_has_the_steps_asked_for_where_rounding_would_add_one():
    config = SchedulerConfig(name="ddim", timestep_spacing="trailing")
    for steps in (61, 103, 457):
        timesteps = make_scheduler(config, steps).timesteps
        assert len(timesteps) == steps
        assert timesteps.min() >= 0


# --- state and immutability ---


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_generations_at_once_do_not_meet(name):
    scheduler = make_scheduler(scheduler_config(SD15, name), 6)
    latents = [noise(seed, (1, 2, 4, 4)) for seed in (0, 1)]

    def run(x):
        state, fresh = None, x
        for i in range(len(scheduler.timesteps)):
            x, state = scheduler.step(i, x, x * np.float32(0.3), state, fresh)
            yield x

    alone = [list(run(x)) for x in latents]
    together = list(zip(run(latents[0]), run(latents[1]), strict=True))
    for i in (0, 1):
        for step in range(len(scheduler.timesteps)):
            np.testing.assert_array_equal(together[step][i], alone[i][step])


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(name, prediction) for name, sampler in SAMPLERS.items() for prediction in sampler.predictions],
)
@pytest.mark.parametrize("start", [0, 1])
def test_a_step_leaves_its_inputs_alone_and_keeps_none(name, prediction, start):
    scheduler = make_scheduler(scheduler_config({**SD15, "prediction_type": prediction}, name), 4)
    state = None
    for i in range(start, len(scheduler.timesteps)):
        given = [noise(0, (1, 2, 4, 4), draw=i), noise(1, (1, 2, 4, 4), draw=i), noise(2, (1, 2, 4, 4), draw=i)]
        given += [] if state is None else state
        before = [array.copy() for array in given]
        x_prev, state = scheduler.step(i, given[0], given[1], state, given[2], i == start)
        for array, kept in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, kept)
        assert not any(np.shares_memory(x_prev, array) for array in given)
        assert not any(np.shares_memory(kept, array) for kept in state for array in (*given[:3], x_prev))


def test_a_scheduler_cannot_be_changed():
    scheduler = make_scheduler(SchedulerConfig(name="euler"), 3)
    with pytest.raises(AttributeError):
        scheduler.init_noise_sigma = 2.0
    with pytest.raises(ValueError, match="read-only"):
        scheduler.timesteps[0] = 1


def test_no_scaling_means_no_copy():
    x_t = noise(0, (1, 2, 4, 4))
    for name in ("ddim", "dpmpp_2m"):
        assert make_scheduler(SchedulerConfig(name=name), 3).scale_model_input(0, x_t) is x_t


@pytest.mark.parametrize(
    ("config", "needs_noise"),
    [
        *(({"name": name}, name in ("dpmpp_2m_sde", "euler_ancestral", "lcm", "tcd")) for name in SAMPLERS),
        ({"name": "ddim", "eta": 0.5}, True),
        ({"name": "tcd", "eta": 0.0}, False),
    ],
)
def test_noise_is_wanted_by_stochastic_samplers(config, needs_noise):
    config = SchedulerConfig(**config)
    scheduler = make_scheduler(config, 3)
    assert scheduler.needs_noise == config.draws_noise == needs_noise
    x = noise(0, (1, 2, 4, 4))
    if needs_noise:
        with pytest.raises(RequestError, match=f"fresh noise, none: {config.name} draws it"):
            scheduler.step(0, x, x)
        with pytest.raises(RequestError, match=r"fresh noise, shape \[4\]"):
            scheduler.step(0, x, x, noise=noise(0, (4,)))


def test_a_step_is_quick():
    scheduler = make_scheduler(SchedulerConfig(name="dpmpp_2m"), 8)
    x, out, state = (noise(i, (1, 3, 32, 32)) for i in range(3))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            scheduler.step(3, x, out, (state,))
        best = min(best, (time.perf_counter() - start) / 50)
    # About 10 microseconds; the margin is for a loaded machine.
    assert best < 100e-6


# --- what a request may not ask ---


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None, "8"])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(RequestError, match=r"num_inference_steps .*expected an integer from 1 to 1000"):
        make_scheduler(SchedulerConfig(name="ddim"), steps)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        # An alpha of 0 divides; two equal noise levels leave a step of no length to extrapolate over.
        ({"name": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 4),
        ({"name": "dpmpp_2m"}, 1000),
        ({"name": "dpmpp_2m", "timestep_spacing": "leading"}, 1000),
        ({"name": "lcm", "rescale_betas_zero_snr": True}, 4),
        # Order 2 into sigma 0.
        ({"name": "unipc", "lower_order_final": False}, 4),
    ],
)
def test_a_schedule_that_would_divide_by_zero_is_refused(config, steps):
    with pytest.raises(RequestError, match="would divide by zero"):
        make_scheduler(SchedulerConfig(**config), steps)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_an_offset_beyond_the_training_schedule_is_refused(name):
    with pytest.raises(RequestError, match="steps_offset 1 start at timestep 1000"):
        make_scheduler(SchedulerConfig(name=name, timestep_spacing="leading", steps_offset=1), 1000)


def test_lambda_clipped_above_the_schedule_is_refused():
    with pytest.raises(RequestError, match=r"lambda_min_clipped 99\.0"):
        make_scheduler(SchedulerConfig(name="dpmpp_2m", lambda_min_clipped=99.0), 4)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", "ddpm"),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "even"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", True),
        ("num_train_timesteps", 1000.0),
        ("steps_offset", -1),
        ("beta_start", 0.0),
        ("beta_start", math.nan),
        ("beta_end", 1.0),
        ("beta_end", math.inf),
        ("beta_end", "0.02"),
        ("trained_betas", (0.1, 0.2)),
        ("trained_betas", (0.0,) * 1000),
        ("clip_sample", 1),
        ("clip_sample_range", 0.0),
        ("clip_sample_range", -math.inf),
        ("eta", -0.1),
        ("eta", 1.5),
        ("eta", math.nan),
        ("final_sigmas_type", "one"),
        ("lambda_min_clipped", -math.inf),
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", 1),
        ("original_inference_steps", 50),
        ("timestep_scaling", 10.0),
    ],
)
def test_a_bad_setting_is_refused_by_name(setting, value):
    with pytest.raises(RequestError, match=setting) as raised:
        SchedulerConfig(**{"name": "ddim", setting: value})
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_config_comes_back_from_json(name):
    config = scheduler_config({**COSINE, **TRAINED, "lambda_min_clipped": -5.1}, name)
    assert msgspec.json.decode(msgspec.json.encode(config), type=SchedulerConfig) == config
    assert config.recipe_name == name
    assert sampler_of(name).name == config.name


def test_a_bad_config_in_json_is_refused():
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"name": "ddim", "thresholding": true}', type=SchedulerConfig)
    with pytest.raises(msgspec.ValidationError, match="eta 2"):
        msgspec.json.decode(b'{"name": "ddim", "eta": 2.0}', type=SchedulerConfig)


@pytest.mark.parametrize("i", [-1, 4])
def test_a_step_out_of_range_is_refused(i):
    x = noise(0, (1, 2, 4, 4))
    with pytest.raises(RequestError, match=f"step {i}: expected 0 to 3"):
        make_scheduler(SchedulerConfig(name="euler"), 4).step(i, x, x)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(RequestError, match=r"shape \[1, 4, 4, 4\]: expected the latent's, \[1, 2, 4, 4\]"):
        make_scheduler(SchedulerConfig(name="ddim"), 4).step(0, noise(0, (1, 2, 4, 4)), noise(0, (1, 4, 4, 4)))


def test_a_missing_state_is_refused():
    x = noise(0, (1, 2, 4, 4))
    for name in SAMPLERS:
        with pytest.raises(RequestError, match="none: step 1 expected the state of step 0"):
            make_scheduler(SchedulerConfig(name=name), 4).step(1, x, x, noise=x)
    with pytest.raises(RequestError, match=r"of shapes \[\[4\]\]: step 1"):
        make_scheduler(SchedulerConfig(name="dpmpp_2m"), 4).step(1, x, x, (noise(0, (4,)),))


@pytest.mark.parametrize("begin", [2, 4, 6])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_a_generation_that_begins_on_the_way_is_diffusers(name, begin):
    config = scheduler_config(make.SD15, name)
    theirs = diffusers_scheduler(make.SD15, name)
    theirs.set_timesteps(8)
    if name != "ddim":
        theirs.set_begin_index(begin)
    ours = make_scheduler(config, 8)
    x = y = noise(1, (1, 2, 4, 4))
    state = None
    for i in range(begin, len(ours.timesteps)):
        output = noise(2, x.shape, draw=i)
        fresh = noise(3, x.shape, draw=i)
        if name.startswith("euler") or name == "heun":
            theirs.scale_model_input(torch.from_numpy(x), theirs.timesteps[i])
        within = 1e-5 * max(np.abs(x).max(), 1)
        x = make.diffusers_step(theirs, theirs.timesteps[i], output, x, config, fresh)
        y, state = ours.step(i, y, output, state, fresh, first=i == begin)
        assert np.abs(x - y).max() <= within


@pytest.mark.parametrize("begin", [1, 2, 5, 8])
def test_pndm_begins_anywhere_with_first_order(begin):
    """diffusers' is a level off when it begins on the way."""
    scheduler = make_scheduler(scheduler_config(make.PNDM, "pndm"), 8)
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    x, state, kept = noise(1, (1, 2, 4, 4)), None, []
    for i in range(begin, 9):
        output = noise(2, x.shape, draw=i)
        y, state = scheduler.step(i, x, output, state, first=i == begin)
        kept = [output, *kept][:4]
        now = int(scheduler.timesteps[i])
        a, b = table[now], table[max(now - 125, 0)]
        eps = sum(w * e for w, e in zip(weights[len(kept) - 1], kept, strict=True))
        moved = np.sqrt(b / a) * x - (b - a) * eps / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
        # The second call alone has nothing to correct.
        np.testing.assert_allclose(y, x if i == 1 else moved, rtol=0, atol=TOLERANCE * np.abs(x).max())
        x = y


def test_heun_begins_with_a_correction_that_changes_nothing():
    scheduler = make_scheduler(SchedulerConfig(name="heun"), 4)
    x, out = noise(0, (1, 2, 4, 4)), noise(1, (1, 2, 4, 4))
    y, state = scheduler.step(3, x, out, first=True)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(scheduler.step(4, y, out, state)[0], scheduler.step(4, x, out, first=True)[0])


# --- what a table says of all samplers ---


def test_quantiles_of_beta_are_scipy_s():
    # scipy.stats.beta.ppf(share, 0.6, 0.6) of scipy 1.17.1.
    known = {
        0.0: 0.0,
        1e-6: 1.8558824624053043e-10,
        0.1: 0.03958440558878085,
        0.25: 0.17568037865269498,
        0.5: 0.5,
        1.0: 1.0,
    }
    shares = np.array(list(known))
    np.testing.assert_allclose(beta_quantiles(shares), list(known.values()), rtol=1e-10, atol=0)
    np.testing.assert_allclose(beta_quantiles(1 - shares), 1 - beta_quantiles(shares), rtol=0, atol=1e-12)
    scipy_stats = pytest.importorskip("scipy.stats")
    shares = np.linspace(0, 1, 1000)
    np.testing.assert_allclose(beta_quantiles(shares), scipy_stats.beta.ppf(shares, 0.6, 0.6), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "calls"), [("heun", [1, 3, 5, 15]), ("pndm", [1, 3, 4, 9]), ("ddim", [1, 2, 3, 8])])
def test_calls_of_the_unet_are_the_scheduler_s_timesteps(name, calls):
    for steps, expected in zip((1, 2, 3, 8), calls, strict=True):
        assert len(make_scheduler(SchedulerConfig(name=name), steps).timesteps) == expected
        assert SAMPLERS[name].calls(steps) == expected
        assert steps_of(name, expected) == steps
    if name != "ddim":
        with pytest.raises(RequestError, match=f"2 model calls: {name} calls the model twice"):
            steps_of(name, 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reads_or_refuses_every_setting(name):
    odd = {
        "timestep_spacing": "trailing", "steps_offset": 1, "rescale_betas_zero_snr": True, "clip_sample": False,
        "clip_sample_range": 2.0, "set_alpha_to_one": False, "eta": 0.5, "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True,
        "lambda_min_clipped": -5.1, "use_exponential_sigmas": True, "use_beta_sigmas": True,
        "original_inference_steps": 40, "timestep_scaling": 9.0,
    }  # fmt: skip
    process = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
    assert odd.keys() == {*SchedulerConfig.__struct_fields__} - process - {"name"}
    for setting, value in odd.items():
        if setting in SAMPLERS[name].settings:
            assert getattr(SchedulerConfig(name=name, **{setting: value}), setting) == value
        else:
            with pytest.raises(RequestError, match=f"{setting} .*: {name} does not read it; expected"):
                SchedulerConfig(name=name, **{setting: value})
    for prediction in ("epsilon", "v_prediction", "sample"):
        if prediction in SAMPLERS[name].predictions:
            SchedulerConfig(name=name, prediction_type=prediction)
        else:
            with pytest.raises(RequestError, match=f"prediction_type '{prediction}': expected one of epsilon, v_pred"):
                SchedulerConfig(name=name, prediction_type=prediction)


def test_two_layouts_of_noise_levels_are_refused():
    with pytest.raises(RequestError, match="use_karras_sigmas and use_beta_sigmas are both True: expected one"):
        SchedulerConfig(name="euler", use_karras_sigmas=True, use_beta_sigmas=True)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
@pytest.mark.parametrize(("steps", "original"), [(51, 50), (4, 3), (4, 1001)])
def test_more_steps_than_the_model_was_distilled_on_are_refused(name, steps, original):
    with pytest.raises(RequestError, match=f"{steps} steps of {name} with original_inference_steps {original}"):
        make_scheduler(SchedulerConfig(name=name, original_inference_steps=original), steps)


def test_settings_written_before_there_were_others_are_written_as_they_were():
    for path in GOLDEN:
        given = json.loads(path.read_text())["config"]
        config = msgspec.convert(given, SchedulerConfig)
        assert json.dumps(msgspec.to_builtins(config)) == json.dumps(given)
