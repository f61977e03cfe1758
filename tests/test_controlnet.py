"""A ControlNet beside the UNet: diffusers' picture at clock 1, residuals that stay on cached steps, off without one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from edits import BACKENDS, EACH_STRENGTH, FLOOR_DB, PROMPT, SAMPLERS, against, ours, picture, theirs
from pipelines import changed, exported_pipeline, saved, saved_controlnet, saved_controlnets

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.controlnet import ControlNet, ControlNets
from edgediff.models.graphs import divide
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline, RequestError
from edgediff_runtime.manifest import Graph, Sample, Tensor, graphs_at
from edgediff_runtime.manifest_json import parse_manifest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(pytest.param("sd1", name, marks=[pytest.mark.long] * (name != "pndm")) for name in SAMPLERS),
        pytest.param("xl", "pndm", marks=pytest.mark.long),
    ],
)
def test_a_controlnet(name: str, sampler: str) -> None:
    kind = (
        diffusers.StableDiffusionXLControlNetPipeline if name == "xl" else diffusers.StableDiffusionControlNetPipeline
    )
    asked = {"prompt": PROMPT, "guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8}
    pipe, other = ours(name, sampler, "torch", control=True), theirs(name, sampler, kind)
    assert (
        against(pipe, other, {**asked, "control_image": picture()}, {"image": picture()}, ("control_image",))
        >= FLOOR_DB
    )


@pytest.mark.parametrize(
    ("name", "backend", "sampler"),
    [
        ("sd1", "torch", "pndm"),
        *(pytest.param("sd1", "onnxruntime", name, marks=pytest.mark.long) for name in SAMPLERS),
        pytest.param("xl", "torch", "pndm", marks=pytest.mark.long),
    ],
)
def test_several_controlnets(name: str, backend: str, sampler: str) -> None:
    kind = diffusers.StableDiffusionControlNetPipeline
    if name == "xl":
        kind = diffusers.StableDiffusionXLControlNetPipeline
    images, asked = [picture(), picture(3)], {"prompt": PROMPT, "guidance_scale": 5.0}
    asked["controlnet_conditioning_scale"] = [1.0, 0.5]
    pipe, other = ours(name, sampler, backend, control=2), theirs(name, sampler, kind, control=2)
    assert against(pipe, other, {**asked, "control_image": images}, {"image": images}, ("control_image",)) >= FLOOR_DB


def test_some_of_several_controlnets_may_be_left_out() -> None:
    pipe, first = ours("sd1", "ddim", "torch", control=2), ours("sd1", "ddim", "torch", control=1)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "clock": 2}
    alone = first(**asked, control_image=picture(), controlnet_conditioning_scale=0.5).latents
    left = pipe(**asked, control_image=[picture(), None], controlnet_conditioning_scale=0.5)
    np.testing.assert_allclose(left.latents, alone, rtol=0, atol=1e-5)
    off = pipe(**asked, control_image=[picture(), picture(3)], controlnet_conditioning_scale=[0.5, 0]).latents
    np.testing.assert_allclose(off, alone, rtol=0, atol=1e-5)
    none = pipe(**asked, control_image=[None, None])
    assert all("controlnet" not in step.ms for step in none.ledger)
    np.testing.assert_allclose(none.latents, pipe(**asked).latents, rtol=0, atol=0)
    both = pipe(**asked, control_image=[[picture(), picture(3)], picture(3)]).latents
    second = pipe(**asked, control_image=[picture(3), picture(3)], first_image=1).latents
    np.testing.assert_allclose(both[1:], second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_residuals_of_several_are_added_up_as_diffusers_does(name: str) -> None:
    model = edgediff.load_model(saved(name), control=saved_controlnets(name, 2))
    nets = diffusers.MultiControlNetModel([each.net for each in model.control])
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([501.0])
    text = torch.randn(2, 77, model.unet.config.cross_attention_dim)
    images = [torch.rand(2, 3, 32, 32) for _ in range(2)]
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)} if name == "xl" else {}
    down, mid = nets(x, t, text, images, [0.7, 0.3], added_cond_kwargs=added or None, return_dict=False)
    given = {"sample": x, "timestep": t, "encoder_hidden_states": text, **added}
    given |= {"control_image": images[0], "control_scale": torch.full((2,), 0.7)}
    given |= {"control_image_2": images[1], "control_scale_2": torch.full((2,), 0.3)}
    part = ControlNets([each.net for each in model.control])
    made = part.run(given)
    assert all(torch.equal(a, b) for a, b in zip(made.values(), [*down, mid], strict=True))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"control_image": picture()},
            "control_image is for one ControlNet, and the bundle has 2; expected a list of 2",
        ),
        ({"control_image": [picture()] * 3}, "control_image has 3 entries, and the bundle has 2; expected a list of 2"),
        (
            {"control_image": [picture()] * 2, "controlnet_conditioning_scale": [1.0]},
            "controlnet_conditioning_scale has 1 entries, and the bundle has 2; expected a list of 2",
        ),
        ({"control_image": [picture(), 3]}, r"control_image\[1\] is int64 \[\]; expected uint8"),
        (
            {"control_image": [[picture()] * 2, [picture()] * 3]},
            r"control_image\[0\] has 2 pictures for 3 images; expected 1 or 3",
        ),
    ],
)
def test_a_wrong_number_for_several_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours("sd1", "ddim", "torch", control=2)(prompt=PROMPT, **asked)


@EACH_STRENGTH
def test_a_controlnet_in_an_edit(strength: float) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "control_image": picture(3), "strength": strength}
    pipe = ours("sd1", "dpmpp_2m", "torch", control=True)
    other = theirs("sd1", "dpmpp_2m", diffusers.StableDiffusionControlNetImg2ImgPipeline)
    asked |= {"guidance_scale": 5.0, "controlnet_conditioning_scale": 1.0}
    assert against(pipe, other, asked) >= FLOOR_DB


@BACKENDS
def test_without_a_control_image_the_controlnet_does_not_run(backend: str) -> None:
    pipe = ours("sd1", "dpmpp_2m", backend, control=2)
    other = theirs("sd1", "dpmpp_2m", diffusers.StableDiffusionPipeline)
    asked = {"prompt": PROMPT, "guidance_scale": 5.0}
    assert against(pipe, other, asked) >= FLOOR_DB
    plain, steered = pipe(**asked, clock=2), pipe(**asked, clock=2, control_image=[picture(), None])
    assert all("controlnet" not in step.ms for step in plain.ledger)
    assert [("controlnet" in step.ms) for step in steered.ledger] == [step.full for step in steered.ledger]
    off = pipe(**asked, clock=2, control_image=[picture(), None], controlnet_conditioning_scale=0)
    np.testing.assert_allclose(off.latents, plain.latents, rtol=0, atol=1e-5)


def test_guidance_may_end_on_a_cached_step() -> None:
    """The conditional rows of the residuals stay, of each image its own."""
    pipe = ours("sd1", "ddim", "torch", control=True)
    asked: dict[str, Any] = {"prompt": [PROMPT, "a dog"], "control_image": [picture(), picture(3)], "clock": 2}
    asked |= {"num_inference_steps": 4}
    ends = pipe(**asked, guidance_scale=[2.0, 1.0, 1.0, 1.0])
    assert [step.guided for step in ends.ledger] == [True, False, False, False]
    assert ends.mask == (1, 0, 1, 0)
    for i in range(2):
        alone = {"prompt": asked["prompt"][i], "control_image": asked["control_image"][i], "first_image": i}
        single = pipe(**{**asked, **alone}, guidance_scale=[2.0, 1.0, 1.0, 1.0])
        np.testing.assert_allclose(single.latents[0], ends.latents[i], rtol=0, atol=1e-4)


def test_residuals_stay_for_cached_steps() -> None:
    """By diffusers' parts: what the ControlNet made in a full step is added in the cached one after it."""
    pipe = ours("sd1", "ddim", "torch", control=True)
    steps = list(
        pipe.stream(prompt=PROMPT, control_image=picture(), clock=2, num_inference_steps=2, guidance_scale=1.0)
    )
    model = edgediff.load_model(saved("sd1"), control=saved_controlnet("sd1"))
    divided = divide(model, edgediff.Cut())
    full, cached = (step.tensors[0] for step in steps)
    again = divided.controlnet.run({**full, "sample": cached["sample"], "timestep": cached["timestep"]})
    residuals = {name: full[name] for name in again}
    assert any((again[name] != residuals[name]).any() for name in again)
    cond = {name: cached[name] for name in divided.inputs if name not in ("sample", "timestep")}
    out, _ = divided.cached(cached["sample"], cached["timestep"], cached["cache"], **cond, **residuals)
    assert torch.equal(out, cached["out_sample"])


