import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_CLASS, SMALL_TEXT
from diffusers import EulerDiscreteScheduler
from model_folders import (
    BIN,
    CONFIG,
    INDEX,
    PIPELINE,
    SAFE,
    SCHEDULER,
    as_bin,
    change_config,
    change_weights,
    refused,
    write,
)
from safetensors.torch import load_file, save_file
from unets import unet2d, unet2d_condition

import edgediff
from edgediff import export_bundle, load_model
from edgediff.errors import EdgediffError, ModelError, UnsupportedError
from edgediff.models.graphs import graph_list
from edgediff.models.model_files import WEIGHTS
from edgediff.models.sampling import SCHEDULERS, scheduler_config

# The folder and its configuration


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", ModelError, str(tmp_path / "nowhere"), "no such directory", "grocery-32")


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, ModelError, f"{tmp_path} is empty", "expected config.json and weights")


def test_a_file_instead_of_a_directory(folder: Path) -> None:
    file = folder / SAFE
    refused(file, ModelError, f"{file} has the weights of a diffusers directory", f"name the directory: {file.parent}")


def test_no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    refused(folder, ModelError, f"{CONFIG} is missing", "saved by diffusers")


def test_config_without_weights(folder: Path) -> None:
    (folder / SAFE).unlink()
    refused(folder, ModelError, "config.json but no weights", f"expected {WEIGHTS}.safetensors")


def test_no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    model = load_model(folder)  # enough to be counted
    assert model.scheduler is None
    with pytest.raises(ModelError, match=r"has no scheduler/scheduler_config\.json; a wrong schedule would give noise"):
        export_bundle(model, folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("change", [{"_class_name": "UNet2DModel"}, {"_class_name": None}, {"beta_schedule": "x"}])
def test_a_scheduler_that_is_none(folder: Path, change: dict[str, Any]) -> None:
    data = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(data | change))
    refused(folder, ModelError, SCHEDULER)


@pytest.mark.parametrize("text", ["{", "", b"\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, PIPELINE])
def test_configuration_that_is_not_json(folder: Path, name: str, text: str | bytes) -> None:
    write(folder / name, text)
    refused(folder, ModelError, name, "cannot be read as JSON")


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, PIPELINE])
def test_configuration_that_is_no_object(folder: Path, name: str) -> None:
    write(folder / name, "[1, 2]")
    refused(folder, ModelError, name, "contains a list; expected an object of settings by name")


@pytest.mark.parametrize("name", ["UNet1DModel", None, ["UNet2DModel"]])
def test_another_class(folder: Path, name: object) -> None:
    change_config(folder, _class_name=name)
    refused(folder, UnsupportedError, f"of class {name!r}", "supported: UNet2DModel, UNet2DConditionModel")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"down_block_types": ["X", "Y"]}, "X does not exist"),
        ({"norm_num_groups": 5}, "divisible by num_groups (5)"),
        ({"norm_num_groups": 0}, "zero"),
        ({"layers_per_block": None}, "NoneType"),
        ({"in_channels": -1}, "negative dimension"),
    ],
)
def test_config_that_builds_no_unet(folder: Path, changes: dict[str, Any], word: str) -> None:
    change_config(folder, **changes)
    refused(folder, ModelError, f"{CONFIG} does not describe a UNet2DModel", word)


# The weights


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    data = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(data[:keep])
    refused(folder, ModelError, SAFE, "damaged or truncated")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"conv_in__weight": torch.zeros(8, 1, 3, 3)}, "size mismatch for conv_in.weight"),
        ({"conv_in__weight": None}, 'Missing key(s) in state_dict: "conv_in.weight"'),
        ({"decoder__weight": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "decoder.weight"'),
    ],
)
def test_weights_that_do_not_fit_the_config(folder: Path, changes: dict[str, torch.Tensor | None], word: str) -> None:
    change_weights(folder, **changes)
    refused(folder, ModelError, "do not fit its config.json", word)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    change_weights(folder, conv_in__bias=torch.tensor([value, *[0.0] * 7]))
    refused(folder, ModelError, "weights are not finite in conv_in.bias")


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


def assert_not_run(folder: Path, trace: Path, run: Callable[[], object]) -> None:
    message = refused(folder, ModelError, BIN, "was not opened", "expected safetensors")
    assert "weights_only" not in message, "torch's advice on how to run it all the same is not passed on"
    assert not trace.exists()
    run()
    assert trace.exists(), "the file is harmless: this test proves nothing"


@pytest.mark.parametrize("legacy_format", [False, True])
def test_a_bin_that_would_run_code_is_not_run(folder: Path, tmp_path: Path, legacy_format: bool) -> None:
    trace = tmp_path / "trace"
    file = as_bin(folder)
    torch.save({"weight": Malicious(trace)}, file, _use_new_zipfile_serialization=not legacy_format)
    assert_not_run(folder, trace, lambda: torch.load(file, weights_only=False))


def test_a_plain_pickle_that_would_run_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = pickle.dumps({"weight": Malicious(trace)}, protocol=2)
    as_bin(folder).write_bytes(data)
    assert_not_run(folder, trace, lambda: pickle.loads(data))


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"conv_in.bias": torch.zeros(8)}}, {1: torch.zeros(8)}])
def test_a_bin_of_something_else(folder: Path, content: object) -> None:
    torch.save(content, as_bin(folder))
    refused(folder, ModelError, BIN, "does not contain tensors by name")


@pytest.mark.parametrize("keep", [0, -100])
def test_a_truncated_bin(folder: Path, keep: int) -> None:
    file = as_bin(folder)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, ModelError, BIN, "damaged or truncated")


