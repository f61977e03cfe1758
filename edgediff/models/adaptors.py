"""Adaptors replace the low-resolution part on a cached step (Clockwork Diffusion, section 3.1).

A learned adaptor predicts this step's low-resolution feature from that of the step before, this step's high-resolution
feature and the embedding. It adds its prediction to the cache, and its last layer is initialized to zero: untrained, it
is the identity.

The paper gives the layers of `resnet` and the sizes of all three at SD v1.5's channels (14 M, 152 M and 3 M
parameters). Widths, kernels and the order of layers in the UNets are reconstructed to fit those sizes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from edgediff.errors import UnsupportedError
from edgediff.models.part import Part

Kind: TypeAlias = Literal["resnet", "unet", "unet-light"]
INPUTS = ("highres_feature", "cache", "emb")
GROUPS = 16
EPS = 1e-5
TEXT_INPUTS = ("encoder_hidden_states", "encoder_hidden_states_projected")


@dataclass(frozen=True)
class AdaptorShape:
    """One sample's tensors at a cut, which an adaptor must fit.

    Attributes:
        highres: Channels, height and width of ``highres_feature``.
        lowres: Channels, height and width of ``lowres_feature``, and so of the cache.
        emb: Width of ``emb``.
        text: Name and width of the text that the UNet's other parts use; None where there is none.
    """

    highres: tuple[int, int, int]
    lowres: tuple[int, int, int]
    emb: int
    text: tuple[str, int] | None = None

    def __str__(self) -> str:
        highres, lowres = ("x".join(str(size) for size in sizes) for sizes in (self.highres, self.lowres))
        return f"highres_feature {highres}, lowres_feature {lowres}, emb {self.emb}"


class IdentityAdaptor(Part):
    """The cached feature as it is: no parameters, no operations, and no graph in a bundle."""

    def __init__(self) -> None:
        super().__init__(("cache",), ("lowres_feature",))

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns ``cache`` [B, C, H, W] as ``lowres_feature``."""
        return {"lowres_feature": tensors["cache"]}


