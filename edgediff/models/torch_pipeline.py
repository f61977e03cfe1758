"""A whole pipeline in torch: prompts in, pictures out, every step full, by the runtime's own loop and its noise."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.errors import UnsupportedError
from edgediff.models.components import PipelineComponent, pipeline_components, prompt_settings, vae_settings
from edgediff.models.load import Model
from edgediff.models.torch_session import TorchSession
from edgediff.models.undivided import undivided_session
from edgediff_runtime import denoise, make_scheduler
from edgediff_runtime.components import Components
from edgediff_runtime.conditioning import Texts, guidance_embedding, time_ids
from edgediff_runtime.decoding import decode
from edgediff_runtime.image import to_uint8
from edgediff_runtime.loop import Request, initial_latents
from edgediff_runtime.manifest import GUIDANCE, Prompt
from edgediff_runtime.schedulers import SchedulerConfig
from edgediff_runtime.sessions import Session
from edgediff_runtime.text_encoding import TextStage, Tokenizer

DECODER = "vae_decoder"


def torch_components(
    components: Mapping[str, PipelineComponent], *, keep: bool, device: torch.device | None = None
) -> Components:
    """The components in torch, each loaded when it is first used; not kept, it is let go after each use."""

    def open_session(name: str) -> Session:
        part = components[name].load().to(torch.device("cpu") if device is None else device)
        return TorchSession({name: part}, (components[name].graph,))

    return Components({name: (each.graph,) for name, each in components.items()}, open_session, keep=keep)


def source_tokenizers(components: Mapping[str, PipelineComponent], prompt: Prompt) -> list[Tokenizer]:
    """The tokenizers of a pipeline's text encoders, as the source has them."""
    return [Tokenizer(components[encoder.component].tokenizer.backend_tokenizer) for encoder in prompt.encoders]


class TorchPipeline:
    """Draws pictures of prompts with a model and the components around it; `size` is their height and width."""

    def __init__(self, model: Model, scheduler: SchedulerConfig, device: torch.device) -> None:
        """Takes a model whose UNet is moved to the device.

        Raises:
            ModelError: A component cannot be read.
            UnsupportedError: It has no text encoder, no decoder for its latents, or takes an image beside the latent.
        """
        found = pipeline_components(model)
        prompt, vae = prompt_settings(model, found), vae_settings(model, found)
        if prompt is None:
            raise UnsupportedError(f"{model.name}: it has no text encoder; give the directory of a whole pipeline")
        if vae is None and model.space != "pixel":
            raise UnsupportedError(f"{model.name}: it has no autoencoder; give the directory of a whole pipeline")
        channels, height, width = model.sample_shape
        if channels != model.out_channels:
            raise UnsupportedError(f"{model.name}: its UNet takes an image beside the latent; supported: text alone")
        each = 1 if vae is None else vae.downscale
        self.model, self.scheduler, self.vae = model, scheduler, vae
        self.size = (each * height, each * width)
        self.components = torch_components(found, keep=True, device=device)
        self.stage = TextStage(prompt, source_tokenizers(found, prompt), self.components)
        model.unet.to(device)
        self.session = undivided_session(model)

    def __call__(
        self, prompts: Sequence[str], *, first_image: int, num_inference_steps: int, guidance_scale: float, seed: int
    ) -> NDArray[np.uint8]:
        """Draws a picture for each prompt, uint8 [N, H, W, 3]; image i of a seed is the same in any batch.

        Raises:
            NotFiniteError: The model's output is not finite.
            RequestError: The number of steps or the seed is out of range, or a prompt cannot be encoded.
        """
        count, needed = len(prompts), self.model.conditioning.tensors
        guided = guidance_scale > 1 and GUIDANCE not in needed
        scheduler = make_scheduler(self.scheduler, num_inference_steps)
        texts = Texts(prompts, emphasis=False).encode(self.stage, count, guided, any_length=False)
        rows = [{name: each[name] for name in needed if name in each} for each in texts]
        if "time_ids" in needed:
            for each, is_negative in zip(rows, (False, True), strict=True):
                ids = time_ids(needed["time_ids"].shape[0], *self.size, is_negative)
                each["time_ids"] = np.repeat(ids, count, axis=0)
        if GUIDANCE in needed:
            rows[0][GUIDANCE] = guidance_embedding(guidance_scale, needed[GUIDANCE].shape[0], count)
        steps = len(scheduler.timesteps)
        request = Request(
            graphs=self.session.graphs,
            scheduler=scheduler,
            clock=(True,) * steps,
            guidance=(guidance_scale if guided else 1.0,) * steps,
            latents=initial_latents(seed, count, self.model.sample_shape, scheduler.init_noise_sigma, first_image),
            cond=rows[0],
            uncond=rows[1] if guided else {},
            seed=seed,
            first_image=first_image,
        )
        *_, last = denoise(request, self.session)
        if self.vae is None:
            return to_uint8(last.latents)
        with self.components.use(DECODER) as decoder:
            graph = self.components.graphs[DECODER][0]
            return to_uint8(decode(decoder, lambda *_: graph, self.vae, last.latents))
