import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DDPM, LABELS, save_model
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from unets import CASES, unet2d, unet2d_condition

from edgediff import load_model
from edgediff.errors import EdgediffError, ModelError, UnsupportedError
from edgediff.models.conditioning import TensorSpec
from edgediff.models.load import WEIGHTS, random_weights

Prepare = Callable[[Path], None]
SAFE = f"unet/{WEIGHTS}.safetensors"
BIN = f"unet/{WEIGHTS}.bin"
INDEX = f"{SAFE}.index.json"
CONFIG = "unet/config.json"
CLASSES = "classes.json"
TEXT_ENCODER = "text_encoder/config.json"


@pytest.fixture
def folder(class_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(class_model, tmp_path / "model"))


def write(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / SAFE)
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    state = {key: tensor for key, tensor in (state | changed).items() if tensor is not None}
    save_file(state, folder / SAFE)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / SAFE), folder / BIN)
    (folder / SAFE).unlink()
    return folder / BIN


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def assert_ready(unet: torch.nn.Module) -> None:
    assert not unet.training
    assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in unet.parameters())


# What is read


@pytest.mark.parametrize("name", ["2d-class", "2d-fourier", "sd15-like", "sdxl-like", "unclip-like"])
@torch.no_grad()
def test_loading_equals_diffusers_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_model(case.build(), tmp_path)
    unet = load_model(tmp_path).unet
    theirs: Any = type(unet).from_pretrained(tmp_path / "unet")
    assert_ready(unet)
    assert dict(unet.config) | {"_name_or_path": None} == dict(theirs.config) | {"_name_or_path": None}
    assert same_weights(unet, theirs)
    sample, cond = torch.randn(2, unet.config.in_channels, 16, 16), case.cond(2)
    assert torch.equal(unet(sample, 371, **cond).sample, theirs(sample, 371, **cond).sample)


def test_a_whole_pipeline(folder: Path) -> None:
    model = load_model(str(folder))
    assert (model.name, model.path, model.scheduler) == ("model", folder, DDPM)
    assert isinstance(model.unet, UNet2DModel)
    assert model.sample_shape == (3, 16, 16)
    assert model.has_weights
    assert not model.is_built_in


def test_a_unet_alone_with_its_scheduler(folder: Path, class_model: Path) -> None:
    for file in (folder / "unet").iterdir():
        file.rename(folder / file.name)
    (folder / "unet").rmdir()
    whole, alone = load_model(class_model), load_model(folder)
    assert same_weights(alone.unet, whole.unet)
    assert alone.sha256 == whole.sha256


def test_a_height_and_a_width(folder: Path) -> None:
    change_config(folder, sample_size=[16, 24])
    assert load_model(folder).sample_shape == (3, 16, 24)


def test_fp16_variant(folder: Path) -> None:
    UNet2DModel.from_pretrained(folder / "unet").half().save_pretrained(folder / "unet", variant="fp16")
    (folder / SAFE).unlink()
    theirs = UNet2DModel.from_pretrained(folder / "unet", variant="fp16", torch_dtype=torch.float16).float()
    unet = load_model(folder).unet
    assert_ready(unet)
    assert same_weights(unet, theirs)


def test_full_precision_comes_before_fp16(folder: Path, class_model: Path) -> None:
    (folder / f"unet/{WEIGHTS}.fp16.safetensors").write_bytes(b"not looked at")
    (folder / BIN).write_bytes(b"not looked at")
    assert same_weights(load_model(folder).unet, load_model(class_model).unet)


def test_a_bin_of_tensors(folder: Path, class_model: Path) -> None:
    as_bin(folder)
    unet = load_model(folder).unet
    assert_ready(unet)
    assert same_weights(unet, load_model(class_model).unet)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards(folder: Path, class_model: Path, safe: bool, variant: str | None) -> None:
    unet = UNet2DModel.from_pretrained(folder / "unet")
    (folder / SAFE).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB", safe_serialization=safe, variant=variant)
    assert len(list((folder / "unet").glob("*-of-*"))) > 2
    assert same_weights(load_model(folder).unet, load_model(class_model).unet)


