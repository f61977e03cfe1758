"""Small pipelines in our runtime, over torch or over exported graphs, beside diffusers' own."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import exported, saved_once
from diffusers import DiffusionPipeline
from embeddings import TOKENS, load_in_diffusers, save_embedding
from loras import diffusers_lora, fuse, kohya_lora
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from tiny_pipelines import EDITORS, SAVE, save_controlnet, save_t2i_adapter, save_tiny_vae

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.export.draft import draft_manifest
from edgediff.models.components import pipeline_components
from edgediff.models.graphs import divide, graph_list
from edgediff.models.sampling import diffusers_scheduler
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.models.torch_session import TorchSession
from edgediff.models.undivided import undivided_session
from edgediff_runtime import EdgePipeline, noise
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.loop import initial_latents
from edgediff_runtime.sessions import Session

CONFIG = edgediff.ExportConfig(steps=8, scheduler="dpmpp_2m", verify=VerifyConfig(mode="graphs"))
# A latent consistency model is of no use with another sampler than its own.
CONFIGS = {"lcm": replace(CONFIG, scheduler="lcm")}
SEED = 3
# How strongly a LoRA is fused, by whose names its file has.
SCALES = {"diffusers": 0.8, "kohya": -0.5}
Loras = tuple[str, ...]
# Textual inversions, by their numbers of vectors.
Embeddings = tuple[int, ...]


def saved(name: str) -> Path:
    """The folder of a small pipeline, saved by diffusers; its text encoders' states have a mean, as trained ones do.

    Emphasis restores that mean, which magnifies rounding where it is nearly 0.
    """

    def save(folder: Path) -> None:
        {**SAVE, **EDITORS}[name](folder)
        for file in sorted(folder.glob("text_encoder*/model.safetensors")):
            weights = load_file(file)
            (bias,) = [each for each in weights if each.endswith("final_layer_norm.bias")]
            save_file({**weights, bias: weights[bias] + 0.5}, file, {"format": "pt"})

    return saved_once(f"tiny-{name}-with-mean", save)


def saved_tiny_vae() -> Path:
    """The folder of a small TAESD for any of them."""
    return saved_once("tiny-taesd", save_tiny_vae)


def saved_controlnet(name: str, seed: int = 8) -> Path:
    """The folder of a small ControlNet for a pipeline."""
    return saved_once(f"tiny-{name}-controlnet-{seed}", lambda folder: save_controlnet(folder, saved(name), seed))


def saved_controlnets(name: str, count: int) -> tuple[str, ...]:
    """The folders of several."""
    return tuple(str(saved_controlnet(name, 8 + 100 * i)) for i in range(count))


def saved_t2i_adapter(name: str, kind: str = "full_adapter", in_channels: int = 3) -> Path:
    """The folder of a small T2I-Adapter for a pipeline."""
    return saved_once(
        f"tiny-{name}-{kind}-{in_channels}", lambda folder: save_t2i_adapter(folder, kind, saved(name), in_channels)
    )


def lora_file(name: str, kind: str) -> Path:
    """A LoRA for a pipeline, of its UNet and text encoders, by the names of `kind`."""

    def save(folder: Path) -> None:
        folder.mkdir()
        if kind == "kohya":
            kohya_lora(saved(name), folder / "pytorch_lora_weights.safetensors")
        else:
            diffusers_lora(saved(name), folder)

    return saved_once(f"tiny-{name}-{kind}-lora", save) / "pytorch_lora_weights.safetensors"


def embedding_file(name: str, count: int) -> Path:
    """A textual inversion of that many vectors for a pipeline."""

    def save(folder: Path) -> None:
        folder.mkdir()
        save_embedding(folder / "learned_embeds.safetensors", count, is_xl=name == "xl")

    return saved_once(f"tiny-{name}-embedding-{count}", save) / "learned_embeds.safetensors"


def config_of(
    name: str, loras: Loras = (), embeddings: Embeddings = (), control: int = 0, adapter: str | None = None
) -> edgediff.ExportConfig:
    """The recipe of a small pipeline, with LoRAs, textual inversions of so many vectors, and so many ControlNets."""
    specs = tuple(f"{lora_file(name, kind)}:{SCALES[kind]}" for kind in loras)
    learnt = tuple(f"{embedding_file(name, count)}:{TOKENS[count]}" for count in embeddings)
    nets = saved_controlnets(name, control)
    config = replace(CONFIGS.get(name, CONFIG), lora=specs, embedding=learnt, control=nets)
    return config if adapter is None else replace(config, t2i_adapter=str(saved_t2i_adapter(name, adapter)))


def changed(**settings: Any) -> Callable[[Path], None]:
    """What changes settings in the config.json of a folder."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


def exported_pipeline(
    name: str,
    loras: Loras = (),
    targets: tuple[str, ...] = ("onnx",),
    embeddings: Embeddings = (),
    control: int = 0,
    adapter: str | None = None,
    **settings: Any,
) -> Path:
    """Its bundle; tests leave it as it is."""
    config = replace(config_of(name, loras, embeddings, control, adapter), targets=targets, **settings)
    return exported(saved(name), config, {})


