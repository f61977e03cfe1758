"""A diffusers UNet as one flat sequence of layers, so that it can be divided anywhere.

Every layer pops a skip connection from the stack if it is on the way up, computes, and pushes its output if it is on
the way down. A cut is an index in a list, and each side runs the undivided UNet's operations in the same order with the
same modules: the results are equal bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from edgediff.errors import UnsupportedError

# A block's attention: over the feature alone, a transformer with text, or one attention layer over feature and text
# together (unCLIP, IF).
ATTENTION_OF_BLOCK = {
    "DownBlock2D": None,
    "UpBlock2D": None,
    "AttnDownBlock2D": "self",
    "AttnUpBlock2D": "self",
    "CrossAttnDownBlock2D": "transformer",
    "CrossAttnUpBlock2D": "transformer",
    "SimpleCrossAttnDownBlock2D": "added_kv",
    "SimpleCrossAttnUpBlock2D": "added_kv",
    "ResnetDownsampleBlock2D": None,
    "ResnetUpsampleBlock2D": None,
}
MID_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn")


class Layer(nn.Module):
    """A residual block and, where there is one, the attention after it.

    Attributes:
        pushes: 1 if the output becomes a skip connection (way down), else 0.
        pops: 1 if a skip connection is concatenated to the input (way up), else 0.
        needs_text: Whether the attention uses ``encoder_hidden_states``.
    """

    def __init__(self, resnet: nn.Module, attention: nn.Module | None, kind: str | None, way: str) -> None:
        super().__init__()
        self.resnet = resnet
        self.attention: Any = attention
        self.kind = kind if attention is not None else None
        self.pushes = int(way == "down")
        self.pops = int(way == "up")
        self.needs_text = self.kind in ("transformer", "added_kv")

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None, rows: Any = None) -> Tensor:
        """Runs the layer on x [B, C, H, W], emb [B, E], text [B, S, D]; `skips` is the stack, changed in place.

        `rows` are for layers that take other rows' (`edgediff.models.injection`); this one takes none.
        """
        if self.pops:
            x = torch.cat([x, skips.pop()], dim=1)
        x = self.resnet(x, emb)
        if self.kind == "self":
            x = self.attention(x)
        elif self.kind == "transformer":
            x = self.attention(x, encoder_hidden_states=text, return_dict=False)[0]
        elif self.kind == "added_kv":
            x = self.attention(x, encoder_hidden_states=text, attention_mask=None)
        if self.pushes:
            skips.append(x)
        return x


class Resample(nn.Module):
    """The downsampler or upsampler at the end of a block; the downsampled feature is a skip connection too."""

    pops = 0
    needs_text = False

    def __init__(self, module: nn.Module, way: str) -> None:
        super().__init__()
        self.module = module
        self.takes_emb = isinstance(module, ResnetBlock2D) or getattr(module, "takes_emb", False)
        self.pushes = int(way == "down")

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None, rows: Any = None) -> Tensor:
        """Halves or doubles height and width; arguments as in `Layer.forward`."""
        x = self.module(x, temb=emb) if self.takes_emb else self.module(x)
        if self.pushes:
            skips.append(x)
        return x


class Mid(nn.Module):
    """The block at the lowest resolution, whole."""

    pushes = 0
    pops = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.needs_text = bool(getattr(module, "has_cross_attention", False))

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None, rows: Any = None) -> Tensor:
        """Runs the block; arguments as in `Layer.forward`, the stack is not changed."""
        out: Tensor = self.module(x, emb, encoder_hidden_states=text) if self.needs_text else self.module(x, emb)
        return out


AnyLayer = Layer | Resample | Mid


def flatten(unet: UNet2DModel | UNet2DConditionModel) -> tuple[list[list[AnyLayer]], Mid | None, list[list[AnyLayer]]]:
    """Flattens a UNet's blocks into lists of layers, the resampler last in each.

    Returns:
        The levels on the way down (highest resolution first), the mid block, and the levels on the way up (lowest
        resolution first).

    Raises:
        UnsupportedError: A block is of a kind that cannot be cut, or FreeU is switched on.
    """
    refuse_freeu(unet)
    down = [list(layers_of(block, "down")) for block in unet.down_blocks]
    up = [list(layers_of(block, "up")) for block in unet.up_blocks]
    mid = unet.mid_block
    if mid is not None and type(mid).__name__ not in MID_BLOCKS:
        raise UnsupportedError(
            f"cannot cut a UNet with a {type(mid).__name__}; supported mid blocks: {', '.join(MID_BLOCKS)}, none"
        )
    return down, None if mid is None else Mid(mid), up


def refuse_freeu(unet: Any) -> None:
    """Refuses a UNet with FreeU switched on, which diffusers applies in blocks and not in layers."""
    if any(getattr(block, scale, None) for block in unet.up_blocks for scale in ("s1", "s2", "b1", "b2")):
        raise UnsupportedError("FreeU is switched on, which cannot be cut; call unet.disable_freeu() first")


def layers_of(block: Any, way: str) -> Iterator[AnyLayer]:
    """A block's layers in order, the resampler last; an UnsupportedError for a kind that cannot be cut."""
    name = type(block).__name__
    if name not in ATTENTION_OF_BLOCK:
        raise UnsupportedError(f"cannot cut a UNet with a {name}; supported blocks: {', '.join(ATTENTION_OF_BLOCK)}")
    kind = ATTENTION_OF_BLOCK[name]
    attentions = block.attentions if kind is not None else [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        yield Layer(resnet, attention, kind, way)
    for resampler in (block.downsamplers if way == "down" else block.upsamplers) or ():
        yield Resample(resampler, way)
