"""What torch computes for the components around the UNet: the reference's prompt, and each component's record."""

from collections.abc import Mapping

import numpy as np
import torch

from edgediff.bundle.reference import Reference
from edgediff.models.components import PipelineComponent
from edgediff.models.part import Part
from edgediff.models.torch_pipeline import source_tokenizers, torch_components
from edgediff_runtime import Manifest, noise
from edgediff_runtime.conditioning import Texts
from edgediff_runtime.decoding import to_vae
from edgediff_runtime.image import to_uint8
from edgediff_runtime.manifest import CONTROL_IMAGE, T2I_ADAPTER, Prompt
from edgediff_runtime.pictures import as_shares, images_of
from edgediff_runtime.prompt import tokenized
from edgediff_runtime.text_encoding import TextStage, Tokenizer


def encode_prompt(
    components: Mapping[str, PipelineComponent],
    settings: Prompt,
    prompt: str,
    negative_prompt: str | None,
) -> dict[str, np.ndarray]:
    """The reference's embeddings by tensor names, unconditional ones as ``negative_*``; one row each."""
    stage = TextStage(settings, source_tokenizers(components, settings), torch_components(components, keep=False))
    given, negative = Texts(prompt, negative=negative_prompt).encode(stage, 1, guided=True, any_length=False)
    return given | {f"negative_{name}": value for name, value in negative.items()}


def control_squares(seed: int, height: int, width: int, each: int, number: int = 0) -> np.ndarray:
    """A control picture of coloured squares, uint8 [1, h, w, 3]: one of `each` pixels a side for one of the latent."""
    squares = to_uint8(noise(seed, (1, 3, height, width), image=0, draw=1_001 + number))
    return squares.repeat(each, axis=1).repeat(each, axis=2)


@torch.no_grad()
def control_features(
    components: Mapping[str, PipelineComponent], conditioning: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What a T2I-Adapter makes of the reference's control picture, by tensor names; empty where there is none."""
    if T2I_ADAPTER not in components:
        return {}
    adapter = components[T2I_ADAPTER]
    channels, height, width = map(int, adapter.graph.inputs[0].shape[1:])
    picture = as_shares(images_of(conditioning[CONTROL_IMAGE], height, width, CONTROL_IMAGE), channels)
    made = adapter.load().run({CONTROL_IMAGE: torch.from_numpy(picture)})
    return {name: value.numpy() for name, value in made.items()}


@torch.no_grad()
def record_component(part: Part, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs and outputs of a component, by tensor names."""
    outputs = part.run({name: torch.from_numpy(value) for name, value in inputs.items()})
    return inputs | {name: value.numpy() for name, value in outputs.items()}


def component_inputs(
    component: PipelineComponent, draft: Manifest, tokenizers: Mapping[str, Tokenizer], reference: Reference
) -> dict[str, np.ndarray]:
    """Real inputs of a component: the reference's prompts, its control picture, its final latents, what came of them.

    Of a text encoder also all tokens of its embeddings, whatever the reference's prompts say.

    Where no whole trajectory was run, the latents are noise.
    """
    if component.stage == "prompt":
        assert draft.prompt is not None
        encoder = next(each for each in draft.prompt.encoders if each.component == component.name)
        prompts = ("", "") if draft.evidence.prompt is None else draft.evidence.prompt
        tokenizer = tokenizers[component.name]
        chunks = [tokenized(text or "", tokenizer, encoder)[0].ids for text in prompts]
        if component.embedding:
            learnt = " ".join(each.token for each in component.embedding)
            chunks += [chunk.ids for chunk in tokenized(learnt, tokenizer, encoder, emphasis=False)]
        return {"input_ids": np.array(chunks, dtype=np.int64)}
    if component.stage in ("decode", "preview"):
        vae, sample = draft.vae if component.stage == "decode" else draft.preview, draft.sample
        assert vae is not None
        drawn = noise(int(draft.operating_point.seed), (sample.channels, sample.height, sample.width), image=0)[None]
        latents = drawn if reference.latents is None else reference.latents[:1]
        return {"latent_sample": to_vae(vae, latents).astype(np.float32)}
    if component.name == T2I_ADAPTER:
        channels = int(component.graph.inputs[0].shape[1])
        return {CONTROL_IMAGE: as_shares(reference.conditioning[CONTROL_IMAGE], channels)}
    picture = reference.components["vae_decoder"]["sample"]
    return {"sample": np.clip(picture, -1, 1)}
