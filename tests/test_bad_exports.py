import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command, assert_error, unchanged
from model_folders import CLASSES, CONFIG, SAFE, SCHEDULER, change_config, change_json, change_weights

# The model.


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _scheduler(**values: Any) -> Callable[[Path], None]:
    return lambda m: change_json(m / SCHEDULER, **values)


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda m: change_config(m, **values)


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such directory, and no built-in name (choices: "),
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), "is empty; expected config.json"),
    "a file": (lambda m: (shutil.rmtree(m), m.touch()), "is a file of another kind; expected .safetensors"),
    "empty unet": (lambda m: (shutil.rmtree(m / "unet"), (m / "unet").mkdir()), "unet is empty"),
    "no weights": (lambda m: (m / SAFE).unlink(), "has a config.json but no weights"),
    "no config": (lambda m: (m / CONFIG).unlink(), "config.json is missing"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), f"no {SCHEDULER}"),
    "truncated weights": (lambda m: _cut_short(m / SAFE), "damaged or truncated"),
    "empty weights": (lambda m: (m / SAFE).write_bytes(b""), "damaged or truncated"),
    "weights of another model": (_config(out_channels=5), "do not fit"),
    "not JSON": (lambda m: (m / CONFIG).write_text("{"), "cannot be read as JSON"),
    "a list": (lambda m: (m / CONFIG).write_text("[1]"), "config.json"),
    "another class": (_config(_class_name="VQModel"), "supported: UNet2DModel"),
    "no size": (_config(sample_size=None), "sample_size"),
    "size 0": (_config(sample_size=0), "sample_size 0"),
    "size 17": (_config(sample_size=17), "17x17"),
    "no channels": (_config(block_out_channels=[]), "does not describe a UNet2DModel"),
    "no groups": (_config(norm_num_groups=0), "does not describe a UNet2DModel"),
    "unknown time": (_config(time_embedding_type="x"), "does not describe a UNet2DModel"),
    "negative channels": (_config(in_channels=-3), "does not describe"),
    "labels twice": (lambda m: (m / CLASSES).write_text('["a","a","b","c"]'), "expected 5 distinct names"),
    "labels of numbers": (lambda m: (m / CLASSES).write_text("[1,2,3,4]"), "is not a list of names"),
    "a scheduler of steps 0": (_scheduler(num_train_timesteps=0), "num_train_timesteps 0"),
    "a negative beta": (_scheduler(beta_start=-1.0), "beta_start -1.0"),
    "a beta that is no number": (_scheduler(beta_end=float("nan")), "beta_end nan"),
    "an unknown prediction": (_scheduler(prediction_type="flow"), "prediction_type 'flow'"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_cannot_be_exported(command: Command, folder: Path, place: Path, name: str) -> None:
    change, part = BAD_MODELS[name]
    change(folder)
    with unchanged(place):
        assert_error(command("export", folder, "-o", place / "out"), part)


def test_weights_that_are_not_finite(command: Command, folder: Path, place: Path) -> None:
    change_weights(folder, conv_in__bias=torch.tensor([float("inf"), *[0.0] * 7]))
    with unchanged(place):
        assert_error(command("export", folder, "-o", place / "out"), "weights are not finite in conv_in.bias")


# The recipe and the options.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("clok: 2", ("unknown key 'clok', did you mean 'clock'?",)),
        ("onnx: {opsett: 21}", ("unknown key 'onnx.opsett', did you mean 'onnx.opset'?",)),
        ("steps: many", ("'steps'", "expected `int | null`")),
        ("steps: 2.5", ("'steps'",)),
        ("steps: true", ("'steps'",)),
        ("steps: 0", ("'steps' is 0; expected 1 or more",)),
        ("cut: {level: 0}", ("'cut.level' is 0",)),
        ("cut: {level: -1}", ("'cut.level' is -1",)),
        ("cut: {level: 7}", ("cannot cut at level 7", "choices: 1")),
        ("cut: {point: middle}", ("before_upsample, after_upsample",)),
        ("cut: 1", ("'cut'",)),
        ("clock: 0", ("clock is 0",)),
        ("clock: [1, 0]", ("has 2 entries for 8 steps",)),
        ("clock: 0,1,1,1\nsteps: 4", ("begins with 0",)),
        ("guidance_scale: .nan", ("'guidance_scale' is nan",)),
        ("guidance_scale: .inf", ("'guidance_scale' is inf",)),
        ("guidance_scale: -2", ("'guidance_scale' is -2.0",)),
        ("verify: {graph_db: .nan}", ("'verify.graph_db' is nan",)),
        ("verify: {graph_db: 0}", ("'verify.graph_db' is 0",)),
        ("verify: {caching_db: -1}", ("'verify.caching_db' is -1",)),
        ("seed: -1", ("'seed' is -1",)),
        ("onnx: {opset: 99}", ("'onnx.opset' is 99; expected 18 to 23",)),
        ("targets: []", ("'targets' is empty",)),
        ("scheduler: lms", ("'scheduler'", "dpmpp_2m")),
        ("random_weights: 3", ("has weights of its own",)),
        ("conditioning: x.npz", ("conditioning x.npz cannot be read",)),
        ("- 1", ("expected a mapping of settings, got list",)),
        ("{", ("not YAML",)),
        ("a: !!python/object/apply:os.system [id]", ("not YAML",)),
    ],
)
def test_recipes_that_are_wrong(
    command: Command, class_model: Path, place: Path, text: str, parts: tuple[str, ...]
) -> None:
    (place / "recipe.yaml").write_text(text)
    with unchanged(place):
        assert_error(command("export", class_model, "-o", place / "out", "--config", place / "recipe.yaml"), *parts)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--level", "abc"], "valid integer"),
        (["--level", "0"], "'cut.level' is 0"),
        (["--level", "3"], "levels, choices: 1"),
        (["--point", "here"], "before_upsample, after_upsample"),
        (["--steps", "0"], "'steps' is 0"),
        (["--steps", "100000"], "10000 at most"),
        (["--clock", "0"], "clock is 0"),
        (["--clock", "1,0"], "2 entries for 8 steps"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--guidance-scale", "-1"], "guidance_scale"),
        (["--seed", "-1"], "'seed' is -1"),
        (["--seed", str(2**64)], "seed"),
        (["--dtype", "int4"], "dtype"),
        (["--layout", "heap"], "layout"),
        (["--adaptor", "nothing"], "identity"),
        (["--target", "exe"], "exe"),
        (["--scheduler", "lms"], "lms"),
        (["--verify", "no"], "verify.mode"),
        (["--random-weights", "1"], "has weights of its own"),
        (["--conditioning", "x.npz"], "conditioning x.npz cannot be read as .safetensors or .npz"),
        (["--config", "no-such-recipe"], "no recipe no-such-recipe"),
        (["--no-such-option"], "--no-such-option"),
        (["one", "more"], "unexpected extra argument"),
    ],
)
def test_export_options_that_are_wrong(
    command: Command, class_model: Path, place: Path, options: list[str], part: str
) -> None:
    with unchanged(place):
        assert_error(command("export", class_model, "-o", place / "out", *options), part)


def test_embeddings_for_a_model_that_takes_none(command: Command, class_model: Path, place: Path) -> None:
    np.savez(place / "x.npz", encoder_hidden_states=np.zeros((1, 7, 12)))
    said = command("export", class_model, "-o", place / "out", "--conditioning", place / "x.npz")
    assert_error(said, "x.npz was given, but the model is not conditioned on text")


def test_a_model_is_needed_and_a_geometry_needs_a_seed(command: Command, place: Path) -> None:
    with unchanged(place):
        assert_error(command("export", "-o", place / "out"), "no model: name a diffusers directory")
        assert_error(command("export", "sd15", "-o", place / "out"), "--random-weights SEED")