@pytest.mark.long
@pytest.mark.parametrize("steering", [{"control": 1}, {"adapter": "full_adapter"}])
def test_graphs_in_fp16_are_steered(steering: dict[str, Any]) -> None:
    """Pictures, scales and features are handed over in float32, as the sample is."""
    bundle = exported_pipeline("sd1", onnx=OnnxConfig(dtype="fp16"), **steering)
    half, exact = EdgePipeline.from_pretrained(bundle, threads=1), ours("sd1", "dpmpp_2m", "torch", **steering)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "clock": 2, "guidance_scale": 5.0}
    for more in ({"control_image": picture()}, {}):
        assert psnr_db(exact(**asked, **more).latents, half(**asked, **more).latents) >= 35


@pytest.mark.parametrize("cut", [edgediff.Cut(), edgediff.Cut(point="after_upsample"), edgediff.Cut(point="block:1")])
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_a_divided_unet_takes_residuals_as_diffusers_does(name: str, cut: edgediff.Cut) -> None:
    model = edgediff.load_model(saved(name), control=saved_controlnet(name))
    torch.manual_seed(0)
    width = model.unet.config.cross_attention_dim
    x, t, text, image = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([501.0]),
        torch.randn(2, 77, width),
        torch.rand(2, 3, 32, 32),
    )
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)} if name == "xl" else None
    down, mid = model.control[0].net(x, t, text, image, 0.7, added_cond_kwargs=added, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    want = model.unet(x, t, text, added_cond_kwargs=added, **residuals, return_dict=False)[0]

    part = ControlNet(model.control[0].net)
    steered = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    scale = torch.full((2,), 0.7)
    made, _ = divide(model, cut).full(x, t, **steered, control_image=image, control_scale=scale)
    assert torch.equal(made, want)
    apart = edgediff.split(model.unet, cut, takes_control=True)
    out, cache = apart.full(x, t, **steered, **residuals)
    assert torch.equal(out, want)
    assert torch.equal(apart.cached(x, t, cache, **steered, **residuals)[0], out)  # the identity, of the same step
    high = [name for name in apart.highres_out.inputs if name.startswith("control_")]
    low = [name for name in apart.lowres.inputs if name.startswith("control_")]
    assert [*high, *low] == list(part.outputs)
    without, hint = edgediff.split(model.unet, cut), r"divide it with split\(unet, takes_control=True\)"
    with pytest.raises(UnsupportedError, match=hint):
        without.full(x, t, **steered, **residuals)
    with pytest.raises(UnsupportedError, match=hint):
        without.cached(x, t, cache, **steered, mid_block_additional_residual=mid)


@pytest.mark.long
def test_the_bundle_counts_the_controlnet_in_full_steps() -> None:
    bundle = exported_pipeline("sd1", control=2)
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    cost = manifest.cost
    parts = ("controlnet", "highres_in", "lowres", "highres_out")
    assert cost["full"].macs == sum(cost[part].macs for part in parts)
    assert cost["cached"].macs == sum(cost[part].macs for part in ("highres_in", "adaptor", "highres_out"))
    unet = manifest.target("onnx").unet
    assert [graph.name for graph in unet.graphs] == ["controlnet", "full", "cached"]
    assert unet.model is None
    taken = [[t.name for t in graph.inputs if t.name.startswith("control_")] for graph in unet.graphs]
    assert taken == [
        ["control_image", "control_scale", "control_image_2", "control_scale_2"],
        ["control_2", "control_3", "control_mid", "control_0", "control_1"],
        ["control_0", "control_1"],
    ]
    nets = edgediff.load_model(saved("sd1"), control=saved_controlnets("sd1", 2)).control
    stored = {name: hash for name, hash in manifest.source.components.items() if name.startswith("controlnet")}
    assert [*stored.values()] == [net.sha256 for net in nets]


@pytest.mark.parametrize(
    ("control", "asked", "message"),
    [
        (
            False,
            {"control_image": picture()},
            "control_image was given, but the bundle has neither a ControlNet nor a T2I-Adapter",
        ),
        (False, {"controlnet_conditioning_scale": 0.5}, "but there is no ControlNet and no T2I-Adapter; leave it out"),
        (True, {"control_image": picture(), "controlnet_conditioning_scale": [0.5]}, "expected a finite number from 0"),
        (True, {"controlnet_conditioning_scale": 0.5}, "without a control_image; give one"),
        (True, {"control_image": picture(), "controlnet_conditioning_scale": -1}, "expected a finite number from 0"),
        (True, {"control_image": picture(), "controlnet_conditioning_scale": 1e300}, "expected a finite number from 0"),
        (True, {"control_image": np.zeros((8, 8, 3), np.uint8)}, r"control_image has 8 x 8 pixels \(width x height\)"),
        (True, {"control_image": [picture()] * 2, "num_images": 3}, "has 2 pictures for 3 images; expected 1 or 3"),
    ],
)
def test_what_cannot_steer_is_refused(control: bool, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours("sd1", "ddim", "torch", control=control)(prompt=PROMPT, **asked)


def test_as_many_images_as_control_images_are_given() -> None:
    pipe = ours("sd1", "ddim", "torch", control=True)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2}
    several = pipe(**asked, control_image=[picture(), picture(3)]).latents
    alone = pipe(**asked, control_image=picture(3), first_image=1).latents
    np.testing.assert_allclose(several[1:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shutil.rmtree, ModelError, "is no directory; expected a ControlNet that diffusers saved"),
        (changed(_class_name="UNet2DModel"), UnsupportedError, "is of class 'UNet2DModel'; supported: ControlNetModel"),
        (changed(cross_attention_dim=64), ModelError, "its cross_attention_dim is 64, the model's 32"),
        (changed(controlnet_conditioning_channel_order="bgr"), UnsupportedError, "supported: 'rgb'"),
        (changed(global_pool_conditions=True), UnsupportedError, "has global_pool_conditions True; supported: False"),
        (changed(norm_num_groups=3), ModelError, "config.json cannot be built"),
        (changed(conditioning_channels=4), ModelError, "config.json"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), ModelError, "weights"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x"), ModelError, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_controlnet_of_this_base_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(saved_controlnet("sd1"), tmp_path / "controlnet"))
    change(folder)
    with pytest.raises(error, match=message):
        edgediff.load_model(saved("sd1"), control=folder)


def test_a_controlnet_of_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="is for another UNet: its cross_attention_dim is 64, the model's 32"):
        edgediff.load_model(saved("sd1"), control=saved_controlnet("xl"))


def test_a_graph_of_any_size_tells_the_usual_one_in_numbers() -> None:
    """A control image is read at that size, and zeros are made of it."""
    any_size = Tensor("control_image", "float32", ("batch", 3, "2*height", "2*width"))
    graph = Graph("controlnet", "controlnet.onnx", "full_step", (any_size,), ())
    sample = Sample(channels=4, in_channels=4, height=16, width=24, space="latent", multiple=2)
    for height, width in ((16, 24), (18, 24)):
        (found,) = graphs_at((graph,), (), sample, height, width) or ()
        assert found.inputs[0].shape == ("batch", 3, 2 * height, 2 * width)
    assert graphs_at((graph,), (), sample, 17, 24) is None
