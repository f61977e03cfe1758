import json
from pathlib import Path

import pytest
import torch
from command_line import Command
from diffusers import DiffusionPipeline
from loras import diffusers_lora, fuse, kohya_lora, text_encoders
from safetensors.torch import load_file, save_file
from tiny_pipelines import SAVE
from torch import nn

from edgediff import ExportConfig, export_bundle, load_model, verify_bundle
from edgediff.errors import ConfigError, EdgediffError, ModelError, UnsupportedError
from edgediff.models.components import pipeline_components


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd1", "xl"):
        SAVE[kind](root / kind)
    return root


def assert_close(mine: nn.Module, theirs: nn.Module, plain: nn.Module) -> None:
    ours, want, before = mine.state_dict(), theirs.state_dict(), plain.state_dict()
    assert ours.keys() == want.keys()
    torch.testing.assert_close(ours, dict(want), rtol=0, atol=1e-6)
    changed = sum(not torch.equal(ours[name], before[name]) for name in ours)
    assert changed >= 10, "the LoRA changed nothing: this test proves nothing"


@pytest.mark.parametrize("scale", [1.0, 0.8, -0.5])
@pytest.mark.parametrize("kind", ["sd1", "xl"])
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_fused_weights_are_those_of_diffusers(
    pipelines: Path, tmp_path: Path, kind: str, names: str, scale: float
) -> None:
    folder = pipelines / kind
    if names == "diffusers":
        file = diffusers_lora(folder, tmp_path)
    else:
        file = kohya_lora(folder, tmp_path / "style.safetensors")
    pipe = DiffusionPipeline.from_pretrained(folder)
    fuse(pipe, file, scale)
    model, plain = load_model(folder, lora=[f"{file}:{scale}"]), load_model(folder)
    assert_close(model.unet, pipe.unet, plain.unet)
    mine, before = pipeline_components(model), pipeline_components(plain)
    for name in text_encoders(pipe):
        assert_close(mine[name].load().encoder, getattr(pipe, name), before[name].load().encoder)  # type: ignore[arg-type]
        assert mine[name].sha256 != before[name].sha256
    assert mine["vae_decoder"].sha256 == before["vae_decoder"].sha256
    assert model.sha256 != plain.sha256


def test_two_in_turn_and_their_scales_are_in_the_hash(pipelines: Path, tmp_path: Path) -> None:
    folder = pipelines / "sd1"
    one, two = (kohya_lora(folder, tmp_path / name) for name in ("a.safetensors", "b:2.safetensors"))
    both, once = load_model(folder, lora=[str(one), f"{two}:0.5"]), load_model(folder, lora=[f"{one}:1.5"])
    assert_close(both.unet, once.unet, load_model(folder).unet)
    shas = {load_model(folder, lora=lora).sha256 for lora in ([], [str(one)], [f"{one}:0.9"], [str(one), str(two)])}
    assert len(shas) == 4


def refused(folder: Path, lora: str, kind: type[EdgediffError], *words: str) -> None:
    with pytest.raises(EdgediffError) as caught:
        load_model(folder, lora=[lora])
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_lora_of_another_model(pipelines: Path, tmp_path: Path) -> None:
    file = kohya_lora(pipelines / "xl", tmp_path / "xl.safetensors")
    refused(pipelines / "sd1", str(file), ModelError, str(file), "take one")


def test_a_lora_of_another_width(pipelines: Path, tmp_path: Path) -> None:
    file = kohya_lora(pipelines / "sd1", tmp_path / "a.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    state = load_file(file)
    save_file(state | {name: torch.zeros(3, 24)}, file)
    refused(
        pipelines / "sd1", str(file), ModelError, "a LoRA of another model: 1 of its", "attn2.to_k, which is [16, 24]"
    )


def test_names_that_match_nothing(pipelines: Path, tmp_path: Path) -> None:
    file = diffusers_lora(pipelines / "sd1", tmp_path, alpha=4)
    save_file(load_file(file) | {"unet.down_blocks.9.conv.lora_A.bias": torch.zeros(1)}, file)
    refused(pipelines / "sd1", str(file), ModelError, "1 of its weights match nothing", "unet.down_blocks.9.conv")


@pytest.mark.parametrize(
    ("part", "name"),
    [("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")],
)
def test_other_adapters_are_refused_by_name(pipelines: Path, tmp_path: Path, part: str, name: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_down_blocks_0_resnets_0_conv1.{part}": torch.zeros(1)}, file)
    refused(pipelines / "sd1", str(file), UnsupportedError, f"is a {name} adapter; supported: LoRA")


def test_files_that_are_no_lora(pipelines: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    refused(pipelines / "sd1", str(file), ConfigError, "no such file; expected FILE or FILE:SCALE")
    save_file({"weight": torch.zeros(1)}, file)
    refused(pipelines / "sd1", str(file), ModelError, "has no LoRA layers")
    refused(pipelines / "sd1", f"{file}:much", ConfigError, "the scale 'much' is no number")
    refused(pipelines / "sd1", f"{file}:nan", ConfigError, "expected a finite number")
    file.write_bytes(file.read_bytes()[:-2])
    refused(pipelines / "sd1", f"{file}:0.5", ModelError, "damaged or truncated")
    with pytest.raises(ModelError, match="is a LoRA; name its base model, and pass the file with --lora"):
        load_model(kohya_lora(pipelines / "sd1", tmp_path / "b.safetensors"))


def test_weights_that_are_not_finite(pipelines: Path, tmp_path: Path) -> None:
    file = kohya_lora(pipelines / "sd1", tmp_path / "a.safetensors")
    state = load_file(file)
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}, file)
    refused(pipelines / "sd1", str(file), ModelError, "weights are not finite")


def test_a_recipe_whose_lora_was_not_loaded(pipelines: Path, tmp_path: Path) -> None:
    file = kohya_lora(pipelines / "sd1", tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="was not loaded with; pass lora= to load_model"):
        export_bundle(load_model(pipelines / "sd1"), tmp_path / "out", ExportConfig(lora=(str(file),)))


@pytest.mark.long
def test_a_bundle_says_what_was_fused(pipelines: Path, tmp_path: Path, command: Command) -> None:
    file = kohya_lora(pipelines / "sd1", tmp_path / "a.safetensors")
    spec, out = f"{file}:0.5", tmp_path / "out"
    said = command("export", pipelines / "sd1", "-o", out, "--lora", spec, "--steps", "1", "--clock", "1")
    assert said.code == 0, said
    model = load_model(pipelines / "sd1", lora=[spec])
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert (source["lora"], source["sha256"]) == ([spec], model.sha256)
    # Found again where the manifest says, and fused again.
    rows = verify_bundle(out).rows
    assert {row.note for row in rows if row.check == "trajectory"} == {"against torch, computed again"}
    config = ExportConfig(steps=1, clock="1", lora=(spec,))
    assert export_bundle(model, out, config).report is None, "the same model by the same recipe"
