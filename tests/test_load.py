import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DDPM, LABELS, save_model
from diffusers import UNet2DModel
from model_folders import BIN, PIPELINE, SAFE, SCHEDULER, as_bin, change_config, change_json, change_weights, write
from safetensors.torch import load_file, save_file
from unets import CASES, unet2d

from edgediff import Cut, load_model, split
from edgediff.cli.demo import PROMPTS
from edgediff.models.classifier import built_in_classifier, load_classifier
from edgediff.models.components import pipeline_components
from edgediff.models.conditioning import TensorSpec
from edgediff.models.load import random_weights
from edgediff.models.macs import tally
from edgediff.models.model_files import WEIGHTS
from edgediff.models.spectral import SpectralUNet2DConditionModel, SpectralUNet2DModel


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def assert_ready(unet: torch.nn.Module) -> None:
    assert not unet.training
    assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in unet.parameters())


def assert_reads(folder: Path, want: torch.nn.Module) -> None:
    unet = load_model(folder).unet
    assert_ready(unet)
    assert same_weights(unet, want)


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
    assert (model.name, model.path) == ("model", folder)
    assert DDPM.items() <= {**model.scheduler.config, "_class_name": type(model.scheduler).__name__}.items()
    assert model.labels == tuple(LABELS)
    assert isinstance(model.unet, UNet2DModel)
    assert model.sample_shape == (3, 16, 16)
    assert model.has_weights
    assert not model.is_built_in


def test_a_unet_s_folder_within_a_pipeline_s(folder: Path) -> None:
    whole, inside = load_model(folder), load_model(folder / "unet")
    assert inside.sha256 == whole.sha256
    assert (inside.name, inside.labels) == (whole.name, whole.labels)
    assert inside.scheduler.config == whole.scheduler.config


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


def test_full_precision_comes_before_fp16(folder: Path, class_model: Path) -> None:
    (folder / f"unet/{WEIGHTS}.fp16.safetensors").write_bytes(b"not looked at")
    (folder / BIN).write_bytes(b"not looked at")
    assert_reads(folder, load_model(class_model).unet)


def test_a_bin_of_tensors(folder: Path, class_model: Path) -> None:
    as_bin(folder)
    assert_reads(folder, load_model(class_model).unet)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards(folder: Path, class_model: Path, safe: bool, variant: str | None) -> None:
    unet = UNet2DModel.from_pretrained(folder / "unet")
    (folder / SAFE).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB", safe_serialization=safe, variant=variant)
    assert len(list((folder / "unet").glob("*-of-*"))) > 2
    assert_reads(folder, load_model(class_model).unet)


def test_attention_names_from_before_diffusers_0_12(folder: Path, class_model: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(folder / SAFE).items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    assert sum(".proj_attn." in key for key in state) >= 4
    save_file(state, folder / SAFE)
    assert_reads(folder, load_model(class_model).unet)
    assert_reads(folder, UNet2DModel.from_pretrained(folder / "unet"))


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
    change_json(folder / SCHEDULER, clip_sample=False)
    seen.add(load_model(folder).sha256)
    assert len(seen) == 4
    assert load_model(folder).sha256 in seen


@pytest.mark.parametrize(
    ("channels", "pipeline", "space"),
    [
        ((3, 3), None, "pixel"),
        ((1, 1), None, "pixel"),
        ((3, 3), {"unet": ["diffusers", "UNet2DModel"]}, "pixel"),
        ((3, 3), {"vae": [None, None]}, "pixel"),
        ((6, 3), {}, "pixel"),
        ((3, 3), {"vqvae": ["diffusers", "VQModel"]}, "latent"),
        ((1, 1), {"vae": ["diffusers", "AutoencoderKL"]}, "latent"),
        ((4, 4), None, "latent"),
        ((7, 4), {}, "latent"),
    ],
)
def test_latent_and_pixel_space(
    tmp_path: Path, channels: tuple[int, int], pipeline: dict[str, Any] | None, space: str
) -> None:
    """By the pipeline's decoder, and by the channels of the output."""
    save_model(unet2d(in_channels=channels[0], out_channels=channels[1]), tmp_path)
    if pipeline is not None:
        write(tmp_path / PIPELINE, json.dumps(pipeline))
    assert load_model(tmp_path).space == space


# Built-in models and random weights


def test_the_built_in_model_with_weights() -> None:
    model = load_model("grocery-32")
    assert model.is_built_in
    assert_ready(model.unet)
    assert model.sample_shape == (3, 32, 32)
    assert (len(model.conditioning.labels), model.conditioning.null_label) == (35, 35)
    assert (model.space, model.card.license) == ("pixel", "apache-2.0")
    assert "Apache License" in str(model.card.license_text)


def test_the_built_in_pipeline() -> None:
    """A whole Stable Diffusion, with what it is sampled with in its card, and a classifier of what it was taught."""
    model = load_model("drawings-64")
    assert_ready(model.unet)
    assert (model.conditioning.kind, model.space, model.sample_shape) == ("text", "latent", (4, 16, 16))
    assert (model.usual_sampler, model.usual_steps, model.usual_guidance) == ("dpmpp_2m", 8, 3.0)
    assert set(pipeline_components(model)) == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert (model.card.license, "Twemoji" in model.card.text) == ("apache-2.0", True)
    names = tuple((model.path / "things.txt").read_text().splitlines())
    assert len(names) == len({*names}) == 520
    assert built_in_classifier(names, 64) == model.path / "classifier"
    styles = load_classifier(model.path / "classifier").shape.styles
    assert {prompt.partition(", ")[0] for prompt in PROMPTS} <= {*names}
    assert {prompt.partition(", ")[2].replace(" ", "-") for prompt in PROMPTS} <= {*styles}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("drawings-64-student", SpectralUNet2DConditionModel), ("grocery-32-student", SpectralUNet2DModel)],
)
def test_the_built_in_students(name: str, kind: type) -> None:
    model, teacher = load_model(name), load_model(name.removesuffix("-student"))
    assert type(model.unet) is kind
    assert_ready(model.unet)
    assert (model.conditioning, model.sample_shape) == (teacher.conditioning, teacher.sample_shape)
    assert (model.space, model.card.license) == (teacher.space, "apache-2.0")
    assert (model.usual_steps, model.usual_guidance) == (teacher.usual_steps, teacher.usual_guidance)
    assert set(pipeline_components(model)) == set(pipeline_components(teacher))
    own, its = (tally(split(m.unet, Cut()), m.sample_shape, m.conditioning.tensors) for m in (model, teacher))
    assert own.parts["full"].macs <= its.parts["full"].macs / 8


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


# Names and variants


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_of_the_hugging_face_cache_has_its_repository_s_name(folder: Path, inside: bool) -> None:
    home = folder.parent / "models--acme--tiny-diffusion" / "snapshots" / "39593d5650112b4cc580433f6b0435385882d819"
    home.parent.mkdir(parents=True)
    folder.rename(home)
    assert load_model(home / "unet" if inside else home).name == "tiny-diffusion"


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants(folder: Path, variant: str, dtype: torch.dtype, sharded: bool) -> None:
    unet = UNet2DModel.from_pretrained(folder / "unet").to(dtype)
    unet.save_pretrained(folder / "unet", variant=variant, max_shard_size="50KB" if sharded else "1GB")
    (folder / SAFE).unlink()
    assert_reads(folder, unet.float())
