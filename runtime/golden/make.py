"""Records the traces that every runtime is checked against; run it to rewrite this folder's JSON.

Constraints that shaped this file:

- Scheduler traces come from diffusers itself; its own state never leaves it, so a trace shows each step's
  input and output, and a runtime is asked for one step at a time (teacher-forced).
- Everything is drawn by ``edgediff_runtime.noise``, and numbers are written with the digits that float32
  needs and no more, so the files are the same wherever they are made, and small enough to read.
"""

import base64
import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import shutil
import sys
import tempfile
import unittest.mock
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import loop_cases
import manifest_cases
import msgspec
import numpy as np
import safetensors.torch
import torch

import edgediff
from edgediff.export.draft import draft_manifest, with_defaults
from edgediff.models.components import pipeline_components
from edgediff.models.sampling import diffusers_scheduler, scheduler_config
from edgediff.targets.base import Sizes
from edgediff_runtime import EdgePipeline
from edgediff_runtime.image import to_uint8
from edgediff_runtime.inversion import inverse_scheduler
from edgediff_runtime.low_rank import DOWN, FORMAT, PREFIX, UP, parsed, spread_over_inputs
from edgediff_runtime.manifest import Encoder, File, LoraInputs, LoraLayer, Tensor
from edgediff_runtime.manifest_json import render_manifest
from edgediff_runtime.noise import noise, philox
from edgediff_runtime.prompt import tokenized
from edgediff_runtime.schedulers import SchedulerConfig
from edgediff_runtime.text_encoding import Tokenizer

