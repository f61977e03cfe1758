"""Plug-and-play injection (Tumanyan et al. 2022, section 4): rows of a step that look as another row is built.

A picture that was inverted is drawn again in a row of its own, the source's. Other rows take the source's queries and
keys in the self-attention of the way up, and what one of its residual blocks adds. Which row each one takes is an input
of the graphs: a row that takes its own is not changed, bit for bit.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgediff.errors import UnsupportedError
from edgediff.models.conditioning import TensorSpec
from edgediff.models.layers import AnyLayer, Layer
from edgediff_runtime.manifest import ATTENTION_ROWS, FEATURE_ROWS

# Where the authors inject into Stable Diffusion: features into the second layer of the second block on the way up, and
# attention from there on.
BLOCK, LAYER = 1, 1
ROW_TENSORS = {name: TensorSpec((), torch.int64) for name in (ATTENTION_ROWS, FEATURE_ROWS)}


class Rows(NamedTuple):
    """The row that each row takes queries and keys of, and that of features: int64 [B], or None where a part has none.

    Attributes:
        attention: For self-attention.
        features: For the residual block.
    """

    attention: Tensor | None
    features: Tensor | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Rows":
        """Those among a step's tensors."""
        return cls(tensors.get(ATTENTION_ROWS), tensors.get(FEATURE_ROWS))


class InjectedLayer(Layer):
    """A layer of the way up whose self-attention, and in one layer whose residual block, take other rows'."""

    def __init__(self, layer: Layer, with_features: bool) -> None:
        super().__init__(layer.resnet, _with_rows(layer.attention), layer.kind, "up")
        self.with_features = with_features
        if with_features:
            _check_resnet(layer.resnet)

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None, rows: Rows | None = None
    ) -> Tensor:
        """Runs the layer; arguments as in `Layer.forward`."""
        assert rows is not None
        x = torch.cat([x, skips.pop()], dim=1)
        x = _resnet_of_rows(self.resnet, x, emb, rows.features) if self.with_features else self.resnet(x, emb)
        given = {"attention_rows": rows.attention}
        out: Tensor = self.attention(
            x, encoder_hidden_states=text, cross_attention_kwargs=given, return_dict=False
        )[0]  # fmt: skip
        return out


def injected(up: list[list[AnyLayer]]) -> list[list[AnyLayer]]:
    """The levels of the way up, lowest first, with layers that take other rows; weights are shared.

    Raises:
        UnsupportedError: There is no self-attention over text's transformers where injection is done.
    """
    made: list[list[AnyLayer]] = []
    with_features = True  # the first of them
    for block, level in enumerate(up):
        made.append([])
        for number, layer in enumerate(level):
            if (block, number) >= (BLOCK, LAYER) and isinstance(layer, Layer) and _has_self_attention(layer):
                made[-1].append(InjectedLayer(layer, with_features))
                with_features = False
            else:
                made[-1].append(layer)
    if with_features:
        raise UnsupportedError(
            "the UNet has no self-attention in transformer blocks from the second block of its way up on, which "
            "injection needs"
        )
    return made


def rows_taken(layers: list[AnyLayer]) -> tuple[str, ...]:
    """What a part with these layers takes of `ROW_TENSORS`."""
    found = [layer for layer in layers if isinstance(layer, InjectedLayer)]
    features = any(layer.with_features for layer in found)
    return ((ATTENTION_ROWS,) if found else ()) + ((FEATURE_ROWS,) if features else ())


def _has_self_attention(layer: Layer) -> bool:
    return layer.kind == "transformer" and not any(
        block.only_cross_attention for block in layer.attention.transformer_blocks
    )


def _with_rows(transformer: Any) -> Any:
    """A transformer of diffusers on the same weights, whose blocks take ``attention_rows``."""
    weights = [*transformer.parameters(), *transformer.buffers()]
    made = copy.deepcopy(transformer, {id(tensor): tensor for tensor in weights})
    for block in made.transformer_blocks:
        block.attn1 = _SelfAttention(block.attn1)
        if block.attn2 is not None:
            block.attn2 = _CrossAttention(block.attn2)
    return made


class _SelfAttention(nn.Module):
    """diffusers' Attention with queries and keys of other rows."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        named = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
        for name in named:
            if getattr(attention, name, None) is not None:
                raise UnsupportedError(f"injection cannot be done in an attention with {name}")
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        attention_rows: Tensor | None = None,
    ) -> Tensor:
        """From x [B, L, D] and int64 [B] to [B, L, D]."""
        of = self.attention
        query, key, value = (
            project(x).unflatten(-1, (of.heads, -1)).transpose(1, 2) for project in (of.to_q, of.to_k, of.to_v)
        )
        if attention_rows is not None:
            query, key = query.index_select(0, attention_rows), key.index_select(0, attention_rows)
        out = F.scaled_dot_product_attention(query, key, value)
        made: Tensor = of.to_out[1](of.to_out[0](out.transpose(1, 2).flatten(2)))
        return made


class _CrossAttention(nn.Module):
    """diffusers' Attention over text, which each row has of its own."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_rows: Tensor | None = None,
    ) -> Tensor:
        """As the attention does without ``attention_rows``."""
        out: Tensor = self.attention(x, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        return out


def _check_resnet(resnet: Any) -> None:
    if resnet.upsample is not None or resnet.downsample is not None:
        raise UnsupportedError("injection cannot be done in a residual block that changes the size")


def _resnet_of_rows(resnet: Any, x: Tensor, emb: Tensor, rows: Tensor | None) -> Tensor:
    """Diffusers' ResnetBlock2D, of which each row adds another row's residual to its own input."""
    hidden = resnet.conv1(resnet.nonlinearity(resnet.norm1(x)))
    if resnet.time_emb_proj is not None:
        emb = emb if resnet.skip_time_act else resnet.nonlinearity(emb)
        emb = resnet.time_emb_proj(emb)[:, :, None, None]
        if resnet.time_embedding_norm == "scale_shift":
            scale, shift = torch.chunk(emb, 2, dim=1)
            hidden = resnet.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = resnet.norm2(hidden + emb)
    else:
        hidden = resnet.norm2(hidden)
    hidden = resnet.conv2(resnet.dropout(resnet.nonlinearity(hidden)))
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    if resnet.conv_shortcut is not None:
        x = resnet.conv_shortcut(x)
    out: Tensor = (x + hidden) / resnet.output_scale_factor
    return out
