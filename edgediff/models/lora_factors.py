"""A LoRA file of diffusers' or kohya's names as what a bundle's graphs take: factors alone, by the layers' names.

What the file scales a layer by is multiplied into ``up``. The names of what is written are those that diffusers reads.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from edgediff.errors import UnsupportedError
from edgediff.models.lora import UNET, Layer, Lora
from edgediff_runtime.low_rank import DOWN, PREFIX, UP, check_layers
from edgediff_runtime.manifest import LoraInputs


def lora_factors(path: Path, inputs: LoraInputs, unet_only: bool = False) -> dict[str, np.ndarray]:
    """Reads a LoRA as factors of a bundle's layers, float32 by the names of the runtime's files.

    Args:
        inputs: What the bundle's graphs take.
        unet_only: Leave layers of text encoders out, which are no inputs of a bundle; else they are refused.

    Raises:
        ModelError: The file is damaged, or no LoRA.
        UnsupportedError: It is an adapter of another kind, or has layers of text encoders.
        RequestError: It does not fit the bundle: another base, a higher rank, or layers that are no inputs.
    """
    names = [layer.name for layers in inputs.layers.values() for layer in layers]
    parts = Lora(path, 1.0, SimpleNamespace(layers_per_block=_layers_per_block(names))).layers()
    texts = sorted(parts.keys() - {UNET})
    if texts and not unet_only:
        raise UnsupportedError(
            f"{path} has layers of {texts[0]}, which are no inputs of a bundle; export with --lora FILE to fuse them, "
            "or leave them out with --unet-only"
        )
    found: dict[str, np.ndarray] = {}
    for name, layer in parts.get(UNET, {}).items():
        down, up = _factors(layer)
        found |= {f"{PREFIX}{name}{DOWN}": down, f"{PREFIX}{name}{UP}": up}
    check_layers(f"lora {path}", found, inputs)
    return found


def _factors(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """``down`` [r, in] and ``up`` [out, r]; those of a convolution are left with its kernel."""
    down, up = layer.down.float(), layer.up.float() * layer.scale
    if down.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):  # a linear layer, as old files have it
        down, up = down.flatten(1), up.flatten(1)
    return down.contiguous().numpy(), up.contiguous().numpy()


def _layers_per_block(names: list[str]) -> int:
    """Of a UNet, by the names of its layers of attention: kohya's names of XL are read with it."""
    places = [re.match(r"down_blocks\.\d+\.attentions\.(\d+)\.", name) for name in names]
    return 1 + max((int(found[1]) for found in places if found is not None), default=0)
