"""Whole pipelines in Core ML packages: as Apple's Swift pipeline calls them, and as edgediff's own loop does."""

from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from artefacts import saved_once
from conftest import Export
from seals import manifest_of, rows_of
from swift_pipeline import SwiftModel, draw
from tiny_pipelines import LATENT, SAVE, SIDE, TOKENS, WIDTH
from transformers import CLIPTextConfig, CLIPTextModel

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.export.half_reference import RoundedPart
from edgediff.mil import open_program
from edgediff.models.components import TextEncoder
from edgediff.targets import TARGETS
from edgediff.targets.base import ComponentJob, Sizes
from edgediff.targets.coreml import CoreMLConfig, half_constants
from edgediff.targets.coreml.swift_pipeline import undivided_graph
from edgediff_runtime import noise
from edgediff_runtime.manifest import Graph, Tensor

PROMPT, STEPS, GUIDANCE, SIZE = "a photo of a red apple dog", 16, 5.0, 1024.0
XL = pytest.param("xl", marks=pytest.mark.long)


@pytest.fixture
def bundle(request: pytest.FixtureRequest, export_once: Export) -> Path:
    config = edgediff.ExportConfig(targets=("coreml",), steps=4)
    return export_once(saved_once(request.param, SAVE[request.param]), config)


def _unet_sizes(name: str) -> dict[str, tuple[int, ...]]:
    if name == "sd1":
        return {"encoder_hidden_states": (2, WIDTH, 1, TOKENS)}
    return {"encoder_hidden_states": (2, 2 * WIDTH, 1, TOKENS), "text_embeds": (2, WIDTH), "time_ids": (2, 6)}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler
@pytest.mark.parametrize(
    ("name", "bundle"), [("sd1", "sd1"), pytest.param("xl", "xl", marks=pytest.mark.long)], indirect=["bundle"]
)
def test_apples_pipeline_draws_diffusers_picture(name: str, bundle: Path) -> None:
    folder = bundle / "coreml"
    unet = SwiftModel(folder, "Unet").function
    latent = {"sample": (2, LATENT, SIDE, SIDE), "timestep": (2,)}
    assert {key: spec.shape for key, spec in unet.inputs.items()} == latent | _unet_sizes(name)
    assert {key: (spec.dtype, spec.shape) for key, spec in unet.outputs.items()} == {
        "noise_pred": ("float32", (2, LATENT, SIDE, SIDE))
    }
    kind = {"sd1": diffusers.StableDiffusionPipeline, "xl": diffusers.StableDiffusionXLPipeline}[name]
    pipe = kind.from_pretrained(saved_once(name, SAVE[name]))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_type="midpoint"
    )
    latents = noise(7, (LATENT, SIDE, SIDE), image=0)[None]
    more: dict[str, Any] = {} if name == "sd1" else {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    want = pipe(
        PROMPT, negative_prompt="", latents=torch.from_numpy(latents), num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, output_type="np", **more,
    ).images.transpose(0, 3, 1, 2)  # fmt: skip
    got = draw(folder, PROMPT, latents, STEPS, GUIDANCE, pipe.vae.config.scaling_factor, SIZE)
    assert want.std() > 0.01
    assert psnr_db(want, np.clip(got / 2 + 0.5, 0, 1)) > 50

    picture = 2 * want - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(torch.from_numpy(picture)).latent_dist.parameters.numpy()
    assert psnr_db(encoded, SwiftModel(folder, "VAEEncoder").only(picture)) > 45


@pytest.mark.long
@pytest.mark.parametrize("bundle", ["sd1", XL], indirect=True)
def test_every_number_of_a_pipeline_is_measured(bundle: Path) -> None:
    rows = {(row["check"], row["part"]): row["psnr_db"] for row in rows_of(bundle) if row["status"] == "measured"}
    target = manifest_of(bundle).target("coreml")
    parts = [name for name in target.components if name != "unet"]
    assert {"text_encoder", "vae_decoder", "vae_encoder"} <= {*parts}
    assert all(rows["graph", part] > 45 and rows["program", part] > 100 for part in [*parts, "highres_in"])
    assert rows["graph", "undivided"] > 45
    assert rows["picture", "pixels"] > 35
    weights = bundle / "coreml/Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert open_program(bundle / "coreml/Unet.mlpackage").default == "undivided"
    parameters = sum(manifest_of(bundle).cost[part].parameters for part in ("highres_in", "lowres", "highres_out"))
    assert weights.stat().st_size < 1.1 * 2 * parameters


@pytest.mark.long
@pytest.mark.parametrize(
    ("system", "act"), [("iOS17", "quick_gelu"), pytest.param("iOS16", "gelu", marks=pytest.mark.long)]
)
def test_token_ids_beyond_those_of_fp16_are_exact(system: Any, act: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=8, hidden_act=act, eos_token_id=49407, **sizes)
    part = TextEncoder(CLIPTextModel(config).eval(), ("last_hidden_state", "clip_skip.1", "pooler_output"))
    # fp16 counts in steps of 2 from 2,048 on, of 32 from 32,768 on.
    ids = np.array([[49406, 2049, 4099, 32769, 49405, 49407, 49407, 49407]])
    states, dtype = ("batch", 8, 16), "float32"
    outputs = (
        Tensor("last_hidden_state", dtype, states),
        Tensor("clip_skip.1", dtype, states),
        Tensor("pooler_output", dtype, ("batch", 16)),
    )
    graph = Graph("text_encoder", "x", None, (Tensor("input_ids", "int64", ("batch", 8)),), outputs)
    target, recipe = TARGETS["coreml"], CoreMLConfig(deployment_target=system)
    entry = target.describe_component("prompt", graph, VerifyConfig(), recipe, Sizes((1, 1)))
    assert entry is not None
    target.write_component(
        ComponentJob(tmp_path, graph.name, entry, part, {"input_ids": ids}, {}, recipe, lambda what: None)
    )
    function = open_program(tmp_path / str(entry.graphs[0].file)).function()
    given = {"input_ids": ids.astype(np.float32)}
    got, exact = function.run(given), function.run(given, rounded=False)
    half = RoundedPart(part, half_constants(system), None)
    with torch.no_grad():
        wanted, sharp = part(torch.from_numpy(ids)), half(torch.from_numpy(ids))
    for tensor, want, want_exact in zip(entry.graphs[0].outputs, wanted, sharp, strict=True):
        assert psnr_db(want.numpy(), got[tensor.stored_name].numpy()) > 45
        assert psnr_db(want_exact.numpy(), exact[tensor.stored_name].numpy()) > 100


def _step(**shapes: tuple[int, ...]) -> Graph:
    given = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 77, 16)} | shapes
    inputs = tuple(Tensor(name, "float32", shape) for name, shape in given.items() if shape)
    return Graph("full", "x", "full_step", inputs, (Tensor("out_sample", "float32", (2, 4, 8, 8)),))


def test_only_what_apples_pipeline_can_call_has_a_function_for_it() -> None:
    whole = undivided_graph((_step(), msgspec.structs.replace(_step(), name="cached", frequency="cached_step")), "y")
    assert whole is not None
    assert {t.name: t.shape for t in whole.inputs}["encoder_hidden_states"] == (2, 16, 1, 77)
    assert undivided_graph((_step(text_embeds=(2, 8), time_ids=(2, 6)),), "y") is not None
    for other in (
        {"timestep_cond": (2, 8)},
        {"class_labels": (2,)},
        {"sample": (2, 9, 8, 8)},
        {"encoder_hidden_states": ()},
    ):
        assert undivided_graph((_step(**other),), "y") is None  # type: ignore[arg-type]
