"""The schedulers: held to recorded traces, to diffusers itself, and to what they refuse."""

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

from edgediff.models.sampling import SCHEDULERS, diffusers_scheduler, scheduler_config
from edgediff_runtime.errors import RequestError
from edgediff_runtime.noise import noise
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler

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
    assert scheduler.num_inference_steps == len(steps)
    assert scheduler.init_noise_sigma == pytest.approx(float(trace["init_noise_sigma"]), rel=TOLERANCE)
    state = None
    for i, step in enumerate(steps):
        within = TOLERANCE * np.abs(step["x_t"]).max()
        scaled = scheduler.scale_model_input(i, step["x_t"])
        np.testing.assert_allclose(scaled, step["scaled_input"], rtol=0, atol=within)
        x_prev, state = scheduler.step(i, step["x_t"], step["model_output"], state, step["noise"])
        assert x_prev.dtype == np.float32
        np.testing.assert_allclose(x_prev, step["x_prev"], rtol=0, atol=within, err_msg=f"step {i}")
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
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 1_000_000


def test_a_golden_trace_repeats_timesteps():
    timesteps = read_trace(FOLDER / "schedulers/dpmpp_2m_karras_repeats_20.json")["timesteps"]
    assert len(set(timesteps.tolist())) < len(timesteps)


# --- diffusers, live ---

LIVE = [
    Case({**base, "timestep_spacing": spacing, **prediction}, name, steps)
    for name in SCHEDULERS
    for base in (SD15, LDM)
    for spacing, prediction, steps in (
        ("leading", {}, 3),
        ("linspace", V, 10),
        ("trailing", SAMPLE, 15),
        ("trailing", {}, 4),
        ("leading", V, 25),
        ("linspace", {}, 50),
    )
] + [
    *(Case({**COSINE, **V, "timestep_spacing": "linspace"}, name, 8) for name in SCHEDULERS),
    *(Case({**ZERO_SNR, "timestep_spacing": "linspace"}, name, 5) for name in SCHEDULERS),
    *(Case(ZERO_SNR, name, 20) for name in SCHEDULERS),
    *(Case({**TRAINED, "clip_sample": False}, name, 9) for name in SCHEDULERS),
    *(Case({"num_train_timesteps": 50}, name, steps) for name in SCHEDULERS for steps in (1, 24)),
    *(Case({"set_alpha_to_one": flag, "clip_sample_range": 0.5}, "ddim", 6, 0.3) for flag in (True, False)),
    Case({"timestep_spacing": "trailing", "clip_sample": False}, "ddim", 6, 1.0),
    *(
        Case(
            {**SD15, "final_sigmas_type": final, "lower_order_final": low, "euler_at_final": euler},
            name,
            steps,
        )
        for name in ("dpmpp_2m", "dpmpp_2m_karras")
        for final in ("zero", "sigma_min")
        for low in (True, False)
        for euler in (True, False)
        for steps in (14, 15)
    ),
    *(
        Case({**COSINE, **V, "lambda_min_clipped": -5.1, "timestep_spacing": spacing}, "dpmpp_2m", 20)
        for spacing in ("linspace", "leading", "trailing")
    ),
    *(
        Case(
            {**SD15, "use_karras_sigmas": True, "timestep_spacing": spacing, "final_sigmas_type": final},
            "euler",
            9,
        )
        for spacing in ("linspace", "leading", "trailing")
        for final in ("zero", "sigma_min")
    ),
]


@pytest.mark.parametrize("case", LIVE, ids=lambda case: f"{case.name}-{case.steps}")
def test_each_step_is_diffusers(case):
    config = msgspec.structs.replace(scheduler_config(case.source, case.name), eta=case.eta)
    trace = make.trace(case, seed=5)
    # Outputs that do not follow x_t let diffusers' float32 coefficients drift: after 50 Karras steps it is
    # 2e-4 from a float64 trajectory, six times farther than this scheduler.
    trace["hold_trajectory"] &= case.steps <= 25
    hold(make_scheduler(config, case.steps), trace)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_a_whole_generation_is_diffusers(name, steps):
    """A smooth function of input and timestep stands in for the UNet: errors may grow along the way."""

    def model(x, t):
        return np.tanh(x + np.float32(t / 1000)) * np.float32(0.9)

    reference = diffusers_scheduler(SD15, name)
    reference.set_timesteps(steps)
    if name != "ddim":
        reference.set_begin_index(0)
    scheduler = make_scheduler(scheduler_config(SD15, name), steps)
    x = noise(9, (1, 3, 8, 8)) * np.float32(scheduler.init_noise_sigma)
    y, state, largest = torch.from_numpy(x), None, 0.0
    for i, t in enumerate(reference.timesteps):
        largest = max(largest, np.abs(x).max())
        out = torch.from_numpy(model(reference.scale_model_input(y, t).numpy(), float(t)))
        y = reference.step(out, t, y).prev_sample
        x, state = scheduler.step(i, x, model(scheduler.scale_model_input(i, x), float(scheduler.timesteps[i])), state)
    np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=TOLERANCE * largest)


