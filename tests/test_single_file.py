import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from model_folders import load_whole
from safetensors.torch import load_file, save_file
from single_files import checkpoint, save_single
from tiny_pipelines import SAVE
from unets import assert_same_unet

from edgediff import ExportConfig, export_bundle, load_model
from edgediff.errors import ConfigError, EdgediffError, ModelError, UnsupportedError
from edgediff.models.clip_tokenizer import load_tokenizer, write_tokenizer
from edgediff.models.component_loading import empty_text_encoder
from edgediff.models.components import pipeline_components, prompt_settings
from edgediff.models.conditioning import read_conditioning
from edgediff.models.model_files import read_json
from edgediff.models.single_file import CONV_IN, FOLDER, _converted, open_single_file
from edgediff.zoo import FOLDER as ZOO

V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
KINDS = ("sd1", "sd2", "xl")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        SAVE[kind](root / kind)
        save_single(root / kind, kind, root / f"{kind}.safetensors")
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def assert_same_components(one: Any, other: Any) -> None:
    mine, theirs = pipeline_components(one), pipeline_components(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].graph == theirs[name].graph
        assert_same_unet(mine[name].load(), theirs[name].load())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_directory_s_bit_for_bit(pipelines: Path, kind: str) -> None:
    folder, file = pipelines / kind, pipelines / f"{kind}.safetensors"
    single, whole = load_model(file, configs=folder), load_model(folder)
    assert_same_unet(single.unet, whole.unet)
    assert_same_components(single, whole)
    assert single.scheduler is not None
    assert whole.scheduler is not None
    assert single.scheduler.config.prediction_type == whole.scheduler.config.prediction_type
    assert (single.name, single.path, single.conditioning) == (kind, file, whole.conditioning)


def test_half_precision_and_the_hash(pipelines: Path, tmp_path: Path) -> None:
    folder, file = pipelines / "sd1", pipelines / "sd1.safetensors"
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, half)
    model, whole = load_model(half, configs=folder), load_model(file, configs=folder)
    want = whole.unet.state_dict()
    assert all(torch.equal(tensor, want[name].half().float()) for name, tensor in model.unet.state_dict().items())
    velocity = load_model(file, configs=folder, prediction_type="v_prediction")
    assert velocity.scheduler is not None
    assert velocity.scheduler.config.prediction_type == "v_prediction"
    assert len({model.sha256, whole.sha256, velocity.sha256}) == 3
    (tmp_path / "copy.safetensors").write_bytes(file.read_bytes())
    assert load_model(tmp_path / "copy.safetensors", configs=folder).sha256 == whole.sha256
    shas = [pipeline_components(each)["vae_decoder"].sha256 for each in (model, whole)]
    assert len(set(shas)) == 2


def test_a_ckpt_is_read_where_pickles_are_allowed(pipelines: Path, tmp_path: Path) -> None:
    file = save_single(pipelines / "sd1", "sd1", tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"model\.ckpt is a pickle, .*; convert it to \.safetensors, or pass --allow"):
        load_model(file, configs=pipelines / "sd1")
    model = load_model(file, configs=pipelines / "sd1", allow_pickle=True)
    assert_same_unet(model.unet, load_model(pipelines / "sd1").unet)
    assert_same_components(model, load_model(pipelines / "sd1"))


@pytest.mark.long
def test_a_bundle_of_a_single_file(pipelines: Path, tmp_path: Path) -> None:
    model = load_model(pipelines / "sd2.safetensors", configs=pipelines / "sd2")
    done = export_bundle(model, tmp_path / "out", ExportConfig(steps=1, clock=1))
    assert done.report is not None
    assert done.report.ok
    assert (tmp_path / "out" / "onnx" / "tokenizer" / "merges.txt").exists()


# What kind of checkpoint a file is