class LearnedAdaptor(Part):
    """cache + body(highres_feature, cache, emb): the paper's inputs, and its residual.

    With `takes_text` the mean of the text over its tokens is an input, in place of the paper's pooled prompt, which a
    UNet is not given; the paper's ablation found that it adds nothing.

    Raises:
        UnsupportedError: The feature is too small to be halved as often as this kind does, or there is no text.
    """

    def __init__(self, kind: Kind, shape: AdaptorShape, takes_text: bool = False) -> None:
        text = shape.text if takes_text else None
        if takes_text and text is None:
            raise UnsupportedError(f"adaptor {kind}: takes_text is set, but the UNet takes no text; leave it out")
        super().__init__(INPUTS if text is None else (*INPUTS, text[0]), ("lowres_feature",))
        self.kind = kind
        self.shape = shape
        self.takes_text = takes_text
        channels = shape.highres[0] + shape.lowres[0]
        ratios = [low / high for low, high in zip(shape.lowres[1:], shape.highres[1:], strict=True)]
        self.ratio = int(ratios[0])
        if ratios != [self.ratio] * 2 or self.ratio < 1:
            raise UnsupportedError(f"no adaptor for {shape}: lowres_feature is no multiple of highres_feature in size")
        halvings = 1 if kind == "resnet" else UNET_LEVELS[kind] - 1
        if any(size % 2**halvings for size in shape.lowres[1:]):
            raise UnsupportedError(
                f"adaptor {kind} halves lowres_feature {halvings} times, which {shape} does not allow; "
                f"choices: {', '.join(ADAPTORS)}"
            )
        width = adaptor_width(kind, channels)
        sizes = (channels, width, shape.lowres[0], shape.emb)
        self.body: nn.Module = ResnetBody(*sizes) if kind == "resnet" else UNetBody(*sizes, UNET_LEVELS[kind])
        self.text_projection = None if text is None else nn.Linear(text[1], width)

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predicts ``lowres_feature`` [B, C', H', W'] from ``cache`` of the same shape and the other inputs."""
        highres, cache = tensors["highres_feature"], tensors["cache"]
        if self.ratio > 1:
            highres = F.interpolate(highres, scale_factor=float(self.ratio), mode="nearest")
        text = None
        if self.text_projection is not None:
            text = self.text_projection(tensors[self.inputs[-1]].mean(dim=1))
        return {"lowres_feature": cache + self.body(torch.cat([highres, cache], dim=1), tensors["emb"], text)}


class ResnetBody(nn.Module):
    """Strided convolution, two residual blocks with time embedding, transposed convolution (section 3.1)."""

    def __init__(self, channels: int, width: int, out: int, emb: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(_block(width, width, emb) for _ in range(2))
        self.up = zeroed(nn.ConvTranspose2d(width, out, 4, stride=2, padding=1))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        """Runs the body: x [B, C, H, W], emb [B, E], text [B, width] -> [B, C', H, W]."""
        x = _add(self.down(x), text)
        for block in self.blocks:
            x = block(x, emb)
        out: Tensor = self.up(x)
        return out


class UNetBody(nn.Module):
    """A small UNet of one width: two residual blocks at each level down, one with the skip at each level up."""

    def __init__(self, channels: int, width: int, out: int, emb: int, levels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList(_block(width, width, emb) for _ in range(2)) for _ in range(levels))
        self.downs = nn.ModuleList(nn.Conv2d(width, width, 4, stride=2, padding=1) for _ in range(levels - 1))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for _ in range(levels - 1))
        self.joins = nn.ModuleList(_block(2 * width, width, emb) for _ in range(levels - 1))
        self.conv_out = zeroed(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        """Runs the body; arguments as in `ResnetBody.forward`."""
        x = _add(self.conv_in(x), text)
        skips = []
        for level, blocks in enumerate(self.blocks):
            if level:
                skips.append(x)
                x = self.downs[level - 1](x)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, emb)
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([up(x), skips.pop()], dim=1), emb)
        out: Tensor = self.conv_out(x)
        return out


# Widths at SD v1.5's 960 channels, in and out. The paper gives the last two ("C") and their levels ("N"); resnet's is
# reconstructed from its parameters.
_WIDTH: Mapping[Kind, float] = {"resnet": 352 / 960, "unet": 640 / 960, "unet-light": 96 / 960}
UNET_LEVELS: Mapping[str, int] = {"unet": 4, "unet-light": 2}
LEARNED: tuple[Kind, ...] = ("resnet", "unet", "unet-light")
ADAPTORS = ("identity", *LEARNED)


def adaptor_width(kind: Kind, channels: int) -> int:
    """Channels inside an adaptor, a multiple of 16, for the sum of ``highres_feature``'s and ``lowres_feature``'s."""
    return GROUPS * math.ceil(round(_WIDTH[kind] * channels, 6) / GROUPS)


def make_adaptor(name: str, shape: AdaptorShape, takes_text: bool = False) -> Part:
    """Builds an untrained adaptor by name; an UnsupportedError where the name is unknown, or the shape does not fit."""
    if name == "identity":
        return IdentityAdaptor()
    for kind in LEARNED:
        if name == kind:
            return LearnedAdaptor(kind, shape, takes_text)
    raise UnsupportedError(f"no adaptor {name!r}; choices: {', '.join(ADAPTORS)}")


def zeroed(module: Any) -> Any:
    """Sets a convolution's weights and bias to zero, and returns it."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def _block(channels: int, out: int, emb: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=channels, out_channels=out, temb_channels=emb, groups=GROUPS, eps=EPS)


def _add(x: Tensor, text: Tensor | None) -> Tensor:
    return x if text is None else x + text[:, :, None, None]
