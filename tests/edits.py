"""Edits of small pipelines in our runtime, beside diffusers' own of the same picture, latents and noise."""

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pipelines import SEED, exported_pipeline, open_in_torch, saved, saved_controlnets, saved_t2i_adapter

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.models.sampling import diffusers_scheduler, scheduler_config
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import EdgePipeline, noise, open_bundle

FLOOR_DB = 60.0
STEPS = 8
PROMPT = "a photo of a red apple"
SIDE = 32  # of the small pipelines' pictures
SIZE = {"height": SIDE, "width": SIDE}
DEPTH = np.add.outer(np.arange(SIDE) ** 2, np.arange(SIDE)).astype(np.float32)
SAMPLERS = ("ddim", "pndm", "dpmpp_2m", "euler_ancestral")
STRENGTHS = (0.3, 0.6, 0.9, 1.0)
# Of each kind one is quick, the others belong to the long half.
EACH_STRENGTH = pytest.mark.parametrize(
    "strength", [pytest.param(each, marks=[pytest.mark.long] * (each != 0.6)) for each in STRENGTHS]
)
# Bundles that several files of tests have in common: tracing is what they take long for.
ADAPTED_SIZES = ("32x32", "32x48")
LORA_AND_INJECTION: dict[str, Any] = {"lora_inputs": 4, "injection": True}
ANCESTRAL = "diffusers.schedulers.scheduling_euler_ancestral_discrete"


def picture(seed: int = 0) -> Image.Image:
    """Coloured shapes, of the size that the small pipelines draw."""
    made = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(made)
    draw.ellipse((4 + seed, 4, 24, 26), fill=(200, 40 + 20 * seed, 30))
    draw.rectangle((14, 2, 17, 9), fill=(40, 120, 40))
    return made


def mask() -> Image.Image:
    made = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(made).rectangle((8, 6, 25, 19), fill=255)
    return made


def thin() -> np.ndarray:
    """A mask of lines between the pixels that the latent's mask takes."""
    lines = np.zeros((SIDE, SIDE), np.uint8)
    lines[1::2] = 255
    return lines


def schedule_of(name: str) -> dict[str, Any]:
    """A small pipeline's noise, without clipping: some of diffusers' pipelines switch that off, others do not."""
    scheduler = edgediff.load_model(saved(name)).scheduler
    assert scheduler is not None
    return {**scheduler.config, "clip_sample": False}


@functools.cache
def _opened(name: str, backend: str, control: int, adapter: str | None, injection: bool) -> EdgePipeline:
    if backend == "torch":
        pipe = open_in_torch(name, control=control, adapter=adapter, injection=injection)
    else:
        target = {"onnxruntime": "onnx", "mil-reference": "coreml"}[backend]
        more: dict[str, Any] = {"sizes": ADAPTED_SIZES} if adapter else {"injection": injection}
        if injection and target == "onnx":
            more = LORA_AND_INJECTION
        bundle = exported_pipeline(name, targets=(target,), control=control, adapter=adapter, **more)
        pipe = open_pipeline(open_bundle(bundle), backend, threads=None if backend == "mil-reference" else 1)
    return pipe


@functools.cache
def ours(
    name: str, sampler: str, backend: str, control: int = 0, adapter: str | None = None, injection: bool = False
) -> EdgePipeline:
    pipe = _opened(name, backend, control, adapter, injection)
    settings = scheduler_config(schedule_of(name), sampler)
    manifest = msgspec.structs.replace(pipe.manifest, scheduler=settings)
    return EdgePipeline(manifest, pipe.components, pipe._tokenizers, warn=False)


class MendedPndm(diffusers.PNDMScheduler):
    """diffusers' PNDM without its slip: its pipelines let it begin on the way with the two calls of the first step.

    They begin one call too early for the strength, and then every step is taken a noise level too low.
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        if self.counter == 1 and self.on_the_way:
            self.counter = 2
        return super().step(*args, **kwargs)


@functools.cache
def load_parts(name: str) -> dict[str, Any]:
    """The components of a small pipeline, as diffusers' classes take them."""
    is_xl = name.startswith("xl")
    kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    none = {} if is_xl else {"safety_checker": None, "feature_extractor": None}
    return dict(kind.from_pretrained(saved(name), **none).components)


