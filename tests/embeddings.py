"""Textual inversions of random vectors for small pipelines, and how diffusers loads them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import WIDTH

from edgediff.models.textual_inversion import PARTS

# By the number of vectors.
TOKENS = {1: "<cat-toy>", 3: "style"}


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    """Vectors somewhat longer than those of a small text encoder's own tokens, as learnt ones are."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(10 * count + seed)) / 20


def save_embedding(file: Path, count: int, is_xl: bool) -> Path:
    """As most files are: vectors under the token's name, of SDXL under those of its text encoders."""
    if is_xl:
        save_file({part: vectors(count, seed) for seed, part in enumerate(PARTS.values())}, file)
    else:
        save_file({TOKENS[count]: vectors(count)}, file)
    return file


def load_in_diffusers(pipe: Any, file: Path, token: str) -> None:
    """Adds a file's vectors to each text encoder of diffusers' pipeline."""
    state = load_file(file)
    if len(state) == 1:
        pipe.load_textual_inversion(str(file.parent), weight_name=file.name, token=token)
        return
    for encoder, part in PARTS.items():
        words = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        pipe.load_textual_inversion(state[part], token=token, text_encoder=getattr(pipe, encoder), tokenizer=words)