def open_in_torch(
    name: str,
    loras: Loras = (),
    low_memory: bool = False,
    opened: Callable[[Session], None] | None = None,
    preview: Path | None = None,
    embeddings: Embeddings = (),
    control: int = 0,
    adapter: str | None = None,
    injection: bool = False,
    lora_rank: int | None = None,
) -> EdgePipeline:
    """Our runtime over the source's own modules; each session that is opened is shown to `opened`.

    The UNet is the undivided one; with what steers it, or where it injects, it is divided, as a bundle has it.
    """
    config = config_of(name, loras, embeddings, control, adapter)
    loaded = edgediff.load_model(
        saved(name), lora=config.lora, embedding=config.embedding, preview=preview, control=config.control,
        t2i_adapter=config.t2i_adapter,
    )  # fmt: skip
    model = dataclasses.replace(loaded, injects=injection)
    found = pipeline_components(model)
    divided = divide(model, config.cut, lora_rank=lora_rank)
    draft = draft_manifest(model, divided, config, "prompt", found)

    def unet() -> Session:
        if control or adapter or injection or lora_rank is not None:
            return TorchSession(divided.parts, graph_list(divided, model))
        session = undivided_session(model)
        session.graphs = tuple(graph.with_any_text() for graph in session.graphs)
        return session

    def open_session(component: str) -> Session:
        session: Session
        if component == UNET:
            session = unet()
        else:
            session = TorchSession({component: found[component].load()}, (found[component].graph,))
        if opened is not None:
            opened(session)
        return session

    graphs = {UNET: unet().graphs, **{component: (each.graph,) for component, each in found.items()}}
    assert draft.prompt is not None
    words = source_tokenizers(found, draft.prompt)
    return EdgePipeline(draft, Components(graphs, open_session, keep=not low_memory), lambda: words)


def open_in_diffusers(name: str, loras: Loras = (), embeddings: Embeddings = ()) -> Any:
    """diffusers' pipeline with the sampler of the bundle; LoRAs and textual inversions as diffusers loads them."""
    theirs = DiffusionPipeline.from_pretrained(saved(name))
    for kind in loras:
        fuse(theirs, lora_file(name, kind), SCALES[kind])
    for count in embeddings:
        load_in_diffusers(theirs, embedding_file(name, count), TOKENS[count])
    theirs.scheduler = diffusers_scheduler(edgediff.load_model(saved(name)).scheduler, config_of(name).scheduler)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@dataclass
class Pair:
    """The same pipeline twice."""

    ours: EdgePipeline
    theirs: Any

    def psnr(self, ours: dict[str, Any], theirs: dict[str, Any] | None = None, images: int = 1) -> float:
        """PSNR of our pictures against theirs of the same latents and noise, 8 steps, each of them full; in dB.

        Args:
            theirs: What diffusers is asked for instead of what we are.
        """
        pixels = self.ours(seed=SEED, num_inference_steps=8, clock=1, **ours).pixels
        assert pixels is not None
        sample = self.ours.manifest.sample
        latents = initial_latents(SEED, images, (sample.channels, sample.height, sample.width), 1.0)
        asked = ours if theirs is None else theirs
        draws = itertools.count(1)

        def fresh(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
            draw = next(draws)
            return torch.from_numpy(np.stack([noise(SEED, shape[1:], image=i, draw=draw) for i in range(shape[0])]))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", fresh)
            made = self.theirs(num_inference_steps=8, latents=torch.from_numpy(latents), output_type="np", **asked)
        assert next(draws) == (8 if self.ours.manifest.scheduler.draws_noise else 1)  # none for the last step
        assert made.images.shape == (images, *pixels.shape[2:], 3)
        return psnr_db(made.images, np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))


Pieces = Sequence[tuple[str, float]]


@torch.no_grad()
def reference_embeds(theirs: Any, pieces: Pieces, clip_skip: int = 0) -> dict[str, torch.Tensor]:
    """What a prompt of weighted pieces comes to, in plain torch: by the names of diffusers' arguments.

    Every 75 tokens, two less than the encoder takes, are a chunk between the marks of beginning and end, each encoded
    alone; weights multiply states, and the mean of the chunk's states is restored.
    """
    is_xl = hasattr(theirs, "text_encoder_2")
    words, encoders = [theirs.tokenizer], [theirs.text_encoder]
    if is_xl:
        words, encoders = [*words, theirs.tokenizer_2], [*encoders, theirs.text_encoder_2]
    features, pooled = [], None
    for tokenizer, encoder in zip(words, encoders, strict=True):
        ids = [(i, weight) for text, weight in pieces for i in tokenizer(text, add_special_tokens=False).input_ids]
        states, size = [], tokenizer.model_max_length - 2
        for start in range(0, max(len(ids), 1), size):
            chunk = ids[start : start + size]
            rest = size - len(chunk)
            row = [tokenizer.bos_token_id, *(i for i, _ in chunk), tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * rest
            out = encoder(torch.tensor([row]), output_hidden_states=True)
            if is_xl:
                state = out.hidden_states[-2 - clip_skip]
            else:
                state = out.hidden_states[-1 - clip_skip]
                norm = getattr(encoder, "text_model", encoder).final_layer_norm
                state = norm(state)
            weights = torch.tensor([1.0, *(weight for _, weight in chunk), 1.0, *[1.0] * rest])
            weighted = state * weights[None, :, None]
            states.append(weighted * state.mean() / weighted.mean())
            if is_xl and start == 0 and encoder is theirs.text_encoder_2:
                pooled = out.text_embeds
        features.append(torch.cat(states, dim=1))
    embeds = {"prompt_embeds": torch.cat(features, dim=-1)}
    return embeds if pooled is None else {**embeds, "pooled_prompt_embeds": pooled}


def guided_embeds(theirs: Any, pieces: Pieces, negative: Pieces, clip_skip: int = 0) -> dict[str, torch.Tensor]:
    """Both prompts, by the names of diffusers' arguments."""
    against = reference_embeds(theirs, negative, clip_skip)
    return reference_embeds(theirs, pieces, clip_skip) | {f"negative_{name}": each for name, each in against.items()}
