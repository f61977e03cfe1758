"""The plain small UNet ('Lite'): a UNet's own structure at a smaller width (Spectral Diffusion, table 1).

Multipliers, layers and attention levels stay. Widths are multiples of eight; numbers of groups and attention heads
become the largest that divide them.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel

from edgediff.errors import ConfigError, UnsupportedError

MULTIPLE = 8
# Channels of the highest level, to which the others keep their ratio; or those of each level.
Width = int | Sequence[int]


def slim(unet: UNet2DModel | UNet2DConditionModel, width: Width | None) -> UNet2DModel | UNet2DConditionModel:
    """The plain UNet of a geometry, without wavelet gating, at a width (None: as it is).

    Raises:
        ConfigError: The width does not fit.
        UnsupportedError: It is no UNet of diffusers'.
    """
    check_unet(unet)
    kind = UNet2DConditionModel if isinstance(unet, UNet2DConditionModel) else UNet2DModel
    config = plain_config(unet)
    if width is not None:
        config = slim_config(config, width)
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in config.items() if name in known}).eval()


def check_unet(unet: Any) -> None:
    """Refuses what is no UNet, with an UnsupportedError."""
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise UnsupportedError(f"no slim UNet of a {type(unet).__name__}; supported: UNet2DModel, UNet2DConditionModel")


def plain_config(unet: UNet2DModel | UNet2DConditionModel) -> dict[str, Any]:
    """A UNet's settings by name, without diffusers' own notes, whose names begin with an underscore."""
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


def slim_config(config: dict[str, Any], width: Width) -> dict[str, Any]:
    """A UNet's settings at a width, with groups and heads that fit.

    Raises:
        ConfigError: A width is no multiple of 8, or larger than what is there, or levels are missing.

    >>> slim_config({"block_out_channels": (48, 96, 160), "norm_num_groups": 16}, 16)["block_out_channels"]
    (16, 32, 56)
    """
    old = tuple(config["block_out_channels"])
    asked = (width,) if isinstance(width, int) else tuple(width)
    if not isinstance(width, int) and len(asked) != len(old):
        raise ConfigError(f"width {list(asked)}; expected one number, or {len(old)}, one for each level")
    for each, largest in zip(asked, old, strict=False):
        if each < MULTIPLE or each % MULTIPLE or each > largest:
            raise ConfigError(
                f"width {each}; expected a multiple of {MULTIPLE} from {MULTIPLE} to the UNet's {largest}"
            )
    widths = asked
    if isinstance(width, int):
        widths = tuple(max(MULTIPLE, round(channels * width / old[0] / MULTIPLE) * MULTIPLE) for channels in old)
    new = config | {"block_out_channels": widths}
    if config.get("norm_num_groups") is not None:
        new["norm_num_groups"] = _largest_divisor(math.gcd(*widths), config["norm_num_groups"])
    if config.get("time_embedding_dim") is not None:
        new["time_embedding_dim"] = config["time_embedding_dim"] * widths[0] // old[0]
    heads = config.get("attention_head_dim")
    if isinstance(heads, int):
        new["attention_head_dim"] = _largest_divisor(math.gcd(*_attending(new)), heads)
    elif heads is not None:
        new["attention_head_dim"] = tuple(
            _largest_divisor(channels, head) for channels, head in zip(widths, heads, strict=True)
        )
    return new


def _attending(config: dict[str, Any]) -> tuple[int, ...]:
    """Widths of the levels that have attention; the lowest is the mid block's too."""
    widths, down, up = (
        config["block_out_channels"],
        config.get("down_block_types", ()),
        config.get("up_block_types", ()),
    )
    levels = zip(widths, down, reversed(up), strict=False)
    return (widths[-1], *(width for width, *blocks in levels if any("Attn" in block for block in blocks)))


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)
