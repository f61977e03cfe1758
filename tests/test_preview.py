"""Previews: what a step predicts, decoded by a small autoencoder that travels with the bundle."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import exported
from command_line import Command, assert_error, unchanged
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from pipelines import open_in_torch, saved, saved_tiny_vae
from tiny_pipelines import save_tiny_vae

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import EdgediffError
from edgediff.export.export_config import config_from
from edgediff.models.components import component_hashes, pipeline_components
from edgediff.verify.parity import verify_bundle
from edgediff_runtime import EdgePipeline, RequestError, noise, open_bundle
from edgediff_runtime.__main__ import main as light_main
from edgediff_runtime.manifest import Vae
from edgediff_runtime.pipeline import DECODER, PREVIEW
from edgediff_runtime.samplers import SAMPLERS
from edgediff_runtime.schedule_tables import alphas_cumprod
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler
from edgediff_runtime.sessions import Session

GOLDEN = Path(__file__).parents[1] / "runtime/golden/bundle"
ASKED: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 3, "clock": 1, "guidance_scale": 2.0}
# Those of ExecuTorch and LiteRT are compared one by one, with their other components.
TARGETS = ("onnx", "openvino", "coreml")


def recipe(**settings: Any) -> edgediff.ExportConfig:
    return config_from(
        {"preview": str(saved_tiny_vae()), "steps": 2, "scheduler": "euler", "verify": {"mode": "graphs"}, **settings}
    )


@pytest.fixture(scope="module")
def sd1() -> EdgePipeline:
    return open_in_torch("sd1", preview=saved_tiny_vae())


# What a step predicts.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_step_predicts_is_the_image_in_it(name: str, prediction: str) -> None:
    if prediction not in SAMPLERS[name].predictions:
        pytest.skip(f"{name} does not take {prediction}")
    spaced = {"timestep_spacing": "leading"} if "timestep_spacing" in SAMPLERS[name].settings else {}
    clips = {"clip_sample": False} if "clip_sample" in SAMPLERS[name].settings else {}
    config = SchedulerConfig(name=name, prediction_type=prediction, **spaced, **clips)
    scheduler = make_scheduler(config, 5)
    x_0, eps = noise(1, (1, 2, 4, 4)), noise(2, (1, 2, 4, 4))
    for i, timestep in enumerate(scheduler.timesteps):
        alpha = alphas_cumprod(config)[int(timestep)]
        x_t = np.sqrt(alpha) * x_0 + np.sqrt(1 - alpha) * eps
        out = {"epsilon": eps, "v_prediction": np.sqrt(alpha) * eps - np.sqrt(1 - alpha) * x_0, "sample": x_0}
        if name in ("euler", "euler_ancestral", "heun"):
            x_t = x_t / np.sqrt(alpha)
        found = scheduler.predicted(i, x_t.astype(np.float32), out[prediction].astype(np.float32))
        np.testing.assert_allclose(found, x_0, rtol=0, atol=1e-3)


def test_a_prediction_is_clipped_where_the_sampler_clips() -> None:
    scheduler = make_scheduler(SchedulerConfig(name="ddim", clip_sample=True, clip_sample_range=0.5), 3)
    assert np.abs(scheduler.predicted(0, noise(1, (1, 2, 4, 4)), noise(2, (1, 2, 4, 4)))).max() == 0.5


def test_the_last_prediction_is_what_comes_out(sd1: EdgePipeline) -> None:
    steps = list(sd1.stream(**ASKED, seed=1, num_images=2))
    assert [step.predicted.shape for step in steps] == [(2, 4, 16, 16)] * 3
    np.testing.assert_array_equal(steps[-1].predicted, steps[-1].latents)
    assert np.abs(steps[0].predicted - steps[0].latents).max() > 0.1
    with pytest.raises(ValueError, match="read-only"):
        steps[0].predicted[:] = 0
    assert not any(step.predicted.size for step in sd1(**ASKED).ledger)


# Pictures of it.


def test_a_preview_is_what_the_small_autoencoder_decodes(sd1: EdgePipeline) -> None:
    tiny, latents = AutoencoderTiny.from_pretrained(saved_tiny_vae()), noise(4, (3, 4, 16, 16))
    with torch.no_grad():
        want = tiny.decode(torch.from_numpy(latents) / tiny.config.scaling_factor).sample.numpy()
    made = sd1.preview(latents)
    assert (made.dtype, made.shape) == (np.uint8, (3, 32, 32, 3))
    assert np.abs(made - 255 * np.clip(want / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)).max() <= 0.5 + 1e-3
    assert (sd1.manifest.preview, sd1.can_preview) == (Vae(1.0, 2), True)


@pytest.mark.parametrize("low_memory", [False, True])
def test_previews_change_no_picture_and_their_decoder_is_opened_once(sd1: EdgePipeline, low_memory: bool) -> None:
    opened = list[Session]()
    pipe = open_in_torch("sd1", low_memory=low_memory, opened=opened.append, preview=saved_tiny_vae())
    shown = list[np.ndarray]()
    result = pipe(**ASKED, callback=lambda step: shown.append(pipe.preview(step.predicted)))
    np.testing.assert_array_equal(result.pixels, sd1(**ASKED).pixels)
    assert len(shown) == 3
    assert not np.array_equal(shown[0], shown[2])
    assert set(result.stages) == {"text_encoder", DECODER}
    names = [session.graphs[0].name for session in opened]
    assert names.count(PREVIEW) == 1


def test_pixels_are_their_own_preview() -> None:
    pipe = EdgePipeline.from_pretrained(GOLDEN, threads=1)
    steps = list(pipe.stream(num_images=1))
    assert pipe.can_preview
    np.testing.assert_array_equal(pipe.preview(steps[-1].latents), pipe(num_images=1).images)


def test_previews_that_cannot_be_made(sd1: EdgePipeline) -> None:
    plain = open_in_torch("sd1")
    assert not plain.can_preview
    with pytest.raises(RequestError, match=r"^the bundle has no preview decoder; export it with --preview DIR, an "):
        plain.preview(np.zeros((1, 4, 16, 16), np.float32))
    alone = EdgePipeline(sd1.manifest, sd1.session)
    with pytest.raises(RequestError, match=r"^the bundle has no preview_decoder for this backend; it has: unet"):
        alone.preview(np.zeros((1, 4, 16, 16), np.float32))
    for latents, said in (
        (np.zeros((1, 3, 16, 16), np.float32), r"^latents are .*; expected float32 \[N, 4, 16, 16\]$"),
        (np.zeros((1, 4, 16, 8), np.float32), r"^preview_decoder: it has no graphs for 16 x 32 .*; it takes 32 x 32"),
    ):
        with pytest.raises(RequestError, match=said):
            sd1.preview(latents)


# The model.


def test_a_preview_from_a_file(tmp_path: Path) -> None:
    folder = saved_tiny_vae()
    file = folder / "diffusion_pytorch_model.safetensors"
    found, want = (
        pipeline_components(edgediff.load_model(saved("sd1"), preview=where))[PREVIEW] for where in (file, folder)
    )
    assert (found.stage, found.kind) == ("preview", "AutoencoderTiny")
    made = found.load().state_dict()
    assert made
    assert all(torch.equal(tensor, made[name]) for name, tensor in want.load().state_dict().items())
    # Two files beside one configuration are two sources.
    shutil.copytree(folder, tmp_path / "two")
    save_tiny_vae(tmp_path / "other")
    shutil.copy(file, tmp_path / "two" / "vae.safetensors")
    (tmp_path / "two" / "preview.safetensors").write_bytes(file.read_bytes() + b"\0")
    files = {"vae": tmp_path / "two" / "vae.safetensors", "preview": tmp_path / "two" / "preview.safetensors"}
    hashes = component_hashes(pipeline_components(edgediff.load_model(saved("sd1"), **files)))
    assert hashes[DECODER] == hashes["vae_encoder"] != hashes[PREVIEW]


def _wide(folder: Path) -> None:
    save_tiny_vae(folder, latent_channels=8)


def _large(folder: Path) -> None:
    AutoencoderKL(latent_channels=4).save_pretrained(folder)


def _file(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(saved_tiny_vae() / "diffusion_pytorch_model.safetensors", folder / "taesd.safetensors")


BAD: Mapping[str, tuple[Any, str, str]] = {
    "other latents": (_wide, "x", "x has 8 latent channels, the UNet gives 4; take one that fits"),
    "a large autoencoder": (_large, "x", "is of class 'AutoencoderKL'; supported: AutoencoderTiny"),
    "a file alone": (_file, "x/taesd.safetensors", "has no config.json beside it; name a directory that diffusers"),
    "nothing": (lambda folder: None, "x", "no autoencoder at "),
    "an empty folder": (Path.mkdir, "x", "x/config.json is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_autoencoders_that_make_no_previews(name: str, tmp_path: Path, command: Command) -> None:
    make, where, said = BAD[name]
    make(tmp_path / "x")
    (tmp_path / "out").mkdir()
    with unchanged(tmp_path):
        assert_error(command("export", saved("sd1"), "-o", tmp_path / "out/b", "--preview", tmp_path / where), said)


def test_previews_that_an_export_refuses(class_model: Path, tmp_path: Path) -> None:
    folder = saved_tiny_vae()
    plain, with_preview = edgediff.load_model(saved("sd1")), edgediff.load_model(saved("sd1"), preview=folder)
    for model, config, said in (
        (plain, recipe(), r"'preview' is .* was not loaded with; pass preview= to load_model"),
        (with_preview, recipe(components=["vae_decoder"]), "but 'components' has no preview_decoder; name it there"),
        (plain, recipe(preview=None, components=[PREVIEW]), "'components' asks for preview_decoder, which"),
    ):
        with pytest.raises(EdgediffError, match=said):
            edgediff.export_bundle(model, tmp_path / "out", config)
    with pytest.raises(EdgediffError, match="would go beside an autoencoder, and tiny-class has none; name a whole"):
        edgediff.load_model(class_model, preview=folder)
    assert not list(tmp_path.iterdir())


# The bundle.


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported(saved("sd1"), recipe(targets=TARGETS, components=["text_encoder", DECODER, PREVIEW]), {})


@pytest.mark.long
def test_every_target_has_it_and_it_is_verified(bundle: Path) -> None:
    opened = open_bundle(bundle)
    files = {
        "onnx": "preview_decoder/model.onnx", "openvino": "preview_decoder/openvino_model.xml",
        "coreml": "PreviewDecoder.mlpackage",
    }  # fmt: skip
    report = verify_bundle(bundle, record=False)
    assert report.ok
    for target in opened.manifest.targets:
        component = target.component(PREVIEW)
        assert component.stage == "preview"
        assert component.graphs[0].file == f"{target.target}/{files[target.target]}"
        rows = [row for row in report.rows if (row.target, row.part, row.check) == (target.target, PREVIEW, "graph")]
        # Apple's own runs on macOS alone.
        assert [row.status for row in rows if row.status != "not_run"] == ["measured"]
    assert (opened.manifest.preview, opened.manifest.source.preview) == (Vae(1.0, 2), str(saved_tiny_vae()))
    assert "`preview_decoder` (sha256" in (bundle / "README.md").read_text()
    assert "`--preview FOLDER` shows" in (bundle / "README.md").read_text()


@pytest.mark.long
def test_trees_of_other_ecosystems_are_what_they_are_without_it(bundle: Path) -> None:
    """Optimum and OpenVINO GenAI open the folders that they know; model_index.json names no other."""
    listed = json.loads((bundle / "onnx/model_index.json").read_text())
    assert not any("preview" in f"{name} {value}" for name, value in listed.items())
    assert listed["vae"] == ["diffusers", "AutoencoderKL"]
    for target, files in (
        ("onnx", {"model.onnx", "config.json"}),
        ("openvino", {"openvino_model.xml", "openvino_model.bin", "config.json"}),
    ):
        folders = {path.name for path in (bundle / target).iterdir() if path.is_dir()}
        assert folders == {"text_encoder", "tokenizer", "unet", "vae_decoder", "scheduler", PREVIEW} | (
            {"openvino_tokenizer"} & folders
        )
        assert {path.name for path in (bundle / target / PREVIEW).iterdir()} == files


@pytest.mark.long
def test_a_png_of_each_step_on_both_command_lines(
    bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [bundle, "--prompt", "a dog", "--steps", "3", "--threads", "1"]
    assert command("run", *asked, "-o", tmp_path / "plain.png", "--backend", "onnxruntime").code == 0
    shown = ["--preview", tmp_path / "shown"]
    said = command("run", *asked, *shown, "-o", tmp_path / "a.png", "--backend", "onnxruntime", "--json")
    assert said.code == 0
    names = [f"step-00{i}.png" for i in (1, 2, 3)]
    assert json.loads(said.out)["previews"] == [str(tmp_path / "shown" / name) for name in names]
    light = ["x", *asked, "-o", tmp_path / "b.png", "--preview", tmp_path / "light", "--low-memory"]
    monkeypatch.setattr("sys.argv", [str(each) for each in light])
    assert light_main() == 0
    for folder in ("shown", "light"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        with Image.open(tmp_path / folder / names[0]) as picture:
            assert picture.size == (32, 32)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain.png").read_bytes()
    first = [(tmp_path / folder / names[0]).read_bytes() for folder in ("shown", "light")]
    assert first[0] == first[1] != (tmp_path / "shown" / names[2]).read_bytes()
    listed = json.loads(command("inspect", bundle, "--json").out)["components"]
    assert {each["target"] for each in listed if each["component"] == PREVIEW} == set(TARGETS)


def test_previews_that_have_no_place(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    asked = [GOLDEN, "-o", tmp_path / "a.png", "--num-images", "1", "--preview"]
    with unchanged(tmp_path):
        assert_error(command("run", *asked, tmp_path / "file"), "file: it is a file; choose another name")
        assert_error(command("run", *asked, tmp_path / "no/where"), "the folder", "does not exist; create it")
    assert command("run", *asked, tmp_path / "there").code == 0
    assert len(list((tmp_path / "there").iterdir())) == 4


def test_a_preview_of_a_bundle_without_a_decoder_for_it(text_bundle: Path, tmp_path: Path, command: Command) -> None:
    asked = ("run", text_bundle, "-o", tmp_path / "a.npy", "--preview", tmp_path / "x", "--num-images", "1")
    with unchanged(tmp_path):
        assert_error(command(*asked), "the bundle has no preview decoder; export it with --preview DIR, an Autoencod")


@pytest.mark.long
def test_a_preview_in_fp16() -> None:
    """Of any size, beside graphs in fp32."""
    config = recipe(components=[DECODER, PREVIEW], sizes=["any"], dtypes={PREVIEW: "fp16"})
    pipe = EdgePipeline.from_pretrained(exported(saved("sd1"), config, {}), threads=1)
    assert pipe.manifest.target("onnx").component(PREVIEW).dtype == "fp16"
    latents, tiny = noise(4, (1, 4, 20, 12)), AutoencoderTiny.from_pretrained(saved_tiny_vae())
    with torch.no_grad():
        want = tiny.decode(torch.from_numpy(latents)).sample.numpy()
    made = pipe.preview(latents)
    assert psnr_db(np.clip(want / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), made / 255) >= 40.0