def test_attention_names_from_before_diffusers_0_12(folder: Path, class_model: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(folder / SAFE).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    assert sum(".proj_attn." in key for key in state) >= 4
    save_file(state, folder / SAFE)
    unet = load_model(folder).unet
    assert same_weights(unet, load_model(class_model).unet)
    assert same_weights(unet, UNet2DModel.from_pretrained(folder / "unet"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(folder: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in load_file(folder / SAFE).items()}
    save_file(state, folder / SAFE)
    unet = load_model(folder).unet
    assert_ready(unet)
    assert all(torch.equal(tensor, state[key].float()) for key, tensor in unet.state_dict().items())


def test_the_hash_covers_weights_configuration_and_scheduler(folder: Path) -> None:
    seen = {load_model(folder).sha256}
    change_weights(folder, conv_in__bias=torch.zeros(8))
    seen.add(load_model(folder).sha256)
    change_config(folder, norm_eps=1e-6)
    seen.add(load_model(folder).sha256)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(DDPM | {"clip_sample": False}))
    seen.add(load_model(folder).sha256)
    assert len(seen) == 4
    assert load_model(folder).sha256 in seen


# Built-in models and random weights


def test_the_built_in_model_with_weights() -> None:
    model = load_model("grocery-32")
    assert model.is_built_in
    assert_ready(model.unet)
    assert model.sample_shape == (3, 32, 32)
    assert (len(model.conditioning.labels), model.conditioning.null_label) == (35, 35)
    assert (model.space, model.card.license) == ("pixel", "apache-2.0")
    assert "Apache License" in str(model.card.license_text)


def test_the_built_in_geometry_without_weights() -> None:
    model = load_model("sd15")
    assert model.is_built_in
    assert not model.has_weights
    assert all(parameter.is_meta for parameter in model.unet.parameters())
    assert (model.sample_shape, model.space) == ((4, 64, 64), "latent")
    assert model.conditioning.tensors == {"encoder_hidden_states": TensorSpec((77, 768), torch.float32)}


def test_a_directory_comes_before_a_built_in_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("sd15")
    model = load_model("sd15")
    assert model.has_weights
    assert not model.is_built_in


def test_random_weights_belong_to_their_seed(class_model: Path) -> None:
    model = load_model(class_model)
    torch.manual_seed(5)
    one, same, other = (random_weights(model, seed) for seed in (0, 0, 1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "the caller's generator was moved"
    assert same_weights(one.unet, same.unet)
    assert not same_weights(one.unet, other.unet)
    assert_ready(one.unet)
    assert one.sha256 == same.sha256
    assert len({model.sha256, one.sha256, other.sha256}) == 3
    assert (one.conditioning, one.scheduler, one.sample_shape) == (
        model.conditioning,
        model.scheduler,
        model.sample_shape,
    )


# Conditioning, space and card


@pytest.mark.parametrize(
    ("classes", "labels", "null_label"),
    [
        (LABELS, tuple(LABELS), 4),
        ([*LABELS, "Pear"], (*LABELS, "Pear"), None),
        (None, ("0", "1", "2", "3", "4"), None),
    ],
)
def test_labels_and_the_null_label(
    folder: Path, classes: list[str] | None, labels: tuple[str, ...], null_label: int | None
) -> None:
    if classes is None:
        (folder / CLASSES).unlink()
    else:
        (folder / CLASSES).write_text(json.dumps(classes))
    found = load_model(folder).conditioning
    assert (found.kind, found.labels, found.null_label) == ("class", labels, null_label)
    assert found.tensors == {"class_labels": TensorSpec((), torch.int64)}


def test_neither_text_nor_classes(tmp_path: Path) -> None:
    found = load_model(save_model(unet2d(), tmp_path)).conditioning
    assert (found.kind, found.tensors, found.labels, found.null_label) == ("none", {}, (), None)


@pytest.mark.parametrize(("config", "tokens"), [({"max_position_embeddings": 7}, 7), ({}, 77), (None, 77)])
def test_text_tokens_from_the_encoder(tmp_path: Path, config: dict[str, int] | None, tokens: int) -> None:
    save_model(unet2d_condition(), tmp_path)
    if config is not None:
        write(tmp_path / TEXT_ENCODER, json.dumps(config))
    model = load_model(tmp_path)
    assert isinstance(model.unet, UNet2DConditionModel)
    assert model.conditioning.kind == "text"
    assert model.conditioning.tensors == {"encoder_hidden_states": TensorSpec((tokens, 12), torch.float32)}


@pytest.mark.parametrize(("projection", "pooled", "ids"), [(10, 10, 6), (14, 14, 5), (None, 10, 6)])
def test_pooled_text_from_the_second_encoder(tmp_path: Path, projection: int | None, pooled: int, ids: int) -> None:
    save_model(CASES["sdxl-like"].build(), tmp_path)
    if projection is not None:
        write(tmp_path / "text_encoder_2/config.json", json.dumps({"projection_dim": projection}))
    tensors = load_model(tmp_path).conditioning.tensors
    assert tensors["text_embeds"] == TensorSpec((pooled,), torch.float32)
    assert tensors["time_ids"] == TensorSpec((ids,), torch.float32)


def test_pooled_text_that_does_not_add_up(tmp_path: Path) -> None:
    save_model(CASES["sdxl-like"].build(), tmp_path)
    write(tmp_path / "text_encoder_2/config.json", json.dumps({"projection_dim": 11}))
    with pytest.raises(ModelError, match="width 11 and time ids of width 4 do not add up to the 34"):
        load_model(tmp_path)


def test_projected_text_keeps_the_encoders_width(tmp_path: Path) -> None:
    tensors = load_model(save_model(CASES["unclip-like"].build(), tmp_path)).conditioning.tensors
    assert tensors["encoder_hidden_states"] == TensorSpec((77, 6), torch.float32)


def test_text_and_classes_together(tmp_path: Path) -> None:
    found = load_model(save_model(CASES["text-and-class"].build(), tmp_path)).conditioning
    assert (found.kind, len(found.labels)) == ("text", 7)
    assert found.tensors.keys() == {"encoder_hidden_states", "class_labels"}


def test_classes_that_are_vectors_are_refused_without_text(tmp_path: Path) -> None:
    save_model(unet2d(class_embed_type="timestep"), tmp_path)
    with pytest.raises(UnsupportedError, match=r"class_embed_type 'timestep'\) without text; supported: class indices"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("channels", "pipeline", "space"),
    [
        (3, None, "pixel"),
        (1, None, "pixel"),
        (3, {"unet": ["diffusers", "UNet2DModel"]}, "pixel"),
        (3, {"vqvae": ["diffusers", "VQModel"]}, "latent"),
        (1, {"vae": ["diffusers", "AutoencoderKL"]}, "latent"),
        (4, None, "latent"),
    ],
)
def test_latent_and_pixel_space(tmp_path: Path, channels: int, pipeline: dict[str, Any] | None, space: str) -> None:
    save_model(unet2d(in_channels=channels, out_channels=channels), tmp_path)
    if pipeline is not None:
        write(tmp_path / "model_index.json", json.dumps(pipeline))
    assert load_model(tmp_path).space == space


@pytest.mark.parametrize(
    ("readme", "license_file", "name"),
    [
        ("---\nlicense: mit\n---\n# Card\n", None, "mit"),
        ('---\ntags: [art]\nlicense: "cc-by-4.0"\nlanguage: en\n---\n', None, "cc-by-4.0"),
        ("---\r\nlicense: openrail\r\n---\r\n", None, "openrail"),
        ("---\nlicense: mit\n---\n", "Apache License\n", "mit"),
        ("# no front matter\n", "   Apache License\n   Version 2.0\n", "Apache-2.0"),
        (None, "MIT License\n\nCopyright\n", "MIT"),
        (None, "CreativeML Open RAIL-M\n", "CreativeML-OpenRAIL-M"),
        (None, "All rights are somebody's.\n", "unknown"),
        (None, None, "unknown"),
        ("license: mit\n", None, "unknown"),
        ("---\nlicense: mit\n", None, "unknown"),
        ("---\nlicense_name: mine\n---\n", None, "unknown"),
        ("---\nlicense:\n- mit\n- gpl-3.0\n---\n", None, "unknown"),
        ("---\ntags: [art]\n---\n\nlicense: mit\n---\n", None, "unknown"),
    ],
)
def test_the_licence_of_the_card(folder: Path, readme: str | None, license_file: str | None, name: str) -> None:
    if readme is not None:
        write(folder / "README.md", readme)
    if license_file is not None:
        write(folder / "LICENSE", license_file)
    card = load_model(folder).card
    assert (card.license, card.license_text) == (name, license_file)
    assert card.text == ("" if readme is None else readme.replace("\r\n", "\n"))


# Refusals


def refused(folder: Path, kind: type[EdgediffError], *words: str) -> str:
    with pytest.raises(EdgediffError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", ModelError, str(tmp_path / "nowhere"), "no such directory", "grocery-32, sd15")


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, ModelError, f"{tmp_path} is empty", "expected config.json and weights")


def test_a_file_instead_of_a_directory(folder: Path) -> None:
    refused(folder / SAFE, ModelError, SAFE, "is a file", "expected a diffusers directory or one of: grocery-32, sd15")


def test_no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    refused(folder, ModelError, f"{CONFIG} is missing", "saved by diffusers")


def test_config_without_weights(folder: Path) -> None:
    (folder / SAFE).unlink()
    refused(folder, ModelError, "config.json but no weights", f"expected {WEIGHTS}.safetensors")


def test_no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    refused(folder, ModelError, f"{folder} has no scheduler/scheduler_config.json")


@pytest.mark.parametrize("text", ["{", "", b"\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", [CONFIG, "scheduler/scheduler_config.json", "model_index.json"])
def test_configuration_that_is_not_json(folder: Path, name: str, text: str | bytes) -> None:
    write(folder / name, text)
    refused(folder, ModelError, name, "cannot be read as JSON")


@pytest.mark.parametrize("name", [CONFIG, "scheduler/scheduler_config.json", "model_index.json"])
def test_configuration_that_is_no_object(folder: Path, name: str) -> None:
    write(folder / name, "[1, 2]")
    refused(folder, ModelError, name, "holds a list; expected an object")


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


@pytest.mark.parametrize("size", [None, "big", 0, [16, None]])
def test_no_sample_size(folder: Path, size: object) -> None:
    change_config(folder, sample_size=size)
    refused(folder, ModelError, f"{CONFIG} has sample_size {size!r}", "expected a size")


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


@pytest.mark.parametrize("legacy_format", [False, True])
def test_a_bin_that_would_run_code_is_not_run(folder: Path, tmp_path: Path, legacy_format: bool) -> None:
    trace = tmp_path / "trace"
    file = as_bin(folder)
    torch.save({"weight": Malicious(trace)}, file, _use_new_zipfile_serialization=not legacy_format)
    message = refused(folder, ModelError, BIN, "was not opened", "expected safetensors")
    assert "weights_only" not in message, "torch's advice on how to run it all the same is not passed on"
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the file is harmless: this test proves nothing"


def test_a_plain_pickle_that_would_run_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = pickle.dumps({"weight": Malicious(trace)}, protocol=2)
    as_bin(folder).write_bytes(data)
    refused(folder, ModelError, BIN, "was not opened")
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists(), "the pickle is harmless: this test proves nothing"


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"conv_in.bias": torch.zeros(8)}}, {1: torch.zeros(8)}])
def test_a_bin_of_something_else(folder: Path, content: object) -> None:
    torch.save(content, as_bin(folder))
    refused(folder, ModelError, BIN, "holds something else than tensors by name")


@pytest.mark.parametrize("keep", [0, -100])
def test_a_truncated_bin(folder: Path, keep: int) -> None:
    file = as_bin(folder)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, ModelError, BIN, "damaged or truncated")


