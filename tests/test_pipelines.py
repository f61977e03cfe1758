"""A prompt goes in and a picture comes out, as diffusers' own pipeline draws it; over torch, and over ONNX graphs."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import SEED, Pair, exported_pipeline, guided_embeds, open_in_diffusers, open_in_torch, reference_embeds

from edgediff_runtime import EdgePipeline, noise

PROMPT, NEGATIVE = "a photo of a red apple", "dog, bad photo"
FLOOR_DB = 60.0
LONG = "a red apple and a dog in a photo, " * 8  # 104 tokens

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Open = Callable[[str], Pair]


@pytest.fixture(scope="module", params=["torch", pytest.param("onnx", marks=pytest.mark.long)])
def pair(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a small pipeline in our runtime and in diffusers, once for all tests."""
    opened: dict[str, Pair] = {}

    def open_pair(name: str) -> Pair:
        if name not in opened:
            on_torch = request.param == "torch"
            ours = open_in_torch(name) if on_torch else EdgePipeline.from_pretrained(exported_pipeline(name), threads=1)
            opened[name] = Pair(ours, open_in_diffusers(name))
        return opened[name]

    yield open_pair
    opened.clear()


NAMES = pytest.mark.parametrize("name", ["sd1", "sd2", "xl"])


@NAMES
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_picture_is_diffusers_own(pair: Open, name: str, guidance: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": guidance}
    assert pair(name).psnr(asked) >= FLOOR_DB
    assert pair(name).psnr({**asked, "negative_prompt": NEGATIVE}) >= FLOOR_DB


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_a_latent_consistency_model(pair: Open, monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    draws = itertools.count(1)

    def fresh(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        draw = next(draws)
        return torch.from_numpy(np.stack([noise(SEED, shape[1:], image=i, draw=draw) for i in range(shape[0])]))

    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", fresh)
    asked = {"prompt": [PROMPT, "a dog"], "guidance_scale": guidance}
    assert pair("lcm").psnr(asked, images=2) >= FLOOR_DB
    assert next(draws) == 8  # none for the last step


@NAMES
def test_two_prompts_at_once(pair: Open, name: str) -> None:
    asked = {"prompt": [PROMPT, "a dog"], "negative_prompt": [NEGATIVE, ""], "guidance_scale": 5.0}
    assert pair(name).psnr(asked, images=2) >= FLOOR_DB


@NAMES
def test_prompts_that_are_longer_than_the_text_encoder_takes(pair: Open, name: str) -> None:
    both = pair(name)
    pieces, negative = [(LONG, 1.0)], [("bad dog photo, " * 20, 1.0)]
    want = guided_embeds(both.theirs, pieces, negative)
    assert want["prompt_embeds"].shape[1] == want["negative_prompt_embeds"].shape[1] == 2 * 77
    asked: dict[str, Any] = {"prompt": LONG, "negative_prompt": negative[0][0], "guidance_scale": 5.0}
    assert both.psnr(asked, {**want, "guidance_scale": 5.0}) >= FLOOR_DB


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