def test_trailing_spacing_has_the_steps_asked_for_where_rounding_would_add_one():
    config = SchedulerConfig(name="ddim", timestep_spacing="trailing")
    for steps in (61, 103, 457):
        timesteps = make_scheduler(config, steps).timesteps
        assert len(timesteps) == steps
        assert timesteps.min() >= 0


# --- state and immutability ---


@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_generations_at_once_do_not_meet(name):
    scheduler = make_scheduler(scheduler_config(SD15, name), 6)
    latents = [noise(seed, (1, 2, 4, 4)) for seed in (0, 1)]

    def run(x):
        state = None
        for i in range(6):
            x, state = scheduler.step(i, x, x * np.float32(0.3), state)
            yield x

    alone = [list(run(x)) for x in latents]
    together = list(zip(run(latents[0]), run(latents[1]), strict=True))
    for i in (0, 1):
        for step in range(6):
            np.testing.assert_array_equal(together[step][i], alone[i][step])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction", [{}, V, SAMPLE])
def test_a_step_leaves_its_inputs_alone_and_keeps_none(name, prediction):
    scheduler = make_scheduler(scheduler_config({**SD15, **prediction}, name), 4)
    x_t, out = noise(0, (1, 2, 4, 4)), noise(1, (1, 2, 4, 4))
    before = x_t.copy(), out.copy()
    x_prev, state = scheduler.step(0, x_t, out)
    np.testing.assert_array_equal(x_t, before[0])
    np.testing.assert_array_equal(out, before[1])
    assert not any(np.shares_memory(x_prev, array) for array in (x_t, out))
    if state is not None:
        assert not any(np.shares_memory(state, array) for array in (x_t, out, x_prev))


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


def test_noise_is_wanted_only_by_ddim_with_eta():
    assert [make_scheduler(SchedulerConfig(name=n), 3).needs_noise for n in ("ddim", "dpmpp_2m", "euler")] == [
        False
    ] * 3
    scheduler = make_scheduler(SchedulerConfig(name="ddim", eta=0.5), 3)
    assert scheduler.needs_noise
    x = noise(0, (1, 2, 4, 4))
    with pytest.raises(RequestError, match="fresh noise, none"):
        scheduler.step(0, x, x)


def test_a_step_is_quick():
    scheduler = make_scheduler(SchedulerConfig(name="dpmpp_2m"), 8)
    x, out, state = (noise(i, (1, 3, 32, 32)) for i in range(3))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            scheduler.step(3, x, out, state)
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
        ("name", "heun"),
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
    ],
)
def test_a_bad_setting_is_refused_by_name(setting, value):
    with pytest.raises(RequestError, match=setting) as raised:
        SchedulerConfig(**{"name": "ddim", setting: value})
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_comes_back_from_json():
    config = scheduler_config({**COSINE, **TRAINED, "lambda_min_clipped": -5.1}, "dpmpp_2m_karras")
    assert msgspec.json.decode(msgspec.json.encode(config), type=SchedulerConfig) == config
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
    with pytest.raises(RequestError, match="step 1 expected the state of step 0"):
        make_scheduler(SchedulerConfig(name="dpmpp_2m"), 4).step(1, x, x)


@pytest.mark.parametrize("begin", [1, 3, 7])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler"])
def test_a_generation_that_begins_on_the_way_is_diffusers(name, begin):
    theirs = diffusers_scheduler(make.SD15, name)
    theirs.set_timesteps(8)
    if name != "ddim":
        theirs.set_begin_index(begin)
    ours = make_scheduler(scheduler_config(make.SD15, name), 8)
    x = y = noise(1, (1, 2, 4, 4))
    state = None
    for i in range(begin, 8):
        output = noise(2, x.shape, draw=i)
        x = theirs.step(torch.from_numpy(output), theirs.timesteps[i], torch.from_numpy(x)).prev_sample.numpy()
        y, state = ours.step(i, y, output, state, first=i == begin)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max()
