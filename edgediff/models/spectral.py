"""Wavelet-gated UNets: slim students that keep high frequencies (Spectral Diffusion, section 4.1).

A slim UNet loses high frequencies first where it changes resolution. Here those places are wavelet transforms: on the
way down the bands are weighted by gates and summed, on the way up the channels are the bands of a larger map. The gates
are computed from the feature, one for each band and channel.

The classes are diffusers models: they are saved, loaded and configured like their parents, with two more settings.
"""

import inspect
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from edgediff.config.choices import Cut
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.clockwork import split
from edgediff.models.layers import flatten, refuse_freeu
from edgediff.models.slim import Width, check_unet, plain_config, slim_config
from edgediff.models.wavelet import HAAR, check_wavelet, dwt2, idwt2

BANDS = ("LL", "LH", "HL", "HH")
# The gates' hidden layer has a quarter of the channels, and so has each band on the way up.
_QUARTER = 4


class BandGate(nn.Module):
    """Gates of the four bands: sigmoid(FFN(avgpool(x))), one for each band and each of its `gated` channels.

    With `emb_channels` they depend on the time embedding too.
    """

    def __init__(self, channels: int, gated: int, emb_channels: int | None = None) -> None:
        super().__init__()
        hidden = max(channels // _QUARTER, 1)
        self.gated = gated
        self.hidden = nn.Linear(channels, hidden)
        self.time = None if emb_channels is None else nn.Linear(emb_channels, hidden)
        self.out = nn.Linear(hidden, len(BANDS) * gated)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """From x [B, C, H, W] and emb [B, E]: [B, 4, gated, 1, 1] in (0, 1); bands in the order of `BANDS`."""
        hidden = self.hidden(x.mean(dim=(2, 3)))
        if self.time is not None:
            assert emb is not None
            hidden = hidden + self.time(nn.functional.silu(emb))
        gates: Tensor = torch.sigmoid(self.out(nn.functional.silu(hidden)))
        return gates.reshape(-1, len(BANDS), self.gated, 1, 1)


class WaveletGating(nn.Module):
    """The base of both ways.

    Attributes:
        takes_emb: Whether `forward` needs the time embedding.
        taps: The dtype to which the filter's numbers, which are no parameters, are rounded for the reference of a graph
            in less precision; None leaves them.
    """

    taps: torch.dtype | None = None

    def __init__(self, channels: int, gated: int, wavelet: str, emb_channels: int | None) -> None:
        super().__init__()
        self.wavelet = check_wavelet(wavelet)
        self.gate = BandGate(channels, gated, emb_channels)
        self.takes_emb = emb_channels is not None

    @staticmethod
    def _weighted(bands: tuple[Tensor, ...], gates: Tensor) -> list[Tensor]:
        # An index would become a Gather, which divides a graph on ONNX Runtime's Core ML provider; channels do not.
        chunks = torch.chunk(gates.flatten(1, 2), len(BANDS), dim=1)
        return [gate * band for gate, band in zip(chunks, bands, strict=True)]


class WaveletDown(WaveletGating):
    """WG-Down: the sum of the bands of half the size, each weighted by its gates; channels stay."""

    def __init__(self, channels: int, wavelet: str = "haar", emb_channels: int | None = None) -> None:
        super().__init__(channels, channels, wavelet, emb_channels)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """From x [B, C, H, W] and temb [B, E]: [B, C, H/2, W/2]; an UnsupportedError where H or W is odd."""
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            raise UnsupportedError(
                f"a feature of {height}x{width} has no bands of half its size; expected even numbers"
            )
        gates = self.gate(x, temb)
        if self.wavelet in HAAR:
            return _haar_down(x, gates)
        ll, lh, hl, hh = self._weighted(dwt2(x, self.wavelet, self.taps), gates)
        return ll + lh + hl + hh


def _haar_down(x: Tensor, gates: Tensor) -> Tensor:
    """The gated sum of Haar's bands, in a third of the operations.

    Each band is a sum of the four pixels of a block with signs, so the sum of bands is a weighted sum of these pixels,
    and their weights are sums of the gates with the same signs.
    """
    ll, lh, hl, hh = torch.chunk(0.5 * gates.flatten(1, 2), len(BANDS), dim=1)
    same, apart, across, twice = ll + lh, ll - lh, hl + hh, hl - hh
    top, bottom = x[:, :, 0::2], x[:, :, 1::2]
    return (
        (same + across) * top[:, :, :, 0::2]
        + (same - across) * top[:, :, :, 1::2]
        + (apart + twice) * bottom[:, :, :, 0::2]
        + (apart - twice) * bottom[:, :, :, 1::2]
    )


class WaveletUp(WaveletGating):
    """WG-Up: quarters of the channels as the bands of a map of twice the size, then a 1x1 convolution to all channels.

    The convolution, which widens the quarter of the channels that IDWT leaves, is reconstructed to fit published
    counts.
    """

    def __init__(self, channels: int, wavelet: str = "haar", emb_channels: int | None = None) -> None:
        if channels % _QUARTER:
            raise UnsupportedError(f"{channels} channels do not divide into four bands; expected a multiple of 4")
        super().__init__(channels, channels // _QUARTER, wavelet, emb_channels)
        self.widen = nn.Conv2d(channels // _QUARTER, channels, 1)

    def forward(self, x: Tensor, output_size: Any = None, temb: Tensor | None = None) -> Tensor:
        """From x [B, C, H, W] and temb [B, E]: [B, C, 2H, 2W]; an UnsupportedError for another `output_size`."""
        height, width = x.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            raise UnsupportedError(
                f"a feature of {height}x{width} cannot become {'x'.join(map(str, output_size))}; expected a sample "
                "that the levels divide"
            )
        ll, lh, hl, hh = self._weighted(torch.chunk(x, len(BANDS), dim=1), self.gate(x, temb))
        widened: Tensor = self.widen(idwt2(ll, lh, hl, hh, self.wavelet, self.taps))
        return widened


def gate_resampling(unet: UNet2DModel | UNet2DConditionModel, wavelet: str, takes_time: bool) -> None:
    """Replaces a UNet's own resampling by wavelet gating, in place; in residual blocks that resample, only that.

    Raises:
        ConfigError: The wavelet is unknown, or `takes_time` is neither true nor false.
        UnsupportedError: The UNet has blocks that cannot be cut, or one level; or gates that would take the time are
            within a residual block.
    """
    check_wavelet(wavelet)
    if not isinstance(takes_time, bool):
        raise ConfigError(f"gate_takes_time is {takes_time!r}; expected true or false")
    flatten(unet)  # refuses blocks that resample in other modules
    if len(unet.down_blocks) == 1:
        raise UnsupportedError("the UNet has one level and no resampling; expected two levels or more")
    # The width that the residual blocks take: class embeddings may widen the time's.
    emb = unet.down_blocks[0].resnets[0].time_emb_proj.in_features if takes_time else None
    for block in unet.down_blocks:
        _replace(block.downsamplers, "downsample", WaveletDown, wavelet, emb)
    for block in unet.up_blocks:
        _replace(block.upsamplers, "upsample", WaveletUp, wavelet, emb)


def _replace(
    resamplers: Any, name: str, gated: type[WaveletDown] | type[WaveletUp], wavelet: str, emb: int | None
) -> None:
    """Replaces a block's resamplers, or those within residual blocks under the name."""
    for i, module in enumerate(resamplers or ()):
        if not isinstance(module, ResnetBlock2D):
            resamplers[i] = gated(module.channels, wavelet, emb)
        elif emb is None:
            setattr(module, name, gated(module.in_channels, wavelet))
        else:
            raise UnsupportedError(
                "gate_takes_time is true, but a residual block that resamples does not pass the time to its gates; "
                "expected false"
            )


def _init(parent: Any) -> Any:
    """The constructor of a UNet class with the gating's settings."""

    def __init__(self: Any, *args: Any, wavelet: str = "haar", gate_takes_time: bool = False, **settings: Any) -> None:
        parent.__init__(self, *args, **settings)
        self.register_to_config(wavelet=wavelet, gate_takes_time=gate_takes_time)
        gate_resampling(self, wavelet, gate_takes_time)
        keep_divided(self)

    # diffusers reads the names of a configuration from the signature.
    own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    settings = inspect.signature(parent.__init__)
    signed: Any = __init__
    signed.__signature__ = settings.replace(parameters=[*settings.parameters.values(), *own])
    return signed


class _TakesTime(nn.Module):
    """Runs a UNet whose gates take the time layer by layer: diffusers' blocks call resamplers without it."""

    def forward(self, *args: Any, **settings: Any) -> Any:
        """Predicts as the parent's ``forward`` does."""
        unet: Any = self
        if not unet.config.gate_takes_time:
            return super().forward(*args, **settings)
        refuse_freeu(unet)
        given = inspect.signature(super().forward).bind(*args, **settings).arguments
        return_dict = given.pop("return_dict", True)
        out = unet.divided.full(**{name: value for name, value in given.items() if value is not None})[0]
        kind = UNet2DConditionOutput if isinstance(self, UNet2DConditionModel) else UNet2DOutput
        return kind(sample=out) if return_dict else (out,)


# mypy does not see diffusers' classes: its stand-ins for missing packages would hide them.
class SpectralUNet2DModel(_TakesTime, UNet2DModel):  # type: ignore[misc]
    """diffusers' ``UNet2DModel`` with wavelet-gated resampling.

    Two more settings: ``wavelet`` (an orthogonal filter's name) and ``gate_takes_time`` (gates take the time embedding
    too; the paper's take the feature alone).
    """

    __init__ = _init(UNet2DModel)


class SpectralUNet2DConditionModel(_TakesTime, UNet2DConditionModel):  # type: ignore[misc]
    """diffusers' ``UNet2DConditionModel`` with wavelet-gated resampling; settings as in `SpectralUNet2DModel`."""

    __init__ = _init(UNet2DConditionModel)


def keep_divided(unet: Any) -> None:
    """Divides a UNet whose gates take the time, for its `forward`; to be called again after blocks are replaced."""
    # Not a submodule: its weights are the UNet's own, and would be saved twice.
    object.__setattr__(unet, "divided", split(unet, Cut()) if unet.config.gate_takes_time else None)


SPECTRAL = {"SpectralUNet2DModel": SpectralUNet2DModel, "SpectralUNet2DConditionModel": SpectralUNet2DConditionModel}


def spectralize(
    unet: UNet2DModel | UNet2DConditionModel,
    width: Width | None = None,
    wavelet: str = "haar",
    gate_takes_time: bool = False,
) -> SpectralUNet2DModel | SpectralUNet2DConditionModel:
    """The wavelet-gated UNet of a geometry (Spectral Diffusion, section 4.1).

    Multipliers, layers and attention levels stay; the weights are not used.

    Args:
        width: Channels of the highest level, or of each; multiples of 8; None keeps all.
        wavelet: An orthogonal filter's name.
        gate_takes_time: Whether gates take the time embedding too, which the paper's do not.

    Raises:
        ConfigError: The width does not fit, or the wavelet is unknown.
        UnsupportedError: It is not a UNet of diffusers, or a resampler of it cannot be replaced.
    """
    check_unet(unet)
    config = plain_config(unet)
    if width is not None:
        config = slim_config(config, width)
    config |= {"wavelet": wavelet, "gate_takes_time": gate_takes_time}
    kind = SpectralUNet2DConditionModel if isinstance(unet, UNet2DConditionModel) else SpectralUNet2DModel
    student: SpectralUNet2DModel | SpectralUNet2DConditionModel = kind(**config).eval()
    return student
