"""optimum-onnx's pipeline, in an environment of its own: it wants an older transformers than edgediff is built with.

A contender of `against.py` that speaks the engine's lines (edgediff/bench/turns.py) itself. It finds a UNet and a
sampler as diffusers saves them, and ``given.npz`` with embeddings and latents; exports a Stable Diffusion pipeline
around that UNet (text encoder and autoencoder are as small as they can be, and never run); then times a generation for
each line. Versions: optimum-requirements.txt.
"""

import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTStableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def main() -> None:
    """Exports, checks, then generates whenever a line comes in."""
    # What libraries print goes to standard error: answers have their own pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.stdin.readline())["given"]
    folder = Path(given["folder"])
    tensors = {name: torch.from_numpy(value) for name, value in np.load(folder / "given.npz").items()}
    whole_pipeline(folder).save_pretrained(folder / "pipeline")
    main_export(str(folder / "pipeline"), output=folder / "onnx", task="text-to-image", do_validation=False)
    pipe = ORTStableDiffusionPipeline.from_pretrained(folder / "onnx", provider="CPUExecutionProvider")
    pipe.set_progress_bar_config(disable=True)
    request: dict[str, Any] = {name: tensors[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
    request |= {"num_inference_steps": given["steps"], "guidance_scale": given["guidance"], "output_type": "latent"}
    want = np.load(given["want"])
    made = np.asarray(pipe(**request, latents=tensors["latents"].clone()).images)
    near = 20 * np.log10((np.abs(want).max() + 1e-5) / (np.sqrt(np.mean((made - want) ** 2)) + 1e-10))
    wrong = f"clock 1 is {near:.1f} dB of optimum-onnx's" if near < given["same_db"] else ""
    print(json.dumps({"psnr_db": float(near), "says": wrong, "wrong": bool(wrong)}), file=answers, flush=True)
    for _ in sys.stdin:
        start = perf_counter()
        pipe(**request, latents=tensors["latents"].clone())
        print(json.dumps({"parts": {"loop": [1e3 * (perf_counter() - start)]}}), file=answers, flush=True)


def whole_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline that the exporter asks for, around the UNet."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    features = unet.config.cross_attention_dim
    text = CLIPTextConfig(
        vocab_size=3, hidden_size=features, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    words = folder / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), latent_channels=unet.config.in_channels),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
