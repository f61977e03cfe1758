"""UNets that follow from another by leaving something out: the Efficient UNet (Clockwork Diffusion).

The modules that stay are shared with the given UNet, not copied: the result costs no memory, works with weights on the
meta device, and moving or training one of the two changes the other. ``copy.deepcopy`` separates them.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from edgediff.errors import UnsupportedError
from edgediff.models.clockwork import follow_mode
from edgediff.models.slim import plain_config
from edgediff.models.spectral import SpectralUNet2DConditionModel, keep_divided

# The highest level's blocks, and the same without their transformers.
WITH_TRANSFORMERS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
WITHOUT = ("DownBlock2D", "UpBlock2D")


def efficient(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The Efficient UNet of a UNet: no transformers at the highest resolution (Clockwork Diffusion, table 3).

    Of SD v1.5's sixteen transformers this leaves out five, two on the way down and three on the way up. The rest was
    trained with them and needs training without. The given UNet is not changed; the new one's configuration says what
    it leaves out.

    Raises:
        UnsupportedError: It is no ``UNet2DConditionModel``, or its highest level has no transformers.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise UnsupportedError(
            f"no Efficient UNet of a {type(unet).__name__}; expected a UNet2DConditionModel with transformers on its "
            "highest level"
        )
    down, up = unet.down_blocks[0], unet.up_blocks[-1]
    found = (type(down).__name__, type(up).__name__)
    if found != WITH_TRANSFORMERS:
        raise UnsupportedError(
            f"no Efficient UNet of one whose highest level is {' and '.join(found)}; expected "
            f"{' and '.join(WITH_TRANSFORMERS)}, whose transformers are left out"
        )
    config = plain_config(unet)
    config["down_block_types"] = [WITHOUT[0], *config["down_block_types"][1:]]
    config["up_block_types"] = [*config["up_block_types"][:-1], WITHOUT[1]]
    with torch.device("meta"):
        slim: Any = type(unet)(**config)
    for name, module in unet.named_children():
        if name not in ("down_blocks", "up_blocks"):
            setattr(slim, name, module)
    slim.down_blocks = nn.ModuleList([_take_over(slim.down_blocks[0], down), *unet.down_blocks[1:]])
    slim.up_blocks = nn.ModuleList([*unet.up_blocks[:-1], _take_over(slim.up_blocks[-1], up)])
    if isinstance(slim, SpectralUNet2DConditionModel):
        keep_divided(slim)
    follow_mode(slim, unet)
    return slim


def _take_over(block: nn.Module, given: nn.Module) -> nn.Module:
    """Replaces the layers of a block without transformers by those of one with them."""
    for name, _ in block.named_children():
        setattr(block, name, getattr(given, name))
    return block
