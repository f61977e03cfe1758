"""Editing draws what diffusers draws of the same picture, latents and noise; over torch and over ONNX graphs."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from edits import (
    DEPTH,
    EACH_SAMPLER,
    FLOOR_DB,
    PROMPT,
    SAMPLERS,
    SIDE,
    SIZE,
    against,
    each_edit,
    mask,
    ours,
    picture,
    theirs,
    thin,
)
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgediff_runtime import EdgePipeline, RequestError, noise
from edgediff_runtime.components import Components

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FP16_FLOOR_DB = 35.0
FINE_LINES = np.zeros((128, 128))  # between the places that 16 x 16 points are interpolated from
FINE_LINES[::8] = 1


@each_edit(every=("sd1",), once=(("sd1", "onnxruntime"), ("xl", "torch")))
def test_image_to_image(name: str, backend: str, sampler: str, strength: float) -> None:
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if name == "xl" else diffusers.StableDiffusionImg2ImgPipeline
    asked = {"prompt": PROMPT, "image": picture(), "strength": strength, "guidance_scale": 5.0}
    assert against(ours(name, sampler, backend), theirs(name, sampler, kind), asked) >= FLOOR_DB


@each_edit(every=("sd1", "inpaint"), once=(("sd1", "onnxruntime"), ("inpaint", "onnxruntime")))
def test_inpainting(name: str, backend: str, sampler: str, strength: float) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "mask_image": mask(), "strength": strength, "guidance_scale": 5.0}
    other = theirs(name, sampler, diffusers.StableDiffusionInpaintPipeline)
    assert against(ours(name, sampler, backend), other, asked, SIZE) >= FLOOR_DB


@pytest.mark.parametrize(
    ("backend", "sampler"),
    [
        *(pytest.param("torch", name, marks=[pytest.mark.long] * (name != "pndm")) for name in SAMPLERS),
        pytest.param("onnxruntime", "pndm", marks=pytest.mark.long),
    ],
)
def test_instructions(backend: str, sampler: str) -> None:
    asked = {"prompt": "make it red", "image": picture(), "guidance_scale": 5.0, "image_guidance_scale": 1.3}
    other = theirs("pix2pix", sampler, diffusers.StableDiffusionInstructPix2PixPipeline)
    assert against(ours("pix2pix", sampler, backend), other, asked) >= FLOOR_DB


@pytest.mark.parametrize("strength", [0.6, pytest.param(1.0, marks=pytest.mark.long)])
@EACH_SAMPLER
def test_depth(sampler: str, strength: float) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "depth_map": DEPTH, "strength": strength, "guidance_scale": 5.0}
    other = theirs("depth", sampler, diffusers.StableDiffusionDepth2ImgPipeline)
    told = {"depth_map": torch.from_numpy(DEPTH)[None]}
    assert against(ours("depth", sampler, "torch"), other, asked, told) >= FLOOR_DB


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "asked", "same"),
    [
        ("sd1", diffusers.StableDiffusionImg2ImgPipeline, {"strength": 0.6}, {}),
        ("sd1", diffusers.StableDiffusionInpaintPipeline, {"strength": 0.9, "mask_image": mask()}, SIZE),
        ("inpaint", diffusers.StableDiffusionInpaintPipeline, {"mask_image": mask()}, {**SIZE, "strength": 1.0}),
        ("pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline, {}, {}),
    ],
    ids=["image-to-image", "blended", "inpainting", "instructions"],
)
def test_core_ml_in_fp16(name: str, kind: Any, asked: dict[str, Any], same: dict[str, Any]) -> None:
    """Of packages with a fixed batch of 2, which three rows for an image do not divide."""
    told = {"prompt": PROMPT, "image": picture(), "guidance_scale": 5.0, **asked}
    found = against(ours(name, "dpmpp_2m", "mil-reference"), theirs(name, "dpmpp_2m", kind), told, same)
    assert found >= FP16_FLOOR_DB


# --- what a request may say ---


def test_a_clock_is_of_the_steps_that_run() -> None:
    pipe = ours("sd1", "dpmpp_2m", "torch")
    asked = {"prompt": PROMPT, "image": picture(), "num_inference_steps": 8}
    edit = pipe(**asked, strength=0.6, clock=2)
    assert [step.index for step in edit.ledger] == [4, 5, 6, 7]
    assert edit.mask == (1, 0, 1, 0)
    assert pipe(**asked, strength=0.4, clock=2).mask == (1, 0, 1)
    assert pipe(**asked, strength=0.6, clock="1,0,0,0").mask == (1, 0, 0, 0)
    assert set(edit.stages) == {"text_encoder", "vae_encoder", "vae_decoder"}
    last = pipe(**asked, strength=0.6, clock=1, guidance_scale=[5.0, 5.0, 1.0, 1.0])
    assert [step.guided for step in last.ledger] == [True, True, False, False]


@pytest.mark.parametrize(("sampler", "indices"), [("heun", range(8, 15)), ("pndm", range(5, 9)), ("ddim", range(4, 8))])
def test_samplers_of_several_calls_begin_where_the_strength_says(sampler: str, indices: range) -> None:
    edit = ours("sd1", sampler, "torch")(prompt=PROMPT, image=picture(), num_inference_steps=8, strength=0.5, clock=1)
    assert [step.index for step in edit.ledger] == list(indices)


@pytest.mark.parametrize("steered", [False, True])
def test_the_ledger_says_what_the_clock_saved(steered: bool) -> None:
    """Counted by torch while an edit runs, at clock 1 and under a mask."""
    pipe = ours("sd1", "ddim", "torch", control=True)
    asked: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "strength": 0.6, "guidance_scale": 5.0}
    asked |= {"control_image": picture()} if steered else {}
    operations = []
    for clock in (1, "1,0,0,1"):
        counter = FlopCounterMode(display=False)
        prepared, _, usage = pipe._prepare(**asked, clock=clock)
        with counter, sdpa_kernel(SDPBackend.MATH):  # of the CPU's own attention the counter knows nothing
            _, ledger = pipe._denoise(prepared, usage, None)
        operations.append(counter.get_total_flops())
    assert [step.full for step in ledger] == [True, False, False, True]
    saved = pipe(**asked, clock="1,0,0,1").flops_saved
    assert saved == pytest.approx(1 - operations[1] / operations[0], abs=1e-12)
    assert 0.1 < saved < 0.5
    assert pipe(**asked, clock=1).flops_saved == 0


def test_an_edit_of_several_images_is_each_alone() -> None:
    pipe = ours("sd1", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "strength": 0.6, "seed": 5, "clock": 2}
    images = [picture(0), picture(3)]
    both = pipe(**asked, image=images, mask_image=mask())
    for i, image in enumerate(images):
        alone = pipe(**asked, image=image, mask_image=mask(), first_image=i, num_images=1)
        assert np.abs(alone.images[0].astype(int) - both.images[i]).max() <= 1
    one_picture = pipe(**asked, image=images[0], num_images=2)
    assert len(one_picture.images) == 2
    assert (one_picture.images[0] != one_picture.images[1]).any()


EMPTY = np.zeros((1, 4, SIDE // 2, SIDE // 2), np.float32)


@pytest.mark.parametrize(
    ("name", "asked", "count"),
    [
        ("sd1", {"image": [picture(), picture(3)]}, 2),
        ("sd1", {"image": picture(), "mask_image": [mask()] * 3}, 3),
        ("sd1", {"image": [picture()] * 2, "prompt": ["a", "b"]}, 2),
        ("sd1", {"image": picture(), "prompt": ["a", "b"]}, 2),
        ("sd1", {"image": [picture(), picture(3)], "prompt": None, "prompt_embeds": np.ones((1, 77, 32))}, 2),
        ("sd1", {"latents": EMPTY, "prompt": ["a", "b"]}, 2),
        ("sd1", {"latents": np.repeat(EMPTY, 3, axis=0)}, 3),
        ("depth", {"depth_map": [DEPTH, DEPTH]}, 2),
    ],
)
def test_as_many_images_as_pictures_or_latents_are_given(name: str, asked: dict[str, Any], count: int) -> None:
    pipe = ours(name, "ddim", "torch")
    steps: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1, "clock": 1}
    assert len(pipe(**{"prompt": PROMPT, **steps, **asked}).latents) == count


@pytest.mark.parametrize(("name", "asked"), [("pix2pix", {}), ("inpaint", {"mask_image": mask()})])
def test_where_an_edit_begins_with_noise_it_may_be_given(name: str, asked: dict[str, Any]) -> None:
    pipe = ours(name, "euler_ancestral", "torch")
    told: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "num_inference_steps": 3, "seed": 5, **asked}
    own = noise(5, (4, SIDE // 2, SIDE // 2))[None]
    np.testing.assert_array_equal(pipe(**told, latents=own).latents, pipe(**told).latents)
    assert (pipe(**told, latents=2 * own).latents != pipe(**told).latents).any()


def test_a_stream_has_no_picture_to_paste_into() -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "mask_image": mask(), "paste": True}
    with pytest.raises(RequestError, match="paste was given, but steps have latents and no picture"):
        ours("sd1", "ddim", "torch").stream(**asked)


def test_numbers_of_an_edit_may_be_numpys() -> None:
    pipe = ours("sd1", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "mask_image": mask(), "clock": 1}
    numpys = pipe(**asked, strength=np.float64(0.5), paste=np.bool_(True), feather=np.int64(2)).images
    np.testing.assert_array_equal(numpys, pipe(**asked, strength=0.5, paste=True, feather=2).images)


def test_outside_of_a_pasted_mask_every_pixel_is_the_images_own() -> None:
    pipe = ours("sd1", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "image": picture(), "mask_image": mask(), "clock": 1}
    source, inside = np.asarray(picture()), np.asarray(mask()) > 0
    pasted = pipe(**asked, paste=True).images[0]
    drawn = pipe(**asked).images[0]
    assert (pasted[~inside] == source[~inside]).all()
    assert (pasted[inside] == drawn[inside]).all()
    assert (drawn[~inside] != source[~inside]).any()
    soft = pipe(**asked, paste=True, feather=2).images[0]
    assert (soft[~inside] == source[~inside]).all()
    assert (soft[inside] != drawn[inside]).any()


def test_channels_of_ones_own_go_before_those_of_pictures() -> None:
    pipe = ours("inpaint", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "clock": 1, "image": picture(), "strength": 0.6}
    channels = noise(5, (1, 5, SIDE // 2, SIDE // 2))
    made = [pipe(**asked, concat_latents=factor * channels).latents for factor in (1, 2)]
    assert (made[0] != made[1]).any()
    blended = pipe(**asked, concat_latents=channels, mask_image=mask(), paste=True).images[0]
    outside = np.asarray(mask()) == 0
    assert (blended[outside] == np.asarray(picture())[outside]).all()


def test_a_full_mask_draws_everything_anew() -> None:
    pipe = ours("sd1", "ddim", "torch")
    full = Image.new("L", (SIDE, SIDE), 255)
    asked: dict[str, Any] = {"prompt": PROMPT, "clock": 1, "seed": 2}
    masked = pipe(**asked, image=picture(), mask_image=full, paste=True).images
    np.testing.assert_array_equal(masked, pipe(**asked).images)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("sd1", {"strength": 1.1}, r"strength is 1.1; expected 0 \(nothing changes\) to 1"),
        ("sd1", {"strength": -0.1}, "strength is -0.1"),
        ("sd1", {"strength": float("nan")}, "strength is nan"),
        ("sd1", {"strength": "half"}, "strength is 'half'"),
        ("sd1", {"strength": True}, "strength is True"),
        ("sd1", {"strength": 0.1}, r"strength is 0.1: of 8 steps it leaves none; expected 0.125 or more"),
        ("sd1", {"strength": 0}, "strength is 0: of 8 steps it leaves none"),
        ("sd1", {"strength": 0.6, "clock": "1,0,1,0,1,0,1,0"}, "has 8 entries for the last 4 of 8 steps"),
        ("sd1", {"image": None, "strength": 0.5}, r"strength was given without an image; give image= \(--image\) too"),
        ("sd1", {"image": None, "mask_image": mask()}, "mask_image was given without an image"),
        ("sd1", {"paste": True}, "paste was given without a mask"),
        ("sd1", {"feather": 3, "mask_image": mask()}, "feather was given, but nothing is pasted"),
        ("sd1", {"feather": -1, "paste": True, "mask_image": mask()}, "feather is -1; expected a whole number"),
        ("sd1", {"feather": [2, 3], "paste": True, "mask_image": mask()}, r"feather is \[2, 3\]; expected a whole"),
        ("sd1", {"paste": "no", "mask_image": mask()}, "paste is 'no'; expected True or False"),
        ("sd1", {"paste": True, "mask_image": mask(), "output_type": "latent"}, "there will be latents and no picture"),
        ("sd1", {"mask_image": [mask(), np.asarray(mask())]}, "mask_image has pictures of Pillow's and others in one"),
        ("sd1", {"image": [picture()] * 2, "num_images": 3}, "image has 2 pictures for 3 images; expected 1 or 3"),
        ("sd1", {"image": np.zeros((30, 32, 3), np.uint8)}, r"image has 32 x 30 pixels \(width x height\)"),
        ("sd1", {"mask_image": Image.fromarray(thin())}, "too thin"),
        ("sd1", {"depth_map": np.eye(8)}, "depth_map was given, but the bundle's UNet takes no depth"),
        ("sd1", {"image_guidance_scale": 1.5}, "image_guidance_scale was given, but the bundle's UNet is not guided"),
        ("inpaint", {}, "takes mask and masked image beside the latent; give mask_image="),
        ("inpaint", {"image": None}, "takes mask and masked image beside the latent; give image="),
        ("pix2pix", {"image": None}, "takes image beside the latent; give image="),
        ("pix2pix", {"strength": 0.5}, "begins from noise; give image_guidance_scale="),
        ("pix2pix", {"mask_image": mask()}, "follows instructions for the whole picture"),
        ("pix2pix", {"image_guidance_scale": 1e300}, r"image_guidance_scale is 1e\+300; expected a"),
        ("pix2pix", {"image_guidance_scale": -1}, "image_guidance_scale is -1; expected a finite number from 0"),
        ("depth", {}, "takes depth beside the latent; give depth_map="),
        ("depth", {"depth_map": FINE_LINES}, "the same everywhere at the latent's size; expected a coarser"),
    ],
)  # fmt: skip
def test_an_edit_that_cannot_be_is_refused(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours(name, "ddim", "torch")(**{"prompt": PROMPT, "image": picture(), "num_inference_steps": 8, **asked})


def test_a_bundle_without_an_encoder_says_so() -> None:
    whole = ours("sd1", "ddim", "torch")
    graphs = {name: graphs for name, graphs in whole.components.graphs.items() if name != "vae_encoder"}
    pipe = EdgePipeline(whole.manifest, Components(graphs, whole.components._open_session), whole._tokenizers)
    assert not pipe.can_edit
    with pytest.raises(RequestError, match="the bundle has no vae_encoder for this backend"):
        pipe(prompt=PROMPT, image=picture())
