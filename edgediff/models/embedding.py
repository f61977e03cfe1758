"""A UNet's conditioning, embedded once a step in ``highres_in``: the other graphs receive the result as ``emb``.

diffusers spreads this over both UNet classes' ``forward``; here it is one module.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgediff.errors import UnsupportedError
from edgediff_runtime.manifest import GUIDANCE

# A learned one is a table of whole time steps; samplers use fractional ones.
TIME_KINDS = ("positional", "fourier")
CLASS_KINDS = (None, "timestep", "identity", "projection", "simple_projection")
ADDED_KINDS = (None, "text", "text_time")
TEXT_KINDS = (None, "text_proj")


class StepEmbedding(nn.Module):
    """The embedding of time, class and added conditioning, by the UNet's own modules; nothing is copied.

    Attributes:
        inputs: Names of the tensors that `forward` needs besides ``sample``.
        projects_text: Whether the UNet projects ``encoder_hidden_states`` for its attention layers.

    Raises:
        UnsupportedError: The UNet embeds something that is not supported, named with the choices.
    """

    def __init__(self, unet: UNet2DModel | UNet2DConditionModel | ControlNetModel) -> None:
        super().__init__()
        config = unet.config
        self.class_kind = _one_of(config, "class_embed_type", CLASS_KINDS)
        self.added_kind = _one_of(config, "addition_embed_type", ADDED_KINDS)
        text_kind = _one_of(config, "encoder_hid_dim_type", TEXT_KINDS)
        self.center_input = bool(config.get("center_input_sample", False))
        self.concat_class = bool(config.get("class_embeddings_concat", False))
        if "time_embedding_type" in config:  # a ControlNet has but one
            _one_of(config, "time_embedding_type", TIME_KINDS)
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.class_embedding: Any = unet.class_embedding
        self.add_embedding: Any = unet.add_embedding if self.added_kind else None
        self.add_time_proj: Any = unet.add_time_proj if self.added_kind == "text_time" else None
        self.encoder_hid_proj: Any = unet.encoder_hid_proj if text_kind else None
        self.time_embed_act: Any = getattr(unet, "time_embed_act", None)
        self.projects_text = self.encoder_hid_proj is not None
        self.takes_guidance = config.get("time_cond_proj_dim") is not None  # as a latent consistency model's does
        names = ["timestep"]
        if self.takes_guidance:
            names.append(GUIDANCE)
        if self.class_embedding is not None:
            names.append("class_labels")
        if self.added_kind == "text" or self.projects_text:
            names.append("encoder_hidden_states")
        if self.added_kind == "text_time":
            names += ["text_embeds", "time_ids"]
        self.inputs = tuple(names)

    def forward(self, sample: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Embeds one step's conditioning to ``emb`` [B, E].

        Args:
            sample: [B, C, H, W]; only its batch and dtype are used.
            tensors: By the names in `inputs`: ``timestep`` [1] or [B], which may be fractional; ``class_labels`` [B]
                integers, or [B, D] where the UNet projects a vector; ``encoder_hidden_states`` [B, S, D]; SDXL's
                ``text_embeds`` [B, P], and ``time_ids`` [B, K], its sizes and crops; ``timestep_cond`` [B, G], the
                guidance scale embedded (Latent Consistency Models, section 4.2).
        """
        t = tensors["timestep"].expand(sample.shape[0])
        guidance = tensors[GUIDANCE] if self.takes_guidance else None
        emb: Tensor = self.time_embedding(self.time_proj(t).to(sample.dtype), guidance)
        if self.class_embedding is not None:
            class_labels = tensors["class_labels"]
            if self.class_kind == "timestep":
                class_labels = self.time_proj(class_labels).to(sample.dtype)
            class_emb = self.class_embedding(class_labels).to(sample.dtype)
            emb = torch.cat([emb, class_emb], dim=-1) if self.concat_class else emb + class_emb
        if self.added_kind == "text":
            emb = emb + self.add_embedding(tensors["encoder_hidden_states"])
        elif self.added_kind == "text_time":
            text_embeds, time_ids = tensors["text_embeds"], tensors["time_ids"]
            time_embeds = self.add_time_proj(time_ids.flatten()).reshape((text_embeds.shape[0], -1))
            added = torch.concat([text_embeds, time_embeds], dim=-1).to(emb.dtype)
            emb = emb + self.add_embedding(added)
        if self.time_embed_act is not None:
            emb = self.time_embed_act(emb)
        return emb

    def project_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """The text for the attention layers: [B, S, D] -> [B, S, D'], unchanged where the UNet does not project it."""
        if self.projects_text:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)
        return encoder_hidden_states


def _one_of(config: Mapping[str, Any], key: str, choices: tuple[str | None, ...]) -> str | None:
    value: str | None = config.get(key)
    if value not in choices:
        supported = ", ".join(str(choice) for choice in choices)
        raise UnsupportedError(f"the UNet's {key} is {value!r}; supported: {supported}")
    return value