FOLDER = Path(__file__).parent
SHAPE = (1, 2, 4, 4)
# Beyond it float32 itself leaves a whole trajectory less than 1e-5.
TRAJECTORY_SIGMA_MAX = 200.0

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
# As a model directory has it: DDPM knows no clipping after the last step.
SD15_SAVED = {key: value for key, value in SD15.items() if key != "set_alpha_to_one"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading", "clip_sample": False}
PNDM = {**SD15, "skip_prk_steps": True}
V = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}
ZERO_SNR = {**SD15, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


class Case(NamedTuple):
    """One trace to record: a diffusers configuration, the scheduler's name, N, eta if it is not the sampler's own."""

    source: Mapping[str, Any]
    name: str
    steps: int
    eta: float | None = None
    shape: tuple[int, ...] = SHAPE

    def config(self) -> SchedulerConfig:
        """The runtime's settings."""
        config = scheduler_config(self.source, self.name)
        return config if self.eta is None else msgspec.structs.replace(config, eta=self.eta)


CASES = {
    "ddim_sd15_1": Case(SD15, "ddim", 1),
    "ddim_sd15_2": Case(SD15, "ddim", 2),
    "ddim_sd15_8": Case(SD15, "ddim", 8),
    "ddim_sd15_20": Case(SD15, "ddim", 20),
    "ddim_sd15_sample_8": Case({**SD15, **SAMPLE}, "ddim", 8),
    "ddim_sd15_eta1_8": Case(SD15, "ddim", 8, eta=1.0),
    "ddim_ddpm_clip_8": Case({}, "ddim", 8),
    "ddim_ddpm_clip_eta_linspace_7": Case({"timestep_spacing": "linspace"}, "ddim", 7, eta=0.5),
    "ddim_cosine_v_8": Case({**COSINE, **V}, "ddim", 8),
    "ddim_zero_snr_v_8": Case(ZERO_SNR, "ddim", 8),
    "dpmpp_2m_sd15_1": Case(SD15, "dpmpp_2m", 1),
    "dpmpp_2m_sd15_2": Case(SD15, "dpmpp_2m", 2),
    "dpmpp_2m_sd15_8": Case(SD15, "dpmpp_2m", 8),
    "dpmpp_2m_sd15_20": Case(SD15, "dpmpp_2m", 20),
    "dpmpp_2m_sd15_sample_8": Case({**SD15, **SAMPLE}, "dpmpp_2m", 8),
    "dpmpp_2m_sigma_min_14": Case({**SD15, "final_sigmas_type": "sigma_min"}, "dpmpp_2m", 14),
    "dpmpp_2m_sigma_min_16": Case({**SD15, "final_sigmas_type": "sigma_min"}, "dpmpp_2m", 16),
    "dpmpp_2m_ddpm_linspace_8": Case({}, "dpmpp_2m", 8),
    "dpmpp_2m_cosine_v_8": Case({**COSINE, **V}, "dpmpp_2m", 8),
    "dpmpp_2m_cosine_clipped_8": Case({**COSINE, "lambda_min_clipped": -5.1}, "dpmpp_2m", 8),
    "dpmpp_2m_zero_snr_v_8": Case(ZERO_SNR, "dpmpp_2m", 8),
    "dpmpp_2m_karras_sd15_2": Case(SD15, "dpmpp_2m_karras", 2),
    "dpmpp_2m_karras_sd15_8": Case(SD15, "dpmpp_2m_karras", 8),
    "dpmpp_2m_karras_sd15_20": Case(SD15, "dpmpp_2m_karras", 20),
    "dpmpp_2m_karras_repeats_20": Case({"num_train_timesteps": 50, **V}, "dpmpp_2m_karras", 20),
    "dpmpp_2m_karras_cosine_v_8": Case({**COSINE, **V}, "dpmpp_2m_karras", 8),
    "euler_sd15_1": Case(SD15, "euler", 1),
    "euler_sd15_2": Case(SD15, "euler", 2),
    "euler_sd15_8": Case(SD15, "euler", 8),
    "euler_sd15_20": Case(SD15, "euler", 20),
    "euler_sd15_sample_8": Case({**SD15, **SAMPLE}, "euler", 8),
    "euler_sd15_karras_8": Case({**SD15, "use_karras_sigmas": True}, "euler", 8),
    "euler_ddpm_linspace_7": Case({"final_sigmas_type": "sigma_min"}, "euler", 7),
    "euler_cosine_trailing_8": Case({**COSINE, "timestep_spacing": "trailing"}, "euler", 8),
    "euler_cosine_v_8": Case({**COSINE, **V}, "euler", 8),
    "euler_zero_snr_v_8": Case(ZERO_SNR, "euler", 8),
}
# Cases of a quarter of the size.
SMALL_CASES = {
    "dpmpp_2m_exponential_8": Case({**SD15, "use_exponential_sigmas": True}, "dpmpp_2m", 8),
    "dpmpp_2m_sde_sd15_8": Case(SD15, "dpmpp_2m_sde", 8),
    "dpmpp_2m_sde_karras_v_16": Case({**SD15, **V}, "dpmpp_2m_sde_karras", 16),
    "pndm_sd15_1": Case(PNDM, "pndm", 1),
    "pndm_sd15_8": Case(PNDM, "pndm", 8),
    "pndm_linspace_v_7": Case({**PNDM, **V, "timestep_spacing": "linspace", "set_alpha_to_one": True}, "pndm", 7),
    "unipc_sd15_1": Case(SD15, "unipc", 1),
    "unipc_sd15_8": Case(SD15, "unipc", 8),
    "unipc_sigma_min_7": Case({**SD15, "final_sigmas_type": "sigma_min", "lower_order_final": False}, "unipc", 7),
    "unipc_beta_sample_8": Case({**SD15, **SAMPLE}, "unipc_beta", 8),
    "unipc_karras_cosine_v_8": Case({**COSINE, **V}, "unipc_karras", 8),
    "unipc_zero_snr_v_8": Case(ZERO_SNR, "unipc", 8),
    "euler_beta_8": Case(SD15, "euler_beta", 8),
    "euler_ancestral_sd15_8": Case(SD15, "euler_ancestral", 8),
    "euler_ancestral_zero_snr_v_4": Case(ZERO_SNR, "euler_ancestral", 4),
    "heun_sd15_1": Case(SD15, "heun", 1),
    "heun_sd15_6": Case(SD15, "heun", 6),
    "heun_clip_karras_v_5": Case({**SD15, **V, "clip_sample": True}, "heun_karras", 5),
    "lcm_sd15_4": Case(SD15, "lcm", 4),
    "lcm_clip_v_2": Case({**SD15, **V, "clip_sample": True, "original_inference_steps": 20}, "lcm", 2),
    "tcd_sd15_4": Case(SD15, "tcd", 4),
    "tcd_v_eta1_4": Case({**SD15, **V}, "tcd", 4, eta=1.0),
    "tcd_sample_eta0_3": Case({**SD15, **SAMPLE}, "tcd", 3, eta=0.0),
}
CASES |= {name: case._replace(shape=(1, 2, 2, 2)) for name, case in SMALL_CASES.items()}

PHILOX = (
    ((0, 0, 0, 0), (0, 0)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
)
NOISE = (
    (0, (1, 3, 4, 4), 0, 0),
    (1, (8,), 0, 0),
    (42, (7,), 3, 0),
    (42, (2, 5), 3, 2),
    (2**32 + 5, (5,), 0, 1),
    (2**64 - 1, (2, 3), 2**32 - 1, 2**32 - 1),
)

# A text encoder that takes few tokens, so that chunks are short, and texts that tokenizers get wrong.
# Its tokenizer has four tokens more: "style" of three vectors, and "EasyNeg".
ENCODER = Encoder(
    "text_encoder", 12, bos=524, eos=525, pad=525, hidden=("last_hidden_state",), expansions=((526, 527, 528),)
)
PROMPTS = (
    "",
    "a red apple",
    " A  RED\tapple\n",
    "it's 12 apples, the dog's!",
    "(photo) of a [red] (apple:1.3)",
    "((a) b:0.5) \\(c\\) \\\\ (d: 1.25 )",
    "(a [b) c] :) (:2) (e:x) ()",
    "re(d) apple",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{COOKING} \N{SNOWMAN}\N{VARIATION SELECTOR-16}",
    "\N{LATIN SMALL LETTER E WITH ACUTE} e\N{COMBINING ACUTE ACCENT} \N{LATIN CAPITAL LETTER I WITH DOT ABOVE}",
    "\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED} \N{ARABIC LETTER SEEN} \N{CJK UNIFIED IDEOGRAPH-732B}",
    "a\0b\N{NO-BREAK SPACE}c<|endoftext|>d",
    "red apple dog photo " * 6,
    "a Style photo, EASYNEG",
    "(style:1.3) restyled, style_1 style_2 style_3, [easyneg]easyne g",
    "red apple dog " * 3 + "style",
)


def trace(case: Case, seed: int = 0) -> dict[str, Any]:
    """What diffusers computes at each step, for made-up model outputs that follow their input.

    Returns:
        The trace, with its arrays as float32 numpy arrays of the case's shape.
    """
    shape = case.shape
    scheduler = diffusers_scheduler(case.source, case.name)
    scheduler.set_timesteps(case.steps)
    if hasattr(scheduler, "set_begin_index"):
        # diffusers looks a first timestep up, and takes the second of two that are equal.
        scheduler.set_begin_index(0)
    config = case.config()

    init_noise_sigma = float(scheduler.init_noise_sigma)
    x_t = noise(seed, shape) * np.float32(init_noise_sigma)
    steps = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(torch.from_numpy(x_t), t).numpy()
        draw = noise(seed, shape, image=1, draw=i + 1)
        model_output = np.float32(0.6) * scaled + np.float32(0.8) * draw
        fresh = noise(seed, shape, draw=i + 1) if config.draws_noise else None
        x_prev = diffusers_step(scheduler, t, model_output, x_t, config, fresh)
        steps.append(
            {
                "x_t": x_t,
                "scaled_input": scaled,
                "model_output": model_output,
                "noise": fresh,
                "x_prev": x_prev,
            }
        )
        x_t = x_prev
    return {
        "config": msgspec.to_builtins(config),
        "num_inference_steps": case.steps,
        "diffusers": diffusers.__version__,
        "hold_trajectory": _sigma_max(scheduler) <= TRAJECTORY_SIGMA_MAX,
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "init_noise_sigma": np.float32(init_noise_sigma),
        "levels": levels(case),
        "shape": list(shape),
        "steps": steps,
    }


def levels(case: Case) -> np.ndarray:
    """What diffusers' ``add_noise`` makes of each step: the shares of x_0 and of noise, float32 [steps, 2]."""
    scheduler = diffusers_scheduler(case.source, case.name)
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    found = []
    scheduler.set_timesteps(case.steps)
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        noised = [scheduler.add_noise(*pair, t[None]).item() for pair in ((one, none), (none, one))]
        found.append(noised)
    return np.array(found, dtype=np.float32)


def diffusers_step(
    scheduler: Any, t: Any, model_output: np.ndarray, x_t: np.ndarray, config: SchedulerConfig, fresh: np.ndarray | None
) -> np.ndarray:
    """A step of diffusers' scheduler, with the fresh noise that it is to draw."""
    # Only some take eta, and only some take noise; the others draw it by a function of their module.
    extra = {"eta": config.eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    module = importlib.import_module(type(scheduler).__module__)
    given = None if fresh is None else torch.from_numpy(fresh)
    with unittest.mock.patch.object(module, "randn_tensor", return_value=given, create=True):
        stepped = scheduler.step(torch.from_numpy(model_output), t, torch.from_numpy(x_t), **extra)
    made: np.ndarray = stepped.prev_sample.numpy()
    return made


def noise_vectors() -> dict[str, Any]:
    """Known answers of the generator and of the normal values made from it."""
    return {
        "philox4x32_10": [
            {
                "counter": _hex(counter),
                "key": _hex(key),
                "words": _hex(philox(np.array(counter, dtype=np.uint32), key)),
            }
            for counter, key in PHILOX
        ],
        # A seed is text: JSON's numbers are exact only below 2**53 where they are read as doubles.
        "noise": [
            {
                "seed": str(seed),
                "shape": list(shape),
                "image": image,
                "draw": draw,
                "values": noise(seed, shape, image, draw),
            }
            for seed, shape, image, draw in NOISE
        ],
    }


def inversions() -> dict[str, Any]:
    """DDIM backwards, call by call, for outputs that follow their input."""
    cases = []
    for name, source, steps, refinements in (
        ("first_guess", SD15, 4, 0), ("refined", SD15, 3, 2), ("v_prediction", {**SD15, **V}, 3, 1),
    ):  # fmt: skip
        config = scheduler_config(source, "ddim")
        inverse = inverse_scheduler(config, steps, refinements)
        x, state, calls = noise(9, (1, 1, 2, 2)), None, []
        for i, timestep in enumerate(inverse.timesteps):
            output = np.float32(0.6) * x + np.float32(0.8) * noise(9, x.shape, image=1, draw=i + 1)
            made, state = inverse.step(i, x, output, state, first=i == 0)
            calls.append({"timestep": timestep, "x": x, "model_output": output, "next": made})
            x = made
        said = {"config": msgspec.to_builtins(config), "num_inference_steps": steps, "refinements": refinements}
        cases.append({"name": name, **said, "shape": list(x.shape), "calls": calls})
    return {"cases": cases}


def low_rank() -> dict[str, Any]:
    """Files of factors, of each dtype, and what graphs are given for some of them."""
    parts = {"highres_in": (LoraLayer("a.to_q", 2, 3),)}
    parts |= {"lowres": (LoraLayer("b.to_q", 2, 2), LoraLayer("b.to_out.0", 3, 2))}
    inputs = LoraInputs(3, parts)
    rng = np.random.default_rng(4)

    def file(dtype: torch.dtype, **layers: tuple[int, int, int]) -> bytes:
        tensors = {}
        for name, (outputs, width, rank) in layers.items():
            for end, shape in ((DOWN, (rank, width)), (UP, (outputs, rank))):
                tensors[f"{PREFIX}{name}{end}"] = torch.from_numpy(rng.normal(size=shape)).to(dtype)
        return safetensors.torch.save(tensors, FORMAT)

    every = {"a.to_q": (3, 2, 1), "b.to_q": (2, 2, 2), "b.to_out.0": (2, 3, 1)}
    infinite = {f"{PREFIX}b.to_q{DOWN}": torch.full((1, 2), np.inf), f"{PREFIX}b.to_q{UP}": torch.ones(2, 1)}
    files = {
        "float32": file(torch.float32, **every),
        "float16": file(torch.float16, **{"b.to_q": (2, 2, 1)}),
        "bfloat16": file(torch.bfloat16, **{"a.to_q": (3, 2, 2)}),
        "rank_4": file(torch.float32, **{"b.to_q": (2, 2, 4)}),
        "another_width": file(torch.float32, **{"b.to_q": (2, 4, 1)}),
        "another_base": file(torch.float32, **{"c.to_q": (2, 2, 1)}),
        "no_input": file(torch.float32, **{"b.ff": (2, 2, 1)}),
        "infinite": safetensors.torch.save(infinite, FORMAT),
        "alone": safetensors.torch.save({f"{PREFIX}b.to_q{DOWN}": torch.ones(1, 2)}, FORMAT),
        "alpha": safetensors.torch.save({f"{PREFIX}b.to_q.alpha": torch.ones(1)}, FORMAT),
        "empty": safetensors.torch.save({}, FORMAT),
        "not_converted": safetensors.torch.save({f"{PREFIX}b.to_q{DOWN}": torch.ones(1, 2)}),
    }
    files["truncated"] = files["float32"][:-1]
    cases = []
    for names, scale in (([], None), (["float32"], None), (["bfloat16"], -0.5), (["float32", "float16"], [2.0, 0.25])):
        case: dict[str, Any] = {"files": names, "scale": scale}
        for dtype in ("float32", "float16"):
            taken = {name: Tensor(name, dtype, shape) for name, shape in inputs.shapes.items()}
            made = spread_over_inputs(inputs, [parsed(files[name], name) for name in names] or None, scale, taken)
            # Numbers of float16 by their bits.
            case[dtype] = {name: array.view(np.uint16) if dtype == "float16" else array for name, array in made.items()}
        cases.append(case)
    refused = [
        {"files": ["rank_4"], "scale": None, "why": "more rank than the graphs take"},
        {"files": ["float32", "float16", "float16"], "scale": None, "why": "more rank together than the graphs take"},
        {"files": ["another_width"], "scale": None, "why": "a layer of another width"},
        {"files": ["another_base"], "scale": None, "why": "a projection that the UNet does not have"},
        {"files": ["no_input"], "scale": None, "why": "a layer that is no input"},
        {"files": ["infinite"], "scale": None, "why": "factors that are not finite"},
        {"files": ["alone"], "scale": None, "why": "one factor of two"},
        {"files": ["alpha"], "scale": None, "why": "a name that no such file has"},
        {"files": ["empty"], "scale": None, "why": "no layers"},
        {"files": ["not_converted"], "scale": None, "why": "a file of another tool"},
        {"files": ["truncated"], "scale": None, "why": "a file that ends too early"},
        {"files": [], "scale": 1.0, "why": "a scale of nothing"},
        {"files": ["float32"], "scale": [1.0, 2.0], "why": "more scales than files"},
    ]
    encoded = {name: base64.b64encode(data).decode() for name, data in files.items()}
    return {"lora": msgspec.to_builtins(inputs), "files": encoded, "cases": cases, "refused": refused}


def pixels() -> dict[str, Any]:
    """Pixels in -1..1 and the bytes that they become: clipped, and rounded half to even in float32."""
    ends = [-2.0, -1.0, 1.0, 1.5]
    halves = [(byte + 0.5) / 255 * 2 - 1 for byte in (0, 1, 2, 3, 126, 127, 128, 253, 254)]
    values = np.array([*ends, *halves, 0.0, -0.0, 1e-8, 0.0039, -0.0039, 0.999, -0.999], dtype=np.float32)
    return {"values": values, "bytes": to_uint8(values.reshape(1, 1, 1, -1)).reshape(-1).tolist()}


def tokens() -> dict[str, Any]:
    """Prompts and their chunks; all of them with emphasis, and one whose brackets are characters."""
    tokenizer = Tokenizer.from_file(FOLDER / "tokens" / "tokenizer.json")
    cases = [(prompt, True) for prompt in PROMPTS] + [(PROMPTS[4], False)]
    return {
        "encoder": msgspec.to_builtins(ENCODER),
        "cases": [
            {
                "prompt": prompt,
                "emphasis": emphasis,
                "chunks": [dataclasses.asdict(chunk) for chunk in tokenized(prompt, tokenizer, ENCODER, emphasis)],
            }
            for prompt, emphasis in cases
        ],
    }


def write(folder: Path) -> None:
    """Writes every golden file but the bundle, and manifests that an export makes, below a folder."""
    for name in ("schedulers", "loop", "manifests", "tokens"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "noise.json").write_text(_dump(noise_vectors()))
    (folder / "uint8.json").write_text(_dump(pixels()))
    (folder / "inversion.json").write_text(_dump(inversions()))
    (folder / "low_rank.json").write_text(_dump(low_rank()))
    if folder != FOLDER:
        shutil.copyfile(FOLDER / "tokens" / "tokenizer.json", folder / "tokens" / "tokenizer.json")
    (folder / "tokens" / "prompts.json").write_text(_dump(tokens()))
    for name, case in CASES.items():
        (folder / "schedulers" / f"{name}.json").write_text(_dump(trace(case)))
    for name, case in loop_cases.CASES.items():
        (folder / "loop" / f"{name}.json").write_text(_dump(loop_cases.document(case)))
    keys = ("manifest", "at", "value", "why")
    bad = [dict(zip(keys, case, strict=True)) for case in manifest_cases.BAD]
    (folder / "manifests" / "bad.json").write_text(_dump({"bad": bad}))


def write_bundle(folder: Path) -> None:
    """Exports a tiny class-conditional UNet with random weights to ``bundle/``, and its pictures to ``bundle.json``.

    Not part of `write`: other versions of the exporter write other bytes of the same graphs.
    """
    request = {"num_images": 2, "label": ["round", "square"], "seed": 5, "guidance_scale": 2.0}
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        unet.save_pretrained("tiny/unet")
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained("tiny/scheduler")
        Path("tiny/classes.json").write_text(json.dumps(["round", "square"]))
        edgediff.export_bundle(edgediff.load_model("tiny"), "bundle", edgediff.ExportConfig(steps=4))
        Path("bundle/evidence/parity.json").unlink()
        result = EdgePipeline.from_pretrained("bundle")(**request)
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        shutil.move("bundle", folder / "bundle")
    # A reader leaves out a target in a format that it does not know.
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    manifest["targets"].append({"target": "tensorflow-9", "components": {"unet": {"flavour": 7}}})
    (folder / "manifests" / "class.json").write_text(json.dumps(manifest, indent=1) + "\n")
    made = {"request": request, "mask": list(result.mask), "images": result.images}
    (folder / "bundle.json").write_text(_dump(made))


def write_text_manifest(path: Path) -> None:
    """The manifest of a tiny text-conditional model in Core ML, fp16, as its export would draft it."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
        in_channels=9, cross_attention_dim=6, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        unet.save_pretrained("text/unet")
        diffusers.DDPMScheduler(**SD15_SAVED).save_pretrained("text/scheduler")
        model = edgediff.load_model("text")
    recipe = edgediff.ExportConfig(steps=4, targets=("coreml",), layout="pair", seed=2**53 + 1)
    config = with_defaults(recipe, model)
    height, width = model.sample_shape[1:]
    sizes = Sizes((height, width), ((2 * height, width),))
    draft = draft_manifest(model, edgediff.split(model.unet), config, "synthetic", {}, sizes=sizes)
    targets = (msgspec.structs.replace(draft.targets[0], specification_version=9),)
    path.write_bytes(render_manifest(msgspec.structs.replace(draft, targets=targets)))


def write_pipeline_manifest(path: Path) -> None:
    """The manifest of a tiny SDXL pipeline in ONNX, of any size, with a preview and low-rank factors as inputs."""
    sys.path.append(str(FOLDER.parents[1] / "tests"))
    from tiny_pipelines import save_tiny_vae, save_xl

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        save_xl(Path("xl"))
        save_tiny_vae(Path("taesd"))
        model = edgediff.load_model("xl", preview="taesd")
        config = with_defaults(edgediff.ExportConfig(steps=4, layout="pair", lora_inputs=2), model)
        height, width = model.sample_shape[1:]
        sizes = Sizes((height, width), ((height, 2 * width),))
        found = pipeline_components(model)
        divided = edgediff.split(model.unet, lora_rank=config.lora_inputs)
        draft = draft_manifest(model, divided, config, "prompt", found, sizes=sizes)
    (entry,) = draft.targets
    files = {}
    for encoder, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        file = f"onnx/{folder}/tokenizer.json"
        entry = entry.with_component(encoder, msgspec.structs.replace(entry.component(encoder), tokenizer=file))
        files[file] = File(size=1, sha256="0" * 64)
    path.write_bytes(render_manifest(msgspec.structs.replace(draft, targets=(entry,), files=files)))


def _sigma_max(scheduler: Any) -> float:
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas.max())
    alpha = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
    return math.sqrt((1 - alpha) / alpha) if alpha > 0 else math.inf


def _hex(words: Any) -> list[str]:
    return [f"{int(word):08x}" for word in words]


def _dump(document: Mapping[str, Any]) -> str:
    """JSON with one entry of a list of objects per line, so that a change shows as the lines it touches."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(_plain(row), allow_nan=False)}" for row in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(_plain(value), allow_nan=False)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    """Arrays as flat lists in C order, float32 as the shortest decimal that reads back the same."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.reshape(-1)]
    if isinstance(value, np.float32):
        return float(str(value))
    if isinstance(value, np.integer):
        return int(value)
    return value


if __name__ == "__main__":
    write(FOLDER)
    write_bundle(FOLDER)
    write_text_manifest(FOLDER / "manifests" / "text.json")
    write_pipeline_manifest(FOLDER / "manifests" / "pipeline.json")