@pytest.mark.parametrize("name", ["part-2.safetensors", "../outside.safetensors", "/dev/zero", "..", "."])
def test_shards_that_are_missing_or_lie_elsewhere(folder: Path, name: str) -> None:
    (folder / SAFE).rename(folder / "outside.safetensors")
    write(folder / INDEX, json.dumps({"weight_map": {"conv_in.bias": name}}))
    refused(folder, ModelError, INDEX, f"names shards that are not there: {name}")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": ["a"]}])
def test_an_index_without_shards(folder: Path, index: object) -> None:
    (folder / SAFE).unlink()
    write(folder / INDEX, json.dumps(index))
    refused(folder, ModelError, INDEX, "names shards that are not there: none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["cannot be read as JSON"]),
        (b"\xff", ["cannot be read as JSON"]),
        ('{"Apple": 0}', ["is not a list of names"]),
        ('["a", "b", "c", 4]', ["is not a list of names"]),
        ('["a", "b", "c", ""]', ["is not a list of names"]),
        ('["a", "b", "c"]', ["has 3 names", "embeds 5 classes", "expected 5 distinct names, or 4"]),
        ('["a", "b", "c", "d", "e", "f"]', ["has 6 names", "expected 5 distinct names, or 4"]),
        ('["a", "a", "b", "c"]', ["has 4 names", "5 distinct names"]),
    ],
)
def test_classes_that_are_wrong(folder: Path, text: str | bytes, words: list[str]) -> None:
    write(folder / CLASSES, text)
    refused(folder, ModelError, CLASSES, *words)


@pytest.mark.parametrize("tokens", [None, 0, -3, "7", 7.5, True])
def test_text_geometry_that_is_no_size(tmp_path: Path, tokens: object) -> None:
    save_model(unet2d_condition(), tmp_path)
    write(tmp_path / TEXT_ENCODER, json.dumps({"max_position_embeddings": tokens}))
    refused(tmp_path, ModelError, TEXT_ENCODER, f"max_position_embeddings is {tokens!r}", "a whole number above 0")
