"""Wavelet-gated UNets: slim students that keep high frequencies (Spectral Diffusion, section 4.1; details rebuilt).

A slim UNet loses what is high in frequency first where it changes resolution. Here those places are wavelet transforms:
on the way down the bands are weighed by gates and summed, on the way up the channels are read as the bands of a larger
map. The gates look at the feature and open and close band by band and channel by channel.

The classes are diffusers models: they are saved, loaded and configured as their parents are, with two settings more.
"""

import inspect
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from edgediff.config.choices import Cut
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.clockwork import split
from edgediff.models.layers import flatten, refuse_freeu
from edgediff.models.slim import check_unet, plain_config, slim_config
from edgediff.models.wavelet import HAAR, check_wavelet, dwt2, idwt2

BANDS = ("LL", "LH", "HL", "HH")
# The gates' hidden layer is narrower by this, and each band on the way up has this share of the channels.
_QUARTER = 4


class BandGate(nn.Module):
    """Gates of the four bands: sigmoid(FFN(avgpool(x))), one for each band and channel."""

    def __init__(self, channels: int, gated: int, emb_channels: int | None = None) -> None:
        """Makes the gates.

        Args:
            channels: Of the feature that they look at.
            gated: Channels of each band.
            emb_channels: Width of the time embedding where the gates look at it too, which the paper's do not.
        """
        super().__init__()
        hidden = max(channels // _QUARTER, 1)
        self.gated = gated
        self.hidden = nn.Linear(channels, hidden)
        self.time = None if emb_channels is None else nn.Linear(emb_channels, hidden)
        self.out = nn.Linear(hidden, len(BANDS) * gated)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        """Looks at a feature.

        Args:
            x: [B, C, H, W].
            emb: [B, E], where the gates look at the time.

        Returns:
            [B, 4, gated, 1, 1] in (0, 1); bands in the order of `BANDS`.
        """
        hidden = self.hidden(x.mean(dim=(2, 3)))
        if self.time is not None:
            assert emb is not None
            hidden = hidden + self.time(nn.functional.silu(emb))
        gates: torch.Tensor = torch.sigmoid(self.out(nn.functional.silu(hidden)))
        return gates.reshape(-1, len(BANDS), self.gated, 1, 1)


class WaveletGating(nn.Module):
    """What the two ways have in common.

    Attributes:
        takes_emb: Whether `forward` wants the time embedding.
        taps: What the filter's numbers are rounded to, for the reference of a graph in less precision; they are no
            parameters. None leaves them.
    """

    taps: torch.dtype | None = None

    def __init__(self, channels: int, gated: int, wavelet: str, emb_channels: int | None) -> None:
        super().__init__()
        self.wavelet = check_wavelet(wavelet)
        self.gate = BandGate(channels, gated, emb_channels)
        self.takes_emb = emb_channels is not None

    @staticmethod
    def _weighed(bands: tuple[torch.Tensor, ...], gates: torch.Tensor) -> list[torch.Tensor]:
        # Taken apart as channels: picked by their number, they would be gathered, which divides a graph on ONNX
        # Runtime's Core ML provider.
        apart = torch.chunk(gates.flatten(1, 2), len(BANDS), dim=1)
        return [gate * band for gate, band in zip(apart, bands, strict=True)]


class WaveletDown(WaveletGating):
    """WG-Down: the bands of half the size, each weighed by its gates, in one sum."""

    def __init__(self, channels: int, wavelet: str = "haar", emb_channels: int | None = None) -> None:
        """Makes the downsampler.

        Args:
            channels: In and out.
            wavelet: An orthogonal filter's name.
            emb_channels: Width of the time embedding, where the gates look at it.
        """
        super().__init__(channels, channels, wavelet, emb_channels)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Halves a feature.

        Args:
            x: [B, C, H, W], H and W even.
            temb: [B, E], where the gates look at the time.

        Returns:
            [B, C, H/2, W/2].

        Raises:
            UnsupportedError: H or W is odd.
        """
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            raise UnsupportedError(
                f"a feature of {height}x{width} has no bands of half its size; expected even numbers"
            )
        gates = self.gate(x, temb)
        if self.wavelet in HAAR:
            return _haar_down(x, gates)
        ll, lh, hl, hh = self._weighed(dwt2(x, self.wavelet, self.taps), gates)
        return ll + lh + hl + hh


def _haar_down(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The gated sum of Haar's bands, in a third of the operations.

    Each band is a sum of the four pixels of a block with signs, so the sum of bands is a weighed sum of these pixels,
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

    IDWT leaves a quarter of the channels; the convolution that widens them again is rebuilt: it fits published counts.
    """

    def __init__(self, channels: int, wavelet: str = "haar", emb_channels: int | None = None) -> None:
        """Makes the upsampler.

        Args:
            channels: In and out, a multiple of 4.
            wavelet: An orthogonal filter's name.
            emb_channels: Width of the time embedding, where the gates look at it.

        Raises:
            UnsupportedError: The channels do not divide into four bands.
        """
        if channels % _QUARTER:
            raise UnsupportedError(f"{channels} channels do not divide into four bands; expected a multiple of 4")
        super().__init__(channels, channels // _QUARTER, wavelet, emb_channels)
        self.widen = nn.Conv2d(channels // _QUARTER, channels, 1)

    def forward(self, x: torch.Tensor, output_size: Any = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Doubles a feature.

        Args:
            x: [B, C, H, W].
            output_size: What diffusers hands on for sizes that the levels do not divide; None, or the double.
            temb: [B, E], where the gates look at the time.

        Returns:
            [B, C, 2H, 2W].

        Raises:
            UnsupportedError: Another size is wanted.
        """
        height, width = x.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            raise UnsupportedError(
                f"a feature of {height}x{width} cannot become {'x'.join(map(str, output_size))}; expected a sample "
                "that the levels divide"
            )
        ll, lh, hl, hh = self._weighed(torch.chunk(x, len(BANDS), dim=1), self.gate(x, temb))
        widened: torch.Tensor = self.widen(idwt2(ll, lh, hl, hh, self.wavelet, self.taps))
        return widened


def gate_resampling(unet: UNet2DModel | UNet2DConditionModel, wavelet: str, takes_time: bool) -> None:
    """Puts wavelet gating in the place of a UNet's own resampling; residual blocks that resample keep all the rest.

    Args:
        unet: Changed in place.
        wavelet: An orthogonal filter's name.
        takes_time: Whether gates look at the time embedding.

    Raises:
        ConfigError: The wavelet is unknown, or `takes_time` is no truth value.
        UnsupportedError: The UNet has blocks that cannot be cut, or one level; or gates that would look at the time are
            within a residual block.
    """
    check_wavelet(wavelet)
    if not isinstance(takes_time, bool):
        raise ConfigError(f"gate_takes_time is {takes_time!r}; expected true or false")
    flatten(unet)  # refuses blocks that hold their resampling elsewhere
    if len(unet.down_blocks) == 1:
        raise UnsupportedError("the UNet has one level and no resampling; expected two levels or more")
    # What the residual blocks are given, which class embeddings may have made wider than the time's.
    emb = unet.down_blocks[0].resnets[0].time_emb_proj.in_features if takes_time else None
    for block in unet.down_blocks:
        _replace(block.downsamplers, "downsample", WaveletDown, wavelet, emb)
    for block in unet.up_blocks:
        _replace(block.upsamplers, "upsample", WaveletUp, wavelet, emb)


def _replace(
    resamplers: Any, name: str, gated: type[WaveletDown] | type[WaveletUp], wavelet: str, emb: int | None
) -> None:
    """Puts gating in the place of a block's resamplers, or of those within residual blocks under the name."""
    for i, module in enumerate(resamplers or ()):
        if not isinstance(module, ResnetBlock2D):
            resamplers[i] = gated(module.channels, wavelet, emb)
        elif emb is None:
            setattr(module, name, gated(module.in_channels, wavelet))
        else:
            raise UnsupportedError(
                "gate_takes_time is true, but a residual block that resamples hands no time to its gates; "
                "expected false"
            )


def _signature(unet: type) -> inspect.Signature:
    """A UNet class's settings and the gating's: diffusers reads the names of a configuration from ``__init__``."""
    settings = inspect.signature(unet.__init__)  # type: ignore[misc]
    more = [
        inspect.Parameter("wavelet", inspect.Parameter.KEYWORD_ONLY, default="haar", annotation=str),
        inspect.Parameter("gate_takes_time", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
    ]
    return settings.replace(parameters=[*settings.parameters.values(), *more])


# mypy does not see diffusers' classes: its stand-ins for missing packages would hide them.
class SpectralUNet2DModel(UNet2DModel):  # type: ignore[misc]
    """diffusers' ``UNet2DModel`` with wavelet-gated resampling.

    Takes that class's settings and two more: ``wavelet`` (an orthogonal filter's name) and ``gate_takes_time`` (gates
    look at the time embedding too; the paper's look at the feature alone).
    """

    def __init__(self, *args: Any, wavelet: str = "haar", gate_takes_time: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_to_config(wavelet=wavelet, gate_takes_time=gate_takes_time)
        gate_resampling(self, wavelet, gate_takes_time)
        keep_divided(self)

    __init__.__signature__ = _signature(UNet2DModel)  # type: ignore[attr-defined]

    def forward(self, sample: torch.Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """Predicts as ``UNet2DModel.forward`` does."""
        if not self.config.gate_takes_time:
            return super().forward(sample, timestep, class_labels, return_dict)
        out = _run_layers(self, sample, timestep, class_labels=class_labels)
        return UNet2DOutput(sample=out) if return_dict else (out,)


class SpectralUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """diffusers' ``UNet2DConditionModel`` with wavelet-gated resampling; settings as in `SpectralUNet2DModel`."""

    def __init__(self, *args: Any, wavelet: str = "haar", gate_takes_time: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_to_config(wavelet=wavelet, gate_takes_time=gate_takes_time)
        gate_resampling(self, wavelet, gate_takes_time)
        keep_divided(self)

    __init__.__signature__ = _signature(UNet2DConditionModel)  # type: ignore[attr-defined]

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any = None, *args: Any, **settings: Any
    ) -> Any:
        """Predicts as ``UNet2DConditionModel.forward`` does."""
        if not self.config.gate_takes_time:
            return super().forward(sample, timestep, encoder_hidden_states, *args, **settings)
        given = inspect.signature(UNet2DConditionModel.forward).bind(
            self, sample, timestep, encoder_hidden_states, *args, **settings
        )
        cond = {name: value for name, value in given.arguments.items() if name not in ("self", "sample", "timestep")}
        return_dict = cond.pop("return_dict", True)
        out = _run_layers(self, sample, timestep, **cond)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)


def _run_layers(unet: Any, sample: torch.Tensor, timestep: Any, **cond: Any) -> torch.Tensor:
    """Runs a UNet layer by layer: diffusers' blocks call resamplers without the time embedding."""
    given = {name: value for name, value in cond.items() if value is not None}
    refuse_freeu(unet)
    out: torch.Tensor = unet.divided.full(sample, timestep, **given)[0]
    return out


def keep_divided(unet: Any) -> None:
    """Divides a UNet whose gates look at the time, for `_run_layers`; again where its blocks were replaced."""
    # No submodule: its weights are the UNet's own, and would be saved twice.
    object.__setattr__(unet, "divided", split(unet, Cut()) if unet.config.gate_takes_time else None)


SPECTRAL = {"SpectralUNet2DModel": SpectralUNet2DModel, "SpectralUNet2DConditionModel": SpectralUNet2DConditionModel}


def spectralize(
    unet: UNet2DModel | UNet2DConditionModel,
    width: int | None = None,
    wavelet: str = "haar",
    gate_takes_time: bool = False,
) -> SpectralUNet2DModel | SpectralUNet2DConditionModel:
    """The wavelet-gated UNet of a geometry (Spectral Diffusion, section 4.1).

    Multipliers, layers and attention levels stay; the width and the resampling change.

    Args:
        unet: The geometry; its weights are not looked at.
        width: Channels of the highest level, a multiple of 8; None keeps all widths.
        wavelet: An orthogonal filter's name.
        gate_takes_time: Whether gates look at the time embedding too, which the paper's do not.

    Returns:
        A new UNet with weights as torch initialises them.

    Raises:
        ConfigError: The width does not fit, or the wavelet is unknown.
        UnsupportedError: It is no UNet of diffusers', or a resampler of it cannot be replaced.
    """
    check_unet(unet)
    config = plain_config(unet)
    if width is not None:
        config = slim_config(config, width)
    config |= {"wavelet": wavelet, "gate_takes_time": gate_takes_time}
    kind = SpectralUNet2DConditionModel if isinstance(unet, UNet2DConditionModel) else SpectralUNet2DModel
    student: SpectralUNet2DModel | SpectralUNet2DConditionModel = kind(**config).eval()
    return student
