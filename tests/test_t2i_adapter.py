"""A T2I-Adapter beside the UNet: diffusers' picture at clock 1, features made once, off without a control image."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import Command, assert_error, exit_code
from edits import ADAPTED_SIZES, BACKENDS, FLOOR_DB, PROMPT, SAMPLERS, SIZE, against, ours, picture, theirs
from msgspec.structs import replace
from pipelines import changed, config_of, exported_pipeline, saved, saved_controlnet, saved_t2i_adapter

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import ConfigError, ModelError, UnsupportedError
from edgediff.export.export_config import check_config
from edgediff.models.graphs import divide
from edgediff.models.t2i_adapter import T2IAdapter, adapter_with_weights
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import BundleError, EdgePipeline, RequestError, open_bundle
from edgediff_runtime.manifest_json import check_manifest, parse_manifest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Of each kind of adapter the small pipeline that it is for.
KIND = {"sd1": "full_adapter", "xl-levels": "full_adapter_xl"}


@pytest.mark.parametrize(
    ("name", "backend", "sampler"),
    [
        *(pytest.param("sd1", "torch", name, marks=[pytest.mark.long] * (name != "pndm")) for name in SAMPLERS),
        *(pytest.param("sd1", "onnxruntime", name, marks=pytest.mark.long) for name in SAMPLERS),
        ("xl-levels", "torch", "pndm"),
    ],
)
def test_a_t2i_adapter(name: str, backend: str, sampler: str) -> None:
    kind = diffusers.StableDiffusionAdapterPipeline
    told = {"image": picture(), "adapter_conditioning_scale": 0.8, **SIZE}
    if name.startswith("xl"):
        kind = diffusers.StableDiffusionXLAdapterPipeline
        # It counts steps, and would leave the features out of PNDM's last call.
        told["adapter_conditioning_factor"] = 2.0
    pipe = ours(name, sampler, backend, adapter=KIND[name])
    other = theirs(name, sampler, kind, adapter=KIND[name])
    asked = {"prompt": PROMPT, "guidance_scale": 5.0, "control_image": picture()}
    asked["controlnet_conditioning_scale"] = 0.8
    without = ("control_image", "controlnet_conditioning_scale")
    assert against(pipe, other, asked, told, without) >= FLOOR_DB


@BACKENDS
def test_without_a_control_image_the_adapter_does_not_run(backend: str) -> None:
    pipe = ours("sd1", "dpmpp_2m", backend, adapter="full_adapter")
    other = theirs("sd1", "dpmpp_2m", diffusers.StableDiffusionPipeline)
    asked = {"prompt": PROMPT, "guidance_scale": 5.0}
    assert against(pipe, other, asked) >= FLOOR_DB
    plain, steered = pipe(**asked, clock=2), pipe(**asked, clock=2, control_image=picture())
    assert "t2i_adapter" not in plain.stages
    assert steered.stages["t2i_adapter"] > 0
    assert not np.allclose(plain.latents, steered.latents, atol=1e-2)
    off = pipe(**asked, clock=2, control_image=picture(), controlnet_conditioning_scale=0)
    np.testing.assert_allclose(off.latents, plain.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cut", [edgediff.Cut(), edgediff.Cut(point="after_upsample"), edgediff.Cut(point="block:0")])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", "full_adapter"), ("sd1-levels", "full_adapter"), ("sd1-levels", "light_adapter"),
        ("xl-levels", "full_adapter_xl"),
    ],
)  # fmt: skip
def test_a_divided_unet_takes_features_as_diffusers_does(name: str, kind: str, cut: edgediff.Cut) -> None:
    model = edgediff.load_model(saved(name), t2i_adapter=saved_t2i_adapter(name, kind))
    found = model.t2i_adapter
    assert found is not None
    torch.manual_seed(0)
    x, t, text = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([501.0]),
        torch.randn(2, 77, model.unet.config.cross_attention_dim),
    )
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)} if name.startswith("xl") else None
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = diffusers.T2IAdapter.from_pretrained(found.path)(image)
        part = T2IAdapter(adapter_with_weights(found.config, found.path), len(found.places))
        made = part.run({"control_image": image})
        assert all(torch.equal(a, b) for a, b in zip(made.values(), features, strict=True))
        name_of_list = "down_intrablock_additional_residuals"
        steered = {"encoder_hidden_states": text, "added_cond_kwargs": added}
        plain = model.unet(x, t, **steered, return_dict=False)[0]
        want = model.unet(x, t, **steered, **{name_of_list: [each.clone() for each in features]}, return_dict=False)[0]
        assert not torch.allclose(plain, want, atol=0.1)

        divided = divide(model, cut)
        out, cache = divided.full(x, t, **steered, **made)
        assert torch.equal(out, want)
        apart = edgediff.split(model.unet, cut, features=len(features))
        assert torch.equal(apart.full(x, t, **steered, **{name_of_list: features})[0], want)
        high = {key: value for key, value in made.items() if key in divided.highres_in.inputs}
        assert torch.equal(divided.cached(x, t, cache, **steered, **made)[0], out)  # the identity, of the same step
        off = {key: torch.zeros_like(value) for key, value in made.items()}
        assert torch.equal(divided.full(x, t, **steered, **off)[0], plain)
    assert [*high, *(key for key in divided.lowres.inputs if key in made)] == list(made)
    with pytest.raises(UnsupportedError, match=rf"divide it with split\(unet, features={len(features)}\)"):
        edgediff.split(model.unet, cut).full(x, t, **steered, **{name_of_list: features})


def test_a_unet_has_so_many_places() -> None:
    unet = edgediff.load_model(saved("sd1")).unet
    with pytest.raises(UnsupportedError, match="the UNet takes 3 features of a T2I-Adapter; got 4"):
        edgediff.split(unet, features=4)


def test_features_may_be_kept_for_further_generations() -> None:
    """Made once, they are handed over as embeddings of a prompt are; a row each, or one for all."""
    pipe = ours("sd1", "ddim", "torch", adapter="full_adapter")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "controlnet_conditioning_scale": 0.5}
    adapter = pipe.components.session("t2i_adapter")
    pixels = np.asarray(picture(3), dtype=np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    tensors = {"control_image": adapter.put(np.ascontiguousarray(pixels))}
    adapter.run(adapter.graphs[0], tensors)
    features = {name: adapter.get(tensors[name]) for name in ("t2i_adapter_0", "t2i_adapter_1")}
    by_picture = pipe(**asked, control_image=picture(3))
    by_features = pipe(**asked, control_features=features)
    np.testing.assert_array_equal(by_features.latents, by_picture.latents)
    assert "t2i_adapter" not in by_features.stages
    several = pipe(**asked, control_image=[picture(), picture(3)]).latents
    alone = pipe(**asked, control_image=picture(3), first_image=1).latents
    np.testing.assert_allclose(several[1:], alone, rtol=0, atol=1e-4)


def test_a_grey_picture_is_pillows() -> None:
    """An adapter of one channel, as those for sketches and edges of Stable Diffusion 1.x."""
    model = edgediff.load_model(saved("sd1"), t2i_adapter=saved_t2i_adapter("sd1", in_channels=1))
    assert model.t2i_adapter is not None
    assert model.t2i_adapter.graph(16, 16).inputs[0].shape == ("batch", 1, 32, 32)
    from edgediff_runtime.pictures import as_shares

    colours = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    from PIL import Image

    grey = np.asarray(Image.fromarray(colours[0]).convert("L"), np.float32) / np.float32(255)
    np.testing.assert_array_equal(as_shares(colours, 1)[0, 0], grey)


@pytest.mark.long
def test_the_bundle_has_the_adapter_as_a_component() -> None:
    bundle = exported_pipeline("sd1", adapter="full_adapter", sizes=ADAPTED_SIZES)
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    cost = manifest.cost
    assert cost["t2i_adapter"].macs > 0
    assert cost["full"].macs == sum(cost[part].macs for part in ("highres_in", "lowres", "highres_out"))
    target = manifest.target("onnx")
    component = target.components["t2i_adapter"]
    assert component.stage == "image"
    assert [t.name for t in component.graphs[0].inputs] == ["control_image"]
    assert target.unet.model is None
    taken = [[t.name for t in graph.inputs if t.name.startswith("t2i_")] for graph in target.unet.graphs]
    assert taken == [["t2i_adapter_0", "t2i_adapter_1"], ["t2i_adapter_0"]]
    model = edgediff.load_model(saved("sd1"), t2i_adapter=saved_t2i_adapter("sd1"))
    assert model.t2i_adapter is not None
    assert manifest.source.components["t2i_adapter"] == model.t2i_adapter.sha256
    assert manifest.source.t2i_adapter == str(saved_t2i_adapter("sd1"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "target", "backend"), [("sd1", "onnx", "onnxruntime"), ("sd1", "coreml", "mil-reference")]
)
def test_pictures_of_several_sizes_are_adapted(name: str, target: str, backend: str) -> None:
    """Graphs of any size, or a function for each; an export verifies both sizes."""
    bundle = exported_pipeline(name, targets=(target,), adapter="full_adapter", sizes=ADAPTED_SIZES)
    pipe = open_pipeline(open_bundle(bundle), backend, low_memory=True)
    model = ours(name, "dpmpp_2m", "torch", adapter="full_adapter")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "control_image": picture()}
    tall = pipe(**asked, height=48)
    assert tall.images.shape == (1, 48, 32, 3)
    assert tall.stages["t2i_adapter"] > 0
    assert psnr_db(model(**asked).latents, pipe(**asked).latents) >= 35


@pytest.mark.long
def test_the_command_lines_draw_by_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    edges, bundle = tmp_path / "edges.png", exported_pipeline("sd1", adapter="full_adapter", sizes=ADAPTED_SIZES)
    picture().save(edges)
    by_picture = ("--control", edges, "--control-scale", 0.7, "--prompt", PROMPT)
    assert exit_code(monkeypatch, "run", bundle, *by_picture, "-o", tmp_path / "drawn.npy") == 0
    done = subprocess.run(
        [sys.executable, "-m", "edgediff_runtime", *map(str, (bundle, *by_picture, "-o", tmp_path / "again.npy"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn, again = np.load(tmp_path / "drawn.npy"), np.load(tmp_path / "again.npy")
    np.testing.assert_allclose(drawn, again, rtol=0, atol=1e-4)
    expected = EdgePipeline.from_pretrained(bundle)(
        prompt=PROMPT, control_image=picture(), controlnet_conditioning_scale=0.7
    )
    np.testing.assert_allclose(drawn, expected.latents, rtol=0, atol=1e-4)
    shown = command("inspect", str(bundle), "--json")
    assert json.loads(shown.out)["gflops"]["t2i_adapter"] > 0
    both = ("--control", saved_controlnet("sd1"), "--t2i-adapter", saved_t2i_adapter("sd1"))
    assert_error(command("export", *map(str, (saved("sd1"), "-o", tmp_path / "two", *both))), "steered by one of them")


@pytest.mark.parametrize(
    ("adapter", "asked", "message"),
    [
        (None, {"control_image": picture()}, "but the bundle has neither a ControlNet nor a T2I-Adapter"),
        (None, {"controlnet_conditioning_scale": 0.5}, "but there is no ControlNet and no T2I-Adapter; leave it out"),
        (None, {"control_features": {}}, "were given, and the bundle was exported without a T2I-Adapter"),
        ("full_adapter", {"controlnet_conditioning_scale": 0.5}, "without a control_image; give one"),
        ("full_adapter", {"control_image": picture(), "controlnet_conditioning_scale": -1}, "a finite number from 0"),
        ("full_adapter", {"control_image": np.zeros((8, 8, 3), np.uint8)}, "control_image has 8 x 8 pixels"),
        ("full_adapter", {"control_image": [picture()] * 2, "num_images": 3}, "has 2 pictures for 3 images"),
        ("full_adapter", {"control_image": picture(), "control_features": {}}, "were given, and a control_image"),
        ("full_adapter", {"control_features": {"t2i_adapter_0": np.zeros((1, 16, 16, 16))}}, "t2i_adapter_1 of shape"),
        ("full_adapter", {"control_features": 3}, "control_features: added_cond is a int; expected arrays by name"),
    ],
)
def test_what_cannot_steer_is_refused(adapter: str | None, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours("sd1", "ddim", "torch", adapter=adapter)(prompt=PROMPT, **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: {"outputs": graph.outputs[:1]}, r"outputs of t2i_adapter is \[\('t2i_adapter_0', 16\)\]"),
        (lambda graph: {"inputs": (replace(graph.inputs[0], name="sample"),)}, "inputs of t2i_adapter is .*'sample'"),
        (lambda graph: {"inputs": graph.inputs * 2}, "inputs of t2i_adapter is .*; expected one"),
    ],
)
def test_a_manifest_with_another_adapter_is_refused(change: Callable[[Any], dict[str, Any]], message: str) -> None:
    manifest = ours("sd1", "ddim", "torch", adapter="full_adapter").manifest
    (target,) = manifest.targets
    component = target.components["t2i_adapter"]
    check_manifest(manifest)
    graph = replace(component.graphs[0], **change(component.graphs[0]))
    other = target.with_component("t2i_adapter", replace(component, graphs=(graph,)))
    with pytest.raises(BundleError, match=message):
        check_manifest(replace(manifest, targets=(other,)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shutil.rmtree, ModelError, "is no directory; expected a T2I-Adapter that diffusers saved"),
        (changed(_class_name="ControlNetModel"), UnsupportedError, "'ControlNetModel'; supported: T2IAdapter"),
        (changed(adapter_type="style"), UnsupportedError, "adapter_type 'style'; supported: full_adapter, full_adap"),
        (changed(in_channels=4), UnsupportedError, "has in_channels 4; supported: 3, 1"),
        (changed(channels=[16, 64]), ModelError, r"its features are 16/2, 64/4, the model takes 16/2, 32/4 \(channels"),
        (
            changed(channels=[16, 32, 32, 32]),
            ModelError,
            "is for another UNet: its features are 16/2, 32/4, 32/8, 32/16",
        ),
        (changed(adapter_type="full_adapter_xl"), ModelError, "is for another UNet"),
        (changed(channels=[]), ModelError, "config.json cannot be built"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), ModelError, "weights"),
    ],
)
def test_what_is_no_adapter_of_this_base_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(saved_t2i_adapter("sd1"), tmp_path / "adapter"))
    change(folder)
    with pytest.raises(error, match=message):
        edgediff.load_model(saved("sd1"), t2i_adapter=folder)


def test_a_unet_without_text_takes_no_adapter() -> None:
    with pytest.raises(UnsupportedError, match="a UNet2DModel takes no T2I-Adapter; supported: UNet2DConditionModel"):
        edgediff.load_model("grocery-32", t2i_adapter=saved_t2i_adapter("sd1"))


def test_an_adapter_of_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="is for another UNet"):
        edgediff.load_model(saved("sd1-levels"), t2i_adapter=saved_t2i_adapter("xl-levels", "full_adapter_xl"))


def test_damaged_weights_are_found_when_they_are_read(tmp_path: Path) -> None:
    from edgediff.models.components import pipeline_components

    folder = Path(shutil.copytree(saved_t2i_adapter("sd1"), tmp_path / "adapter"))
    next(folder.glob("*.safetensors")).write_bytes(b"x")
    found = pipeline_components(edgediff.load_model(saved("sd1"), t2i_adapter=folder))
    with pytest.raises(ModelError, match="cannot be read"):
        found["t2i_adapter"].load()


def test_an_adapter_beside_a_controlnet_is_refused() -> None:
    both = {"control": saved_controlnet("sd1"), "t2i_adapter": saved_t2i_adapter("sd1")}
    with pytest.raises(ConfigError, match=r"a ControlNet, .* and a T2I-Adapter, .* were given; give one of them"):
        edgediff.load_model(saved("sd1"), **both)
    with pytest.raises(ConfigError, match="'control' and 't2i_adapter' are both named"):
        check_config(edgediff.ExportConfig(control=(str(both["control"]),), t2i_adapter=str(both["t2i_adapter"])))


def test_a_recipe_whose_adapter_was_not_loaded_is_refused(tmp_path: Path) -> None:
    config = config_of("sd1", adapter="full_adapter")
    with pytest.raises(ConfigError, match=r"'t2i_adapter' is .* was not loaded with; pass t2i_adapter= to load_model"):
        edgediff.export_bundle(edgediff.load_model(saved("sd1")), tmp_path / "bundle", config)


def test_a_recipe_that_leaves_the_adapter_out_is_refused(tmp_path: Path) -> None:
    model = edgediff.load_model(saved("sd1"), t2i_adapter=saved_t2i_adapter("sd1"))
    config = edgediff.ExportConfig(components=("vae_decoder",))
    with pytest.raises(ConfigError, match="but 'components' has no t2i_adapter; name it there too"):
        edgediff.export_bundle(model, tmp_path / "bundle", config)