def theirs(name: str, sampler: str, kind: Any, adapter: str | None = None, control: int = 1) -> Any:
    scheduler = diffusers_scheduler(schedule_of(name), sampler)
    if sampler == "pndm":
        scheduler = MendedPndm.from_config(scheduler.config)
    parts = load_parts(name)
    parts |= {"requires_safety_checker": False, "safety_checker": None, "feature_extractor": None}
    taken = inspect.signature(kind.__init__).parameters
    parts |= {"depth_estimator": None, "scheduler": scheduler}
    if "controlnet" in taken:
        nets = [diffusers.ControlNetModel.from_pretrained(path) for path in saved_controlnets(name, control)]
        parts["controlnet"] = nets if control > 1 else nets[0]
    if "adapter" in taken:
        parts["adapter"] = diffusers.T2IAdapter.from_pretrained(saved_t2i_adapter(name, adapter))
    pipe = kind(**{part: value for part, value in parts.items() if part in taken})
    pipe.set_progress_bar_config(disable=True)
    if sampler == "pndm" and hasattr(pipe, "get_timesteps"):
        usual = pipe.get_timesteps

        def get_timesteps(*args: Any, **kwargs: Any) -> Any:
            timesteps, count = usual(*args, **kwargs)
            steps = kwargs.get("num_inference_steps", *args[:1])
            pipe.scheduler.on_the_way = count < steps
            return (timesteps[1:] if count < steps else timesteps), count

        pipe.get_timesteps = get_timesteps
    elif sampler == "pndm":
        scheduler.on_the_way = False
    return pipe


def drawn(pipe: Any, count: int, start: int, **asked: Any) -> np.ndarray:
    """diffusers' pictures, [N, h, w, 3] of 0 to 1, with our noise and the encoder's mean."""
    draws: Iterator[int] = itertools.count(start + 1)

    def of_images(draw: int, shape: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([noise(SEED, tuple(shape)[1:], image=i, draw=draw) for i in range(count)]))

    module = type(pipe).__module__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.randn_tensor", lambda shape, **_: of_images(0, shape), raising=False)
        patch.setattr(f"{ANCESTRAL}.randn_tensor", lambda shape, **_: of_images(next(draws), shape))
        retrieve = getattr(sys.modules[module], "retrieve_latents", None)
        if retrieve is not None:
            patch.setattr(f"{module}.retrieve_latents", lambda output, **_: retrieve(output, sample_mode="argmax"))
        made: np.ndarray = pipe(num_inference_steps=STEPS, output_type="np", **asked).images
    return made


def against(
    pipe: EdgePipeline,
    other: Any,
    asked: dict[str, Any],
    same: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> float:
    """PSNR in dB of both pictures of one request; diffusers is told `same`, and nothing of `without`."""
    result = pipe(seed=SEED, num_inference_steps=STEPS, clock=1, **asked)
    pixels = result.pixels
    assert pixels is not None
    told = {name: value for name, value in asked.items() if name not in without} | (same or {})
    made = drawn(other, len(pixels), result.ledger[0].index, **told)
    return psnr_db(made, np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))


BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("onnxruntime", marks=pytest.mark.long)])
EACH_SAMPLER = pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=[pytest.mark.long] * (name != "pndm")) for name in SAMPLERS]
)


def each_edit(every: tuple[str, ...], once: tuple[tuple[str, str], ...]) -> pytest.MarkDecorator:
    """Samplers and strengths for pipelines: each with each over torch, or each once, where a loop has other graphs.

    Args:
        every: Pipelines over torch, with each sampler at each strength.
        once: Pipelines and backends, with each sampler and each strength once.
    """
    cases = [(name, "torch", sampler, strength) for name in every for sampler in SAMPLERS for strength in STRENGTHS]
    cases += [(*case, *pair) for case in once for pair in zip(SAMPLERS, STRENGTHS, strict=True)]
    return pytest.mark.parametrize(
        ("name", "backend", "sampler", "strength"),
        [pytest.param(*c, marks=[pytest.mark.long] * (c[1:] != ("torch", "pndm", 0.6))) for c in cases],
    )