@pytest.mark.parametrize("name", ["part-2.safetensors", "../outside.safetensors", "/dev/zero", "..", "."])
def test_shards_that_are_missing_or_lie_elsewhere(folder: Path, name: str) -> None:
    (folder / SAFE).rename(folder / "outside.safetensors")
    write(folder / INDEX, json.dumps({"weight_map": {"conv_in.bias": name}}))
    refused(folder, ModelError, INDEX, f"names shards that are missing: {name}")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": ["a"]}])
def test_an_index_without_shards(folder: Path, index: object) -> None:
    (folder / SAFE).unlink()
    write(folder / INDEX, json.dumps(index))
    refused(folder, ModelError, INDEX, "names shards that are missing: none")


def test_weights_of_an_unknown_variant_are_named(folder: Path) -> None:
    (folder / SAFE).rename(folder / f"unet/{WEIGHTS}.non_ema.safetensors")
    refused(folder, ModelError, "no weights of a known name", f"{WEIGHTS}.non_ema.safetensors", "expected")


def test_a_git_lfs_pointer(folder: Path) -> None:
    write(folder / SAFE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(folder, ModelError, SAFE, "is a Git LFS pointer", "run `git lfs pull`")


def test_lora_layers_that_are_not_fused(folder: Path) -> None:
    state = load_file(folder / SAFE)
    save_file({k.replace(".to_q.", ".to_q.base_layer."): v for k, v in state.items()}, folder / SAFE)
    refused(folder, ModelError, "contain LoRA layers of PEFT; fuse them")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "unet."])
def test_names_with_a_prefix(folder: Path, prefix: str) -> None:
    save_file({prefix + key: tensor for key, tensor in load_file(folder / SAFE).items()}, folder / SAFE)
    refused(folder, ModelError, f"every name begins with {prefix!r}", "save the UNet inside of it")


# What is no UNet's folder


def test_a_pipeline_with_a_transformer(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")
    refused(folder, UnsupportedError, "a transformer instead of a UNet; supported: UNets")


def test_a_pipeline_without_a_unet(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    write(folder / PIPELINE, "{}")
    refused(folder, ModelError, "is a pipeline without a folder unet/; expected")


def test_a_repository_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    refused(tmp_path, ModelError, "a repository of the Hugging Face cache", "snapshots/COMMIT")


# UNets that diffusers builds and that cannot run


@pytest.mark.parametrize("size", [None, 0, [16, None], [16], [8, 16, 16], True, -8, 10**30, "16", {}])
def test_a_sample_size_that_is_none(folder: Path, size: object) -> None:
    change_config(folder, sample_size=size)
    refused(folder, ModelError, CONFIG, f"has sample_size {size!r}", "expected a size, or height and width")


@pytest.mark.parametrize(
    "overrides",
    [
        {"dual_cross_attention": True},
        {
            "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "attention_head_dim": 4,
            "cross_attention_norm": "layer_norm",
        },
    ],
)
def test_a_unet_that_cannot_run(tmp_path: Path, overrides: dict[str, Any]) -> None:
    unet2d_condition(**SMALL_TEXT | overrides).save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedError, "config.json describes a UNet that cannot run")


def test_a_learned_time_embedding(tmp_path: Path) -> None:
    unet2d(time_embedding_type="learned", num_train_timesteps=1000).save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedError, "time_embedding_type is 'learned'; supported: positional, fourier")


ODD = (None, True, 0, -1, 3, 10**9, 1.5, "x", [], [1], [8, 8], [None, None], {}, "MISSING")


@pytest.mark.filterwarnings("ignore")  # torch's, of layers without a width
@pytest.mark.parametrize("kind", ["class", pytest.param("text", marks=pytest.mark.long)])
@pytest.mark.parametrize("shift", [0, pytest.param(5, marks=pytest.mark.long)])
def test_any_setting_of_a_unet_may_be_wrong(kind: str, shift: int, tmp_path: Path) -> None:
    """Every key in turn: the model loads and is counted, or is refused in one line."""
    (unet2d(**SMALL_CLASS) if kind == "class" else unet2d_condition(**SMALL_TEXT)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    sound = json.loads(file.read_text())
    refusals = []
    for i, key in enumerate(sound):
        value = ODD[(i + shift) % len(ODD)]
        file.write_text(json.dumps({k: v for k, v in (sound | {key: value}).items() if v != "MISSING"}))
        try:
            model = load_model(tmp_path)
            graph_list(edgediff.split(model.unet), model)
        except EdgediffError as e:
            refusals.append(str(e))
    assert len(refusals) > 3
    assert "\n" not in "".join(refusals)


@pytest.mark.parametrize("key", ["layers_per_block", "num_class_embeds"])
def test_a_count_that_would_take_hours(folder: Path, key: str) -> None:
    change_config(folder, **{key: 10**9})
    refused(folder, ModelError, CONFIG, f"has {key} 1000000000; expected", "at most")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shift", [0, pytest.param(5, marks=pytest.mark.long)])
def test_any_setting_of_a_scheduler_may_be_wrong(folder: Path, shift: int) -> None:
    sound = EulerDiscreteScheduler().config | {"_class_name": "EulerDiscreteScheduler"}
    refusals = []
    for i, key in enumerate(sound):
        value = ODD[(i + shift) % len(ODD)]
        settings = {k: v for k, v in (sound | {key: value}).items() if v != "MISSING"}
        write(folder / SCHEDULER, json.dumps(settings))
        try:
            scheduler = load_model(folder).scheduler
            for name in SCHEDULERS:
                scheduler_config(scheduler, name)
        except EdgediffError as e:
            refusals.append(str(e))
    assert len(refusals) > 0
    assert "\n" not in "".join(refusals)