def marked(file: Path, **shapes: tuple[int, ...]) -> Path:
    """A file with the tensors by which diffusers knows a kind."""
    names = {"conv_in": CONV_IN, "v2": V2, "xl": XL}
    save_file({names.get(name, name): torch.zeros(shape) for name, shape in shapes.items()}, file)
    return file


@pytest.mark.parametrize(
    ("shapes", "home", "geometry", "said", "channels", "side"),
    [
        ({"conv_in": (320, 4, 3, 3)}, "v1", "sd15", "epsilon", 4, 64),
        ({"conv_in": (320, 9, 3, 3)}, "v1", "sd15", "epsilon", 9, 64),
        ({"conv_in": (320, 8, 3, 3)}, "v1", "sd15", "epsilon", 8, 64),
        ({"conv_in": (320, 4, 3, 3), "v2": (320, 1024)}, "v2", "sd21", "v_prediction", 4, 96),
        ({"conv_in": (320, 9, 3, 3), "v2": (320, 1024)}, "v2", "sd21", "v_prediction", 9, 96),
        ({"conv_in": (320, 4, 3, 3), "xl": (1280,)}, "xl_base", "sdxl", "epsilon", 4, 128),
        ({"conv_in": (320, 9, 3, 3), "xl": (1280,)}, "xl_base", "sdxl", "epsilon", 9, 128),
    ],
)
def test_the_kind_is_inferred(
    tmp_path: Path, shapes: Any, home: str, geometry: str, said: str, channels: int, side: int
) -> None:
    found = open_single_file(marked(tmp_path / "a.safetensors", **shapes))
    assert (found.home, found.geometry, found.prediction_type) == (FOLDER / home, ZOO / geometry, said)
    config = found.unet_config()
    assert (config["in_channels"], config["sample_size"]) == (channels, side)


def test_a_base_model_of_2_x_has_512_pixels(tmp_path: Path) -> None:
    file = marked(tmp_path / "a.safetensors", conv_in=(320, 4, 3, 3), v2=(320, 1024))
    found = open_single_file(file, prediction_type="epsilon")
    assert found.unet_config()["sample_size"] == 64
    assert found.scheduler_config()["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("home", "geometry", "kind", "encoders", "shapes"),
    [
        ("v1", "sd15", "sd1", [123_060_480], {"encoder_hidden_states": (77, 768)}),
        ("v2", "sd21", "sd2", [340_387_840], {"encoder_hidden_states": (77, 1024)}),
        ("xl_base", "sdxl", "xl", [123_060_480, 694_659_840],
         {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}),
    ],
)  # fmt: skip
def test_published_models_fit_their_configurations(
    home: str, geometry: str, kind: str, encoders: list[int], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Sizes as published, and every name of a checkpoint of that size becomes diffusers' own: on the meta device."""
    folders = {each.name: each for each in sorted((FOLDER / home).glob("text_encoder*"))}
    folders |= {"unet": ZOO / geometry / "unet", "vae": FOLDER / home / "vae"}
    configs = {name: read_json(folder / "config.json") for name, folder in folders.items()}
    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]), "vae": AutoencoderKL.from_config(configs["vae"]),
        }  # fmt: skip
        modules |= {name: empty_text_encoder(configs[name]) for name in folders if name.startswith("text")}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert [counts[name] for name in folders if name.startswith("text")] == encoders
    assert counts["vae"] == 83_653_863
    states = {name: dict(module.state_dict()) for name, module in modules.items()}
    made = checkpoint(configs, states, kind)
    for name, state in states.items():
        converted = {key.removeprefix("text_model."): t for key, t in _converted(made, name, configs[name]).items()}
        assert {key.removeprefix("text_model."): t.shape for key, t in state.items()} == {
            key: t.shape for key, t in converted.items()
        }
    known = read_conditioning(FOLDER / home, configs["unet"])
    assert {name: spec.shape for name, spec in known.tensors.items()} == shapes


