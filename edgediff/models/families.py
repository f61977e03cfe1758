"""UNets that follow from another by leaving something out: the Efficient UNet (Clockwork Diffusion).

What stays is the given UNet's own modules, nothing is copied: the result costs no memory, works where weights lie on
the meta device, and moving or training one of the two changes the other. ``copy.deepcopy`` parts them.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from edgediff.errors import UnsupportedError
from edgediff.models.spectral import SpectralUNet2DConditionModel, keep_divided

# The highest level's blocks, and the same without their transformers.
WITH_TRANSFORMERS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
WITHOUT = ("DownBlock2D", "UpBlock2D")


def efficient(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The Efficient UNet of a UNet: no transformers at the highest resolution (Clockwork Diffusion, table 3).

    Of SD v1.5's sixteen transformers that leaves five out, two on the way down and three on the way up. What stays was
    trained with them and wants training without.

    The given UNet is left as it was; the new one's configuration says what it left out.

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
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
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
    own = {id(module) for module in unet.modules()}
    for module in slim.modules():
        if id(module) not in own:
            module.training = unet.training
    return slim


def _take_over(block: nn.Module, given: nn.Module) -> nn.Module:
    """Puts the layers of a block with transformers in the place of those of one without."""
    for name, _ in block.named_children():
        setattr(block, name, getattr(given, name))
    return block
