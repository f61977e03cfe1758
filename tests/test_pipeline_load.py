import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, assert_error, unchanged
from loras import kohya_lora
from model_folders import PIPELINE, change_json, load_whole
from safetensors.torch import load_file, save_file
from single_files import vae_tensors
from tiny_pipelines import SAVE, save_tiny_vae, tokenizer, unet, vae
from unets import assert_same_unet

from edgediff import ExportConfig, export_bundle, load_model
from edgediff.errors import ConfigError, EdgediffError, ModelError, UnsupportedError
from edgediff.models.clip_tokenizer import load_tokenizer, write_tokenizer
from edgediff.models.components import pipeline_components
from edgediff.models.load import PIPELINES
from edgediff.models.model_files import WEIGHTS, read_json, read_state

COMPONENTS = ("text_encoder/model", "text_encoder_2/model", f"vae/{WEIGHTS}", f"unet/{WEIGHTS}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd1", "xl"):
        SAVE[kind](root / kind)
    return root


@pytest.fixture
def sd1(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "sd1", tmp_path / "sd1"))


@pytest.fixture
def xl(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "xl", tmp_path / "xl"))


def refused(kind: type[EdgediffError], words: str, source: Path, **options: Any) -> None:
    with pytest.raises(EdgediffError, match=words) as caught:
        load_whole(source, **options)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)


# Classes of pipelines


@pytest.mark.parametrize("name", PIPELINES)
def test_supported_classes(sd1: Path, name: str) -> None:
    change_json(sd1 / PIPELINE, _class_name=name)
    assert load_model(sd1).conditioning.kind == "text"


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "StableDiffusion3Pipeline", "KandinskyV22Pipeline", "IFPipeline", 7, ["LDMPipeline"]]
)
def test_other_classes_are_refused_by_name(sd1: Path, name: object) -> None:
    change_json(sd1 / PIPELINE, _class_name=name)
    if isinstance(name, str) and name.startswith("Flux"):
        (sd1 / "unet").rename(sd1 / "transformer")
    words = f"is a pipeline of class {json.dumps(name).replace(chr(34), chr(39))}; supported: StableDiffusionPipeline, "
    refused(UnsupportedError, words.replace("[", r"\[").replace("]", r"\]"), sd1)


@pytest.mark.parametrize("name", ["acme/tiny-diffusion", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_an_id_of_the_hub(name: str, tmp_path: Path, command: Command) -> None:
    words = f"if it is an id of the Hugging Face hub, download it first (huggingface-cli download {name} --local-dir"
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert words in str(caught.value)
    assert_error(command("export", name, "-o", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


# What no export makes anything of, on the command line: one line, and nothing is written


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _not_finite(file: Path) -> None:
    state = load_file(file)
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}, file)


BAD_PIPELINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "tokenizer is missing; expected a tokenizer beside"),
    "no text encoder": (lambda p: shutil.rmtree(p / "text_encoder"), "text_encoder is missing; copy the whole"),
    "no autoencoder": (lambda p: shutil.rmtree(p / "vae"), "vae is missing; copy the whole pipeline"),
    "another class": (
        lambda p: change_json(p / PIPELINE, _class_name="FluxPipeline"),
        "is a pipeline of class 'FluxPipeline'; supported: StableDiffusionPipeline, ",
    ),
    "truncated": (lambda p: _cut_short(p / "text_encoder/model.safetensors"), "is it damaged or truncated"),
    "not finite": (lambda p: _not_finite(p / f"vae/{WEIGHTS}.safetensors"), "vae: weights are not finite in "),
    "a scheduler that the model cannot use": (
        lambda p: change_json(p / "scheduler/scheduler_config.json", prediction_type="sample"),
        "PNDMScheduler cannot be followed (pndm: scheduler prediction_type 'sample': expected one of epsilon, ",
    ),
}


@pytest.mark.parametrize("name", BAD_PIPELINES)
def test_pipelines_that_cannot_be_exported(sd1: Path, place: Path, command: Command, name: str) -> None:
    change, words = BAD_PIPELINES[name]
    change(sd1)
    with unchanged(place):
        assert_error(command("export", sd1, "-o", place / "out"), words)


def test_a_lora_of_another_base(saved: Path, place: Path, command: Command) -> None:
    lora = kohya_lora(saved / "xl", place / "xl.safetensors")
    with unchanged(place):
        said = command("export", saved / "sd1", "-o", place / "out", "--lora", f"{lora}:0.5")
    assert_error(said, "xl.safetensors", "take one")