@pytest.mark.parametrize(
    ("folder", "pad"), [("v1/tokenizer", 49407), ("v2/tokenizer", 0), ("xl_base/tokenizer", 49407),
                        ("xl_base/tokenizer_2", 0)],
)  # fmt: skip
def test_clip_s_vocabulary(folder: str, pad: int, tmp_path: Path) -> None:
    """The ids are those of openai/clip-vit-large-patch14."""
    write_tokenizer(FOLDER / folder, tmp_path / "tokenizer")
    for tokenizer in (load_tokenizer(FOLDER / folder), load_tokenizer(tmp_path / "tokenizer")):
        assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (49408, pad, 77)
        assert tokenizer("A photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert tokenizer("a", padding="max_length", max_length=5)["input_ids"] == [49406, 320, 49407, pad, pad]


def test_prompts_of_a_single_file(pipelines: Path) -> None:
    model = load_model(pipelines / "xl.safetensors", configs=pipelines / "xl")
    prompt = prompt_settings(model, pipeline_components(model))
    assert prompt is not None
    assert [encoder.component for encoder in prompt.encoders] == ["text_encoder", "text_encoder_2"]


# What is refused


def refused(kind: type[EdgediffError], words: str, source: Path, **options: Any) -> None:
    with pytest.raises(EdgediffError, match=words) as caught:
        load_whole(source, **options)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "flux-schnell"),
        ("control_model.time_embed.0.weight", "controlnet"),
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", "xl_refiner"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    file = marked(tmp_path / "a.safetensors", **{name: (1,)})
    refused(UnsupportedError, f"is a checkpoint of the kind {kind}; supported: single files of Stable Diff", file)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(UnsupportedError, "no checkpoint of a known kind", marked(tmp_path / "a.safetensors", weight=(1,)))
    (tmp_path / "a.txt").write_text("x")
    refused(ModelError, r"a file of another kind; expected \.safetensors or \.ckpt", tmp_path / "a.txt")
    (tmp_path / "b.safetensors").write_bytes(b"x" * 99)
    refused(ModelError, "damaged or truncated", tmp_path / "b.safetensors")


def test_options_of_single_files_for_a_directory(pipelines: Path) -> None:
    refused(ConfigError, "is no single file; leave them out", pipelines / "sd1", prediction_type="epsilon")
    file = pipelines / "sd1.safetensors"
    refused(UnsupportedError, "'flow' is unknown; choices: epsilon", file, configs=pipelines / "sd1",
            prediction_type="flow")  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("model.diffusion_model.", r"has no UNet \(model\.diffusion_model\.input_blocks\.0\.0\.weight is missing\)"),
        ("first_stage_model.", "has no vae; expected a checkpoint with all components"),
        ("cond_stage_model.", "has no text_encoder; expected"),
        ("first_stage_model.decoder.conv_in", r"weights do not fit its config\.json.*decoder\.conv_in"),
        ("cond_stage_model.transformer.text_model.final", r"do not fit its config\.json.*final_layer_norm"),
        ("model.diffusion_model.out.2.bias", r"do not fit its kind's configuration.*conv_out\.bias"),
    ],
)
def test_a_checkpoint_that_lacks_a_part(pipelines: Path, tmp_path: Path, prefix: str, words: str) -> None:
    state = load_file(pipelines / "sd1.safetensors")
    left = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    assert len(left) < len(state)
    save_file(left, tmp_path / "a.safetensors")
    refused(ModelError, words, tmp_path / "a.safetensors", configs=pipelines / "sd1")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "weights are not finite in"), (1j, "weights are complex numbers in")]
)
def test_values_that_are_no_weights(pipelines: Path, tmp_path: Path, prefix: str, value: complex, words: str) -> None:
    state = load_file(pipelines / "sd1.safetensors")
    name = next(name for name in state if name.startswith(prefix))
    state[name] = torch.full(state[name].shape, value)
    save_file(state, tmp_path / "a.safetensors")
    refused(ModelError, words, tmp_path / "a.safetensors", configs=pipelines / "sd1")
