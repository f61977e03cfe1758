"""A prompt goes in and a picture comes out, as diffusers' own pipeline draws it; over torch, and over ONNX graphs."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import (
    Loras,
    Pair,
    exported_pipeline,
    guided_embeds,
    open_in_diffusers,
    open_in_torch,
    reference_embeds,
)

from edgediff.targets.backends import open_pipeline
from edgediff_runtime import EdgePipeline, open_bundle

PROMPT, NEGATIVE = "a photo of a red apple", "dog, bad photo"
FLOOR_DB = 60.0
LONG = "a red apple and a dog in a photo, " * 8  # 104 tokens

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Open = Callable[..., Pair]


@functools.cache
def opened(backend: str, name: str, loras: Loras = ()) -> Pair:
    """A small pipeline in our runtime and in diffusers, opened once for all tests."""
    if backend == "torch":
        ours = open_in_torch(name, loras)
    else:
        ours = EdgePipeline.from_pretrained(exported_pipeline(name, loras), threads=1)
    return Pair(ours, open_in_diffusers(name, loras))


@pytest.fixture(params=["torch", pytest.param("onnx", marks=pytest.mark.long)])
def pair(request: pytest.FixtureRequest) -> Open:
    """Opens a small pipeline over torch, or over its graphs."""
    return functools.partial(opened, request.param)


# All that graphs of Stable Diffusion 2 have, those of 1 or XL have too; what else is its own, the loop does over torch.
NAMES = pytest.mark.parametrize(
    ("pair", "name"),
    [
        ("torch", "sd1"),
        ("torch", "sd2"),
        ("torch", "xl"),
        pytest.param("onnx", "sd1", marks=pytest.mark.long),
        pytest.param("onnx", "xl", marks=pytest.mark.long),
    ],
    indirect=["pair"],
)
GUIDANCE = pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.long), 5.0])


@NAMES
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_picture_is_diffusers_own(pair: Open, name: str, guidance: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": guidance}
    assert pair(name).psnr(asked) >= FLOOR_DB
    assert pair(name).psnr({**asked, "negative_prompt": NEGATIVE}) >= FLOOR_DB


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_a_latent_consistency_model(pair: Open, guidance: float) -> None:
    """Guidance is told to the UNet, and there is no negative prompt."""
    assert pair("lcm").psnr({"prompt": PROMPT, "guidance_scale": guidance}) >= FLOOR_DB
    assert pair("lcm").psnr({"prompt": [PROMPT, "a dog"], "guidance_scale": guidance}, images=2) >= FLOOR_DB
    want = reference_embeds(pair("lcm").theirs, [(LONG, 1.0)])
    assert want["prompt_embeds"].shape[1] == 2 * 77
    asked = {"prompt": LONG, "guidance_scale": guidance}
    assert pair("lcm").psnr(asked, {**want, "guidance_scale": guidance}) >= FLOOR_DB


@pytest.mark.long
def test_a_latent_consistency_model_in_core_ml() -> None:
    bundle = open_bundle(exported_pipeline("lcm", targets=("coreml",)))
    assert "timestep_cond" in {
        tensor.name for graph in bundle.manifest.target("coreml").unet.graphs for tensor in graph.inputs
    }
    drawn = Pair(open_pipeline(bundle, "mil-reference"), open_in_diffusers("lcm"))
    assert drawn.psnr({"prompt": PROMPT, "guidance_scale": 8.0}) >= 35.0


@pytest.mark.long
@pytest.mark.parametrize(
    ("pair", "name"),
    [("torch", name) for name in ("sd1", "sd2", "xl", "lcm")],
    indirect=["pair"],
)
def test_loras(pair: Open, name: str) -> None:
    """Of diffusers' names and of kohya's, one after the other: fused before anything is exported."""
    with_loras = pair(name, ("diffusers", "kohya"))
    asked = {"prompt": PROMPT, "guidance_scale": 5.0}
    assert with_loras.psnr(asked) >= FLOOR_DB
    assert with_loras.psnr({**asked, "guidance_scale": 1.0}) >= FLOOR_DB
    changed = with_loras.ours(seed=0, **asked).latents - pair(name).ours(seed=0, **asked).latents
    assert np.abs(changed).max() > 0.1


@NAMES
@GUIDANCE
def test_two_prompts_at_once(pair: Open, name: str, guidance: float) -> None:
    asked = {"prompt": [PROMPT, "a dog"], "negative_prompt": [NEGATIVE, ""], "guidance_scale": guidance}
    assert pair(name).psnr(asked, images=2) >= FLOOR_DB


@NAMES
@GUIDANCE
def test_prompts_that_are_longer_than_the_text_encoder_takes(pair: Open, name: str, guidance: float) -> None:
    both = pair(name)
    pieces, negative = [(LONG, 1.0)], [("bad dog photo, " * 20, 1.0)]
    want = guided_embeds(both.theirs, pieces, negative)
    assert want["prompt_embeds"].shape[1] == want["negative_prompt_embeds"].shape[1] == 2 * 77
    asked: dict[str, Any] = {"prompt": LONG, "negative_prompt": negative[0][0], "guidance_scale": guidance}
    assert both.psnr(asked, {**want, "guidance_scale": guidance}) >= FLOOR_DB


@NAMES
def test_prompts_that_are_encoded_before(pair: Open, name: str) -> None:
    """What takes the place of prompts in a request gives the same pictures."""
    ours = pair(name).ours
    asked = {"seed": 3, "num_inference_steps": 2, "clock": 1, "guidance_scale": 5.0, "output_type": "latent"}
    for texts in ({"prompt": [PROMPT, "a dog"]}, {"prompt": LONG, "negative_prompt": NEGATIVE}):
        want = ours(**texts, **asked).latents
        np.testing.assert_array_equal(ours(**ours.encode_prompt(**texts), **asked).latents, want)
    embeds = ours.encode_prompt([PROMPT], clip_skip=np.int64(1))
    assert "time_ids" not in embeds["added_cond"]  # they tell the size, which a request may change
    np.testing.assert_array_equal(ours(**embeds, **asked).latents, ours(prompt=PROMPT, clip_skip=1, **asked).latents)


@NAMES
def test_the_shorter_of_two_prompts_is_padded_with_empty_chunks(pair: Open, name: str) -> None:
    both = pair(name)
    long, short = reference_embeds(both.theirs, [(LONG, 1.0)]), reference_embeds(both.theirs, [("a dog", 1.0)])
    empty = reference_embeds(both.theirs, [("", 1.0)])
    short["prompt_embeds"] = torch.cat([short["prompt_embeds"], empty["prompt_embeds"]], dim=1)
    want = {**long, **{f"negative_{name}": each for name, each in short.items()}, "guidance_scale": 5.0}
    asked = {"prompt": LONG, "negative_prompt": "a dog", "guidance_scale": 5.0}
    assert both.psnr(asked, want) >= FLOOR_DB


WEIGHTED = {
    "a (red:1.3) apple": [("a ", 1.0), ("red", 1.3), (" apple", 1.0)],
    "[a photo] of ((apple))": [("a photo", 1 / 1.1), (" of ", 1.0), ("apple", 1.1 * 1.1)],
    r"a \(red\) (dog:0.5)": [("a (red) ", 1.0), ("dog", 0.5)],
}


@NAMES
@pytest.mark.parametrize("prompt", WEIGHTED)
def test_weights(pair: Open, name: str, prompt: str) -> None:
    both = pair(name)
    want = guided_embeds(both.theirs, WEIGHTED[prompt], [("photo", 1.2)])
    asked = {"prompt": prompt, "negative_prompt": "(photo:1.2)", "guidance_scale": 5.0}
    assert both.psnr(asked, {**want, "guidance_scale": 5.0}) >= FLOOR_DB
    plain = both.ours(seed=3, **asked, emphasis=False).pixels
    assert plain is not None
    assert not np.array_equal(plain, both.ours(seed=3, **asked).pixels)


@NAMES
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(pair: Open, name: str, clip_skip: int) -> None:
    both = pair(name)
    asked: dict[str, Any] = {"prompt": PROMPT, "clip_skip": clip_skip, "guidance_scale": 1.0}
    if name == "xl":  # of others, diffusers looks for a normalization that transformers 5 has elsewhere
        assert both.psnr(asked) >= FLOOR_DB
    want = guided_embeds(both.theirs, [(PROMPT, 1.0)], [(NEGATIVE, 1.0)], clip_skip)
    asked |= {"negative_prompt": NEGATIVE, "guidance_scale": 5.0}
    assert both.psnr(asked, {**want, "guidance_scale": 5.0}) >= FLOOR_DB


def test_the_second_text_encoder_is_told_something_else(pair: Open) -> None:
    asked = {
        "prompt": PROMPT, "prompt_2": "a dog", "negative_prompt": NEGATIVE, "negative_prompt_2": "apple",
        "guidance_scale": 5.0,
    }  # fmt: skip
    assert pair("xl").psnr(asked) >= FLOOR_DB


def test_without_a_negative_prompt_sdxl_is_guided_away_from_zeros(pair: Open) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 5.0}
    both = pair("xl")
    assert both.psnr(asked) >= FLOOR_DB
    assert both.psnr({**asked, "negative_prompt": ""}) >= FLOOR_DB
    zeros, empty = both.ours(seed=0, **asked), both.ours(seed=0, **asked, negative_prompt="")
    assert np.abs(zeros.latents - empty.latents).max() > 1e-3


def test_stable_diffusion_is_guided_away_from_an_empty_prompt(pair: Open) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 5.0, "seed": 0}
    ours = pair("sd1").ours
    np.testing.assert_array_equal(ours(**asked).latents, ours(**asked, negative_prompt="").latents)