# Weights of the components


@pytest.mark.parametrize("stem", COMPONENTS)
def test_truncated_weights(xl: Path, stem: str) -> None:
    file = xl / f"{stem}.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(ModelError, f"{file} cannot be read as weights .*; is it damaged or truncated", xl)


@pytest.mark.parametrize("stem", COMPONENTS)
@pytest.mark.parametrize(
    ("value", "words"), [(float("inf"), "weights are not finite in"), (1j, "weights are complex numbers in")]
)
def test_values_that_are_no_weights(xl: Path, stem: str, value: complex, words: str) -> None:
    file = xl / f"{stem}.safetensors"
    state = load_file(file)
    name = next(iter(state))
    save_file(state | {name: torch.full(state[name].shape, value)}, file)
    refused(ModelError, f"{words} {name}", xl)


@pytest.mark.parametrize("stem", COMPONENTS)
def test_a_tensor_that_is_missing(xl: Path, stem: str) -> None:
    file = xl / f"{stem}.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith(".bias"))
    save_file({key: tensor for key, tensor in state.items() if key != name}, file)
    refused(ModelError, f"weights do not fit its config.*{name}", xl)


def test_a_tensor_of_another_shape(sd1: Path) -> None:
    file = sd1 / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"final_layer_norm.bias": torch.zeros(7)}, file)
    refused(ModelError, f"{sd1 / 'text_encoder'}: the weights do not fit.*mismatch for final_layer_norm.bias", sd1)


@pytest.mark.parametrize("stem", COMPONENTS)
def test_half_precision_weights_alone(xl: Path, saved: Path, stem: str) -> None:
    file = xl / f"{stem}.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, xl / f"{stem}.fp16.safetensors")
    file.unlink()
    assert load_whole(xl).sample_shape == load_model(saved / "xl").sample_shape


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("text_encoder", "text_encoder is missing; copy the whole pipeline"),
        ("text_encoder/model.safetensors", r"a config\.json but no weights; expected model\.safetensors"),
        ("text_encoder_2/config.json", r"expected .*text_encoder_2/config\.json with projection_dim"),
        ("text_encoder/config.json", r"text_encoder/config\.json is missing; expected a directory saved by diffusers"),
        ("tokenizer_2", "tokenizer_2 is missing; expected a tokenizer beside its text encoder"),
        ("tokenizer/tokenizer.json", r"holds no vocabulary; expected tokenizer\.json, or vocab\.json and merges"),
        ("vae", "vae is missing; copy the whole pipeline"),
        (f"vae/{WEIGHTS}.safetensors", r"a config\.json but no weights; expected diffusion_pytorch_model"),
    ],
)
def test_missing_parts(xl: Path, part: str, words: str) -> None:
    path = xl / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(ModelError, words, xl)


