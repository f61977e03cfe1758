"""Prompts that a pipeline refuses, memory that it does not have, and what stays open of a generation that was left."""

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import open_in_torch

from edgediff_runtime import EdgePipeline, RequestError, Step, memory, pipeline
from edgediff_runtime.memory import Usage, available_bytes
from edgediff_runtime.sessions import Session

ASKED: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2, "clock": 1, "guidance_scale": 2.0}
STAGES = {"text_encoder", "unet", "vae_decoder"}


@pytest.fixture(scope="module")
def sd1() -> EdgePipeline:
    return open_in_torch("sd1")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": 5}, "prompt is a int; expected a text, or a list with one for each image"),
        ({"prompt": b"apple"}, "prompt is a bytes; expected a text"),
        ({"prompt": {"a": 1}}, "prompt is a dict; expected a text"),
        ({"prompt": np.array(["a", "b"])}, "prompt is a ndarray; expected a text"),
        ({"prompt": ["a", None]}, "prompt is a NoneType; expected a text"),
        ({"prompt": ["a", b"b"]}, "prompt is a bytes; expected a text"),
        ({"prompt": []}, "prompt is an empty list; expected a text"),
        ({"prompt": ["a", "b"], "num_images": 3}, "prompt has 2 entries for 3 images; expected one each"),
        ({"prompt": ["a"] * 4097}, "num_images is 4097; expected"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 images; expected one each"),
        ({"negative_prompt": 5}, "negative_prompt is a int; expected a text"),
        ({"negative_prompt": []}, "negative_prompt has 0 entries for 1 images; expected one each"),
        ({"prompt": None, "negative_prompt": "a"}, "a negative prompt or a second one was given without a prompt"),
        ({"prompt_2": "a"}, "prompt_2 was given, but the bundle has one text encoder; leave it out"),
        ({"prompt": "\udc00"}, "prompt: character 0 is U+DC00, a lone surrogate; expected valid Unicode"),
        ({"prompt": "(a:11)"}, "prompt: the weight of 'a' is 11; expected 0 to 10"),
        ({"clip_skip": 3}, "clip_skip is 3; expected a whole number from 0 to 2"),
        ({"clip_skip": -1}, "clip_skip is -1; expected"),
        ({"clip_skip": 1.5}, "clip_skip is 1.5; expected"),
        ({"prompt_embeds": np.zeros((1, 77, 32), np.float32)}, "a prompt and its embeddings were given; give one"),
        ({"label": "Apple"}, "label 'Apple' was given, but the model is conditioned on text"),
        ({"first_image": -1}, "first_image is -1; expected a whole number from 0"),
        ({"first_image": "one"}, "first_image is 'one'; expected a whole number from 0"),
        ({"output_type": "pil"}, "output_type is 'pil'; expected image or latent"),
    ],
)
def test_requests_that_a_pipeline_cannot_serve(sd1: EdgePipeline, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        sd1(**{**ASKED, **asked})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_prompt_for_a_bundle_without_text_encoder(sd1: EdgePipeline) -> None:
    alone = EdgePipeline(sd1.manifest, sd1.session)
    with pytest.raises(RequestError, match=r"^the bundle has no text encoder; give embeddings"):
        alone(**ASKED)
    with pytest.raises(RequestError, match=r"^the bundle has no vae_decoder for this backend; it has: unet"):
        alone.decode(np.zeros((1, 4, 16, 16), np.float32))


BAD_LATENTS: dict[str, Any] = {
    "no batch": np.zeros((4, 16, 16), np.float32),
    "none": np.zeros((0, 4, 16, 16), np.float32),
    "channels": np.zeros((1, 3, 16, 16), np.float32),
    "integers": np.zeros((1, 4, 16, 16), int),
    "a number": 3.0,
}


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_latents_that_the_decoder_does_not_take(sd1: EdgePipeline, name: str) -> None:
    with pytest.raises(RequestError, match=r"^latents are .*; expected float32 \[N, 4, 16, 16\]$"):
        sd1.decode(BAD_LATENTS[name])


def test_latents_of_a_size_that_the_decoder_does_not_take(sd1: EdgePipeline) -> None:
    with pytest.raises(RequestError, match=r"^vae_decoder: it has no graphs for 32 x 16 .*; it takes 32 x 32; ask"):
        sd1.decode(np.zeros((1, 4, 8, 16), np.float32))


@pytest.mark.parametrize("name", ["sd1", "lcm"])
def test_images_can_be_drawn_in_parts(name: str) -> None:
    pipe = open_in_torch(name)  # lcm draws fresh noise in every step
    prompts = ["a red apple", "a dog", "a photo"]
    whole = pipe(**{**ASKED, "prompt": prompts}).latents
    later = pipe(**{**ASKED, "prompt": prompts[1:]}, first_image=np.int64(1)).latents
    np.testing.assert_allclose(later, whole[1:], atol=1e-4)
    assert np.abs(later - pipe(**{**ASKED, "prompt": prompts[1:]}).latents).max() > 0.1


def test_latents_are_decoded_apart(sd1: EdgePipeline) -> None:
    whole = sd1(**ASKED)
    latents = sd1(**ASKED, output_type="latent")
    assert (latents.pixels, set(latents.stages)) == (None, {"text_encoder"})
    with pytest.raises(RequestError, match=r"^there are latents and no images"):
        _ = latents.images
    np.testing.assert_array_equal(sd1.decode(latents.latents), whole.pixels)


# Memory.


def test_images_that_memory_does_not_hold(sd1: EdgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 10**6)
    encoded = list[str]()
    monkeypatch.setattr(pipeline.TextStage, "__call__", lambda *_: encoded.append("text"))
    said = r"^num_images is 50: they take 0\.\d GB of memory at least, 0\.0 GB are available; ask for fewer at a time$"
    with pytest.raises(RequestError, match=said):
        sd1(**ASKED, num_images=50)
    assert not encoded
    monkeypatch.undo()
    assert len(sd1(**ASKED, num_images=2).images) == 2


def test_memory_is_not_judged_where_the_system_does_not_tell(
    sd1: EdgePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "available_bytes", lambda: None)
    assert len(sd1(**ASKED, num_images=2).images) == 2


def test_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = available_bytes()
    assert found is not None
    assert found > 2**20
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:   8 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert available_bytes() == 8192
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert available_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.delattr(os, "sysconf")
    assert available_bytes() is None


def test_the_peak_of_each_stage(sd1: EdgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sd1(**ASKED).peak_bytes is None
    result = open_in_torch("sd1", low_memory=True)(**ASKED)
    assert result.peak_bytes is not None
    assert set(result.peak_bytes) == STAGES
    assert min(result.peak_bytes.values()) > 2**20
    assert set(result.stages) == STAGES - {"unet"}
    for missing in ("_CLEAR", "_STATUS"):  # a system that resets no peak, and one that tells nothing
        monkeypatch.setattr(memory, missing, Path("/nowhere/file"))
        usage = Usage(measures_memory=True)
        with usage.stage("unet"):
            pass
        assert set(usage.peak_bytes) == ({"unet"} if missing == "_CLEAR" else set())
        assert usage.ms["unet"] >= 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system resets no peak")
def test_a_peak_is_the_stage_s_own() -> None:
    usage = Usage(measures_memory=True)
    with usage.stage("large"):
        np.ones(2**25).sum()  # 256 MB
    with usage.stage("small"):
        pass
    assert usage.peak_bytes["large"] > usage.peak_bytes["small"] + 2**27


# What stays open.


class Opened:
    """Sessions that were opened, without keeping them."""

    def __init__(self) -> None:
        self.all: list[weakref.ref[Session]] = []

    def __call__(self, session: Session) -> None:
        assert not self.alive  # one component at a time
        self.all.append(weakref.ref(session))

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(session() is not None for session in self.all)


class LeftError(Exception):
    """What a callback raises to leave."""


@pytest.fixture
def opened() -> Opened:
    return Opened()


@pytest.fixture
def frugal(opened: Opened) -> EdgePipeline:
    return open_in_torch("sd1", low_memory=True, opened=opened)


def test_components_are_opened_one_at_a_time_and_dropped(
    sd1: EdgePipeline, frugal: EdgePipeline, opened: Opened
) -> None:
    result = frugal(**ASKED)
    assert (len(opened.all), opened.alive) == (3, 0)
    np.testing.assert_array_equal(result.images, sd1(**ASKED).images)
    frugal(**ASKED)
    assert (len(opened.all), opened.alive) == (6, 0)


def test_a_callback_that_raises_leaves_nothing_open(frugal: EdgePipeline, opened: Opened) -> None:
    steps = list[int]()

    def leave(step: Step) -> None:
        steps.append(step.index)
        raise LeftError

    with pytest.raises(LeftError):
        frugal(**ASKED, callback=leave)
    assert steps == [0]
    assert (len(opened.all), opened.alive) == (2, 0)


def test_a_stream_that_is_closed_leaves_nothing_open(frugal: EdgePipeline, opened: Opened) -> None:
    stream: Any = frugal.stream(**ASKED)
    assert (len(opened.all), opened.alive) == (1, 0)  # the text encoder has run
    step = next(stream)
    assert (step.index, opened.alive) == (0, 1)
    stream.close()
    del step
    assert opened.alive == 0
    frugal.stream(**ASKED).close()  # type: ignore[attr-defined]  # before its first step
    assert opened.alive == 0


def test_the_tensors_of_the_last_step_are_gone_before_the_decoder_is_opened(
    monkeypatch: pytest.MonkeyPatch, frugal: EdgePipeline
) -> None:
    steps = list[weakref.ref[Step]]()
    alive = list[bool]()
    decode = pipeline.decode

    def watched(*args: Any) -> np.ndarray:
        gc.collect()
        alive.extend(step() is not None for step in steps)
        return decode(*args)

    monkeypatch.setattr(pipeline, "decode", watched)
    frugal(**ASKED, callback=lambda step: steps.append(weakref.ref(step)))
    assert alive == [False, False]


@pytest.mark.parametrize("low_memory", [False, True])
def test_one_pipeline_serves_several_threads(sd1: EdgePipeline, low_memory: bool) -> None:
    pipe = open_in_torch("sd1", low_memory=True) if low_memory else sd1
    prompts = ["a red apple", "a dog", "a photo of an apple"]
    alone = [sd1(**{**ASKED, "prompt": prompt}).images for prompt in prompts]
    made: dict[str, np.ndarray] = {}

    def run(prompt: str) -> None:
        made[prompt] = pipe(**{**ASKED, "prompt": prompt}).images

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, images in zip(prompts, alone, strict=True):
        np.testing.assert_array_equal(made[prompt], images)
