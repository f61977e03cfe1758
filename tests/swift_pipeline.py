"""Apple's Swift pipeline (apple/ml-stable-diffusion e12202c) in numpy: packages' default functions, in its order.

As there, a model's only input and output are taken whatever they are called, all others by name.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.mil import open_program

Array = np.ndarray[Any, Any]


class SwiftModel:
    """A package that is loaded without a function's name, and handed float32."""

    def __init__(self, folder: Path, name: str) -> None:
        self.function = open_program(folder / f"{name}.mlpackage").function()
        assert {spec.dtype for spec in self.function.inputs.values()} == {"float32"}

    def shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(self.function.inputs[name].shape)

    def __call__(self, **features: Array) -> dict[str, Array]:
        assert {array.dtype.name for array in features.values()} == {"float32"}
        return {name: value.float().numpy() for name, value in self.function.run(features).items()}

    def only(self, array: Array) -> Array:
        """Decoder.swift and Encoder.swift: one input, one output."""
        (given,) = self.function.inputs
        (made,) = self(**{given: array}).values()
        return made


class BPETokenizer:
    """BPETokenizer.swift, for words of plain letters."""

    def __init__(self, folder: Path, pad: str = "<|endoftext|>") -> None:
        self.vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#")]
        assert all(len(pair) == 2 for pair in pairs)
        self.merges = {pair: rank for rank, pair in enumerate(pairs)}
        self.pad = pad

    def __call__(self, text: str, count: int) -> list[int]:
        tokens = ["<|startoftext|>", *(t for word in text.strip().lower().split() for t in self._encode(word))]
        tokens.append("<|endoftext|>")
        tokens += [self.pad] * (count - len(tokens))
        return [self.vocabulary[token] for token in tokens][:count]

    def _encode(self, word: str) -> list[str]:
        tokens = [*word[:-1], f"{word[-1]}</w>"]
        while ranked := [self.merges[pair] for pair in pairwise(tokens) if pair in self.merges]:
            first, second = next(pair for pair, rank in self.merges.items() if rank == min(ranked))
            joined: list[str] = []
            for token in tokens:
                if joined and (joined[-1], token) == (first, second):
                    joined[-1] += token
                else:
                    joined.append(token)
            tokens = joined
        return tokens


class DPMSolverMultistepScheduler:
    """DPMSolverMultistepScheduler.swift with linearly spaced steps, 15 or more."""

    def __init__(self, steps: int) -> None:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float32) ** 2
        products = np.cumprod(1 - betas)
        self.alpha, self.sigma = np.sqrt(products), np.sqrt(1 - products)
        self.lambdas = np.log(self.alpha) - np.log(self.sigma)
        self.timesteps = [int(t + 0.5) for t in np.linspace(0, 999, steps + 1)[1:]][::-1]
        self.outputs: list[Array] = []

    def step(self, noise: Array, t: int, sample: Array) -> Array:
        place = self.timesteps.index(t)
        to = 0 if place == len(self.timesteps) - 1 else self.timesteps[place + 1]
        self.outputs.append((sample - noise * self.sigma[t]) / self.alpha[t])
        h = self.lambdas[to] - self.lambdas[t]
        factor = self.alpha[to] * (np.exp(-h) - 1)
        moved: Array = self.sigma[to] / self.sigma[t] * sample - factor * self.outputs[-1]
        if len(self.outputs) > 1:
            r = (self.lambdas[t] - self.lambdas[self.timesteps[place - 1]]) / h
            moved = moved - 0.5 * factor * (self.outputs[-1] - self.outputs[-2]) / r
        return moved.astype(np.float32)


def draw(folder: Path, prompt: str, latents: Array, steps: int, guidance: float, scale: float, size: float) -> Array:
    """StableDiffusionPipeline.swift and StableDiffusionXLPipeline.swift: a picture [1, 3, H, W] in -1..1."""
    texts, added = (_encode_xl(folder, prompt, size) if (folder / "TextEncoder2.mlpackage").exists()
                    else (_encode(folder, prompt), {}))  # fmt: skip
    hidden = np.ascontiguousarray(texts.transpose(0, 2, 1)[:, :, None])
    unet, scheduler = SwiftModel(folder, "Unet"), DPMSolverMultistepScheduler(steps)
    assert unet.shape("sample")[0] == 2
    for t in scheduler.timesteps:
        both = np.concatenate([latents, latents])
        times = np.array([t, t], dtype=np.float32)
        (noise,) = unet(sample=both, timestep=times, encoder_hidden_states=hidden, **added).values()
        noise = noise[:1] + guidance * (noise[1:] - noise[:1])
        latents = scheduler.step(noise, t, latents)
    return SwiftModel(folder, "VAEDecoder").only((scheduler.outputs[-1] / scale).astype(np.float32))


def _encode(folder: Path, prompt: str) -> Array:
    """TextEncoder.swift."""
    return np.concatenate([_run(folder, "TextEncoder", text)["last_hidden_state"] for text in ("", prompt)])


def _encode_xl(folder: Path, prompt: str, size: float) -> tuple[Array, dict[str, Array]]:
    """TextEncoderXL.swift, twice."""
    hidden, pooled = [], []
    for text in ("", prompt):
        one = _run(folder, "TextEncoder", text)
        two = _run(folder, "TextEncoder2", text, pad="!")
        hidden.append(np.concatenate([one["hidden_embeds"], two["hidden_embeds"]], axis=2))
        pooled.append(two["pooled_outputs"])
        assert "pooled_outputs" in one  # it is taken from both
    geometry = np.array([[size, size, 0, 0, size, size]] * 2, dtype=np.float32)
    return np.concatenate(hidden), {"text_embeds": np.concatenate(pooled), "time_ids": geometry}


def _run(folder: Path, name: str, text: str, pad: str = "<|endoftext|>") -> dict[str, Array]:
    encoder = SwiftModel(folder, name)
    (given,) = encoder.function.inputs
    count = encoder.shape(given)[-1]
    assert count is not None
    ids = BPETokenizer(folder, pad)(text, count)
    return encoder(**{given: np.array([ids], dtype=np.float32)})