def test_weights_are_looked_for_before_anything_is_loaded(sd1: Path) -> None:
    (sd1 / "vae" / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        pipeline_components(load_model(sd1))


def test_a_built_in_geometry_has_no_components() -> None:
    assert pipeline_components(load_model("ldm-church")) == {}


# Another autoencoder


def other_vae(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(9)
    vae(**settings).save_pretrained(folder)
    return folder


def test_an_autoencoder_from_a_directory_or_a_pipeline(sd1: Path, tmp_path: Path) -> None:
    folder = other_vae(tmp_path / "whole" / "vae", scaling_factor=0.5)
    for named in (folder, folder.parent):
        found = pipeline_components(load_model(sd1, vae=named))["vae_decoder"]
        assert found.config["scaling_factor"] == 0.5
        want = load_file(folder / f"{WEIGHTS}.safetensors")
        state = found.load().state_dict()
        assert all(torch.equal(tensor, want[name.removeprefix("vae.")]) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_from_a_file(sd1: Path, tmp_path: Path, prefix: str) -> None:
    """By the original names it is of the pipeline's geometry; diffusers' own have a config.json beside them."""
    folder = other_vae(tmp_path / "vae")
    file = tmp_path / "other.safetensors"
    made = vae_tensors(read_json(folder / "config.json"), read_state(folder), prefix)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, file)
    want, plain = load_model(sd1, vae=folder), load_model(sd1)
    for named in (file, folder / f"{WEIGHTS}.safetensors"):
        model = load_model(sd1, vae=named)
        for name in ("vae_decoder", "vae_encoder"):
            mine = pipeline_components(model)[name]
            assert_same_unet(mine.load(), pipeline_components(want)[name].load())
            assert mine.sha256 != pipeline_components(plain)[name].sha256
        assert model.sha256 == plain.sha256


@pytest.mark.long
def test_a_tiny_autoencoder_in_a_bundle(sd1: Path, tmp_path: Path) -> None:
    save_tiny_vae(tmp_path / "tiny")
    model = load_model(sd1, vae=tmp_path / "tiny")
    config = ExportConfig(steps=1, clock=1, vae=str(tmp_path / "tiny"))
    done = export_bundle(model, tmp_path / "out", config)
    assert done.report is not None
    assert done.report.ok
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    want = {name: component.sha256 for name, component in pipeline_components(model).items()}
    assert (manifest["source"]["components"], manifest["source"]["vae"]) == (want, str(tmp_path / "tiny"))
    assert json.loads((tmp_path / "out" / "onnx" / PIPELINE).read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    with pytest.raises(ConfigError, match="was not loaded with; pass vae= to load_model"):
        export_bundle(load_model(sd1), tmp_path / "other", config)


@pytest.mark.long
def test_an_inpainting_pipeline_is_verified_from_the_prompt_to_the_picture(sd1: Path, tmp_path: Path) -> None:
    torch.manual_seed(10)
    unet(in_channels=9).save_pretrained(sd1 / "unet")
    change_json(sd1 / PIPELINE, _class_name="StableDiffusionInpaintPipeline")
    done = export_bundle(load_model(sd1), tmp_path / "out", ExportConfig(steps=1, clock=1))
    assert done.report is not None
    assert done.report.ok
    assert [row.status for row in done.report.rows if row.check == "picture"] == ["measured"]


def test_autoencoders_that_do_not_fit(sd1: Path, tmp_path: Path, class_model: Path) -> None:
    folder = other_vae(tmp_path / "wide", latent_channels=8)
    refused(ModelError, "wide has 8 latent channels, the UNet gives 4; take one that fits", sd1, vae=folder)
    refused(ConfigError, "no autoencoder at .*nowhere; name a directory", sd1, vae=tmp_path / "nowhere")
    refused(ConfigError, "would replace an autoencoder, and tiny-class has none", class_model, vae=folder)
    refused(ModelError, "is missing; expected a directory saved by diffusers", sd1, vae=tmp_path)
    change_json(folder / "config.json", _class_name="VQModel")
    refused(UnsupportedError, "'VQModel'; supported: AutoencoderKL, AutoencoderTiny", sd1, vae=folder)
    torch.save({}, tmp_path / "vae.pt")
    refused(ModelError, r"vae\.pt is a pickle, .*; convert it", sd1, vae=tmp_path / "vae.pt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora", "nowhere.safetensors"], "LoRA 'nowhere.safetensors': no such file; expected FILE or FILE:SCALE"),
        (["--vae", "nowhere"], "no autoencoder at nowhere; name a directory"),
        (["--prediction-type", "epsilon"], "is no single file; leave them out"),
        (["--prediction-type", "flow"], "'prediction_type'"),
    ],
)
def test_options_that_do_not_fit(sd1: Path, tmp_path: Path, command: Command, options: list[str], words: str) -> None:
    assert_error(command("export", sd1, "-o", tmp_path / "out", *options), words)
    assert not (tmp_path / "out").exists()


def test_a_ckpt_on_the_command_line(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, file)
    assert_error(command("export", file, "-o", tmp_path / "out"), "is a pickle", "--allow-pickle")
    assert_error(command("export", file, "-o", tmp_path / "out", "--allow-pickle"), "no checkpoint of a known kind")


# Tokenizers


def test_a_tokenizer_in_either_form_has_the_same_ids(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "one")
    write_tokenizer(tmp_path / "one", tmp_path / "both")
    names = {file.name for file in (tmp_path / "both").iterdir()}
    assert names == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    shutil.copytree(tmp_path / "both", tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").unlink()
    shutil.copytree(tmp_path / "both", tmp_path / "new")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink()
    write_tokenizer(tmp_path / "old", tmp_path / "again")
    text = ["a photo of a red apple", "Ünïcode, 日本 & <|endoftext|>!", ""]
    want = tokenizer()(text)["input_ids"]
    assert max(map(len, want)) > 20
    for name in ("one", "both", "old", "new", "again"):
        found = load_tokenizer(tmp_path / name)
        assert found(text)["input_ids"] == want, name
        assert (found.pad_token_id, found.model_max_length) == (tokenizer().pad_token_id, 77)
