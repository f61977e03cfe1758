"""The bundle's pipeline in torch against diffusers' own: the same prompt, latents and sampler, a few steps at clock 1.

The loop, the encoding of the prompt, the source's settings and the decoder add up to a picture. It is compared with
that of the class which the source names, so that a setting that was misread shows before anything is written.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from edgediff.bundle.psnr import psnr_db
from edgediff.errors import VerificationError
from edgediff.models.components import TEXT_ENCODERS, PipelineComponent
from edgediff.models.load import Model
from edgediff.models.model_files import read_json
from edgediff.models.sampling import diffusers_scheduler
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.models.torch_session import TorchSession
from edgediff.models.undivided import undivided_session
from edgediff_runtime import EdgePipeline, Manifest, make_scheduler
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.loop import initial_latents
from edgediff_runtime.pipeline import DECODER
from edgediff_runtime.sessions import Session

# Few, since each is an undivided step of a model that may be large; three, so that a multistep sampler has its second
# order.
STEPS = 3
FLOOR_DB = 60.0
TEXT_TO_IMAGE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")


def can_compare(model: Model, components: Mapping[str, PipelineComponent], draft: Manifest) -> bool:
    """Whether diffusers has a pipeline that draws the same: from text alone, without fresh noise on its way."""
    index = model.home / "model_index.json"
    kind = read_json(index).get("_class_name") if index.exists() else None
    encoders = () if draft.prompt is None else draft.prompt.encoders
    wanted = {DECODER, *(encoder.component for encoder in encoders)}
    draws_alone = not make_scheduler(draft.scheduler, STEPS).needs_noise
    return kind in TEXT_TO_IMAGE and bool(encoders) and wanted <= components.keys() and draws_alone


@torch.no_grad()
def check_against_diffusers(
    model: Model,
    components: Mapping[str, PipelineComponent],
    draft: Manifest,
    scheduler: str,
    prompt: Mapping[str, Any],
) -> None:
    """Draws one picture by both.

    Args:
        scheduler: The sampler's name in the recipe.
        prompt: ``prompt`` and ``negative_prompt``.

    Raises:
        VerificationError: The pictures differ.
    """
    assert draft.prompt is not None
    names = [*(encoder.component for encoder in draft.prompt.encoders), DECODER]
    parts = {name: components[name].load() for name in names}
    sessions: dict[str, Session] = {
        name: TorchSession({name: part}, (components[name].graph,)) for name, part in parts.items()
    }
    tokenizers = source_tokenizers(components, draft.prompt)
    alone = dataclasses.replace(model, control=(), t2i_adapter=None)  # diffusers' pipeline of text has neither
    ours = EdgePipeline(
        draft, Components.of({UNET: undivided_session(alone), **sessions}), lambda: tokenizers, warn=False
    )
    guidance, seed = draft.operating_point.guidance_scale, int(draft.operating_point.seed)
    given = {"num_inference_steps": STEPS, "guidance_scale": guidance, **prompt}
    pixels = ours(seed=seed, clock=1, **given).pixels
    assert pixels is not None

    theirs = _diffusers_pipeline(model, components, parts, diffusers_scheduler(model.scheduler, scheduler))
    sample = draft.sample
    latents = initial_latents(seed, 1, (sample.channels, sample.height, sample.width), 1.0)
    if model.embedding:  # it looks for a token of several vectors in the prompt as it is written
        given |= {name: None if text is None else text.lower() for name, text in prompt.items()}
    with warnings.catch_warnings(action="ignore"):  # diffusers' own deprecations
        size = {"height": pixels.shape[2], "width": pixels.shape[3]}
        drawn = theirs(latents=torch.from_numpy(latents), output_type="np", **size, **given).images
    number = psnr_db(drawn, np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))
    if number < FLOOR_DB:
        raise VerificationError(
            f"{model.name}: the picture differs from that of diffusers' {type(theirs).__name__}: {number:.1f} dB, "
            f"expected {FLOOR_DB:g}"
        )


def _diffusers_pipeline(
    model: Model, components: Mapping[str, PipelineComponent], parts: Mapping[str, Any], scheduler: Any
) -> Any:
    """The source's own pipeline class over the modules that are loaded already."""
    kind = getattr(diffusers, read_json(model.home / "model_index.json")["_class_name"])
    given: dict[str, Any] = {"unet": model.unet, "vae": parts[DECODER].vae, "scheduler": scheduler}
    for name in TEXT_ENCODERS:
        if name in parts:
            given[name] = parts[name].encoder
            given[name.replace("text_encoder", "tokenizer")] = components[name].tokenizer
    optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    optional |= {"image_encoder": None, "add_watermarker": False}
    optional["force_zeros_for_empty_prompt"] = read_json(model.home / "model_index.json").get(
        "force_zeros_for_empty_prompt", True
    )
    taken = inspect.signature(kind.__init__).parameters
    pipeline = kind(**given, **{name: value for name, value in optional.items() if name in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
