"""A T2I-Adapter beside a UNet (Mou et al. 2023): from a control picture, once, to what is added on the UNet's way down.

It knows nothing of the step: ``t2i_adapter`` is a component of its own, which runs once for a picture, and its features
are inputs of a step as the text's states are. Full steps take all of them, cached ones those of the high-resolution
levels.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter as DiffusersAdapter
from diffusers import UNet2DConditionModel
from torch import nn

from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.conditioning import TensorSpec
from edgediff.models.layers import Layer, flatten
from edgediff.models.model_files import (
    BAD_SETTINGS,
    check_weights,
    fill,
    folder_sha256,
    read_json,
    read_state,
    weight_files,
)
from edgediff.models.part import Part
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import CONTROL_IMAGE, T2I_ADAPTER, Graph, Tensor

CLASS = "T2IAdapter"
KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")
# Channels of a control picture: coloured, or grey.
CHANNELS = (3, 1)
# Of the picture that a new adapter is tried with: more than its levels halve.
TRIED = 64


def feature_names(count: int) -> list[str]:
    """The names of an adapter's features: ``t2i_adapter_0`` for that of the highest level, and so on."""
    return [f"{T2I_ADAPTER}_{i}" for i in range(count)]


@dataclass(frozen=True)
class Place:
    """Where the UNet adds a feature: to what comes out of a layer, and to the skip connection that it leaves.

    Attributes:
        layer: The layer's number on the way down; the middle block comes after the last.
        channels: What the layer gives.
        parts: Of the latent's side, one of which is a side of what it gives.
    """

    layer: int
    channels: int
    parts: int


def feature_places(unet: Any) -> list[Place]:
    """Where diffusers adds an adapter's features, in their order.

    In a level with attention over the text that is before its downsampler, in any other after it; one more feature goes
    to the middle block's result.

    Raises:
        UnsupportedError: The UNet takes none.
    """
    simple = [type(block).__name__ for block in unet.down_blocks if type(block).__name__.startswith("Simple")]
    if not isinstance(unet, UNet2DConditionModel) or simple:
        kind = simple[0] if simple else type(unet).__name__
        raise UnsupportedError(f"a {kind} takes no T2I-Adapter; supported: UNet2DConditionModel of the usual blocks")
    down, mid, _ = flatten(unet)
    places, layers, parts = [], 0, 1
    for level, block, channels in zip(down, unet.down_blocks, unet.config.block_out_channels, strict=True):
        halved = parts * (1 if block.downsamplers is None else 2)
        before = bool(getattr(block, "has_cross_attention", False))
        last = max(i for i, layer in enumerate(level) if isinstance(layer, Layer)) if before else len(level) - 1
        places.append(Place(layers + last, channels, parts if before else halved))
        layers, parts = layers + len(level), halved
    if mid is not None:
        places.append(Place(layers, unet.config.block_out_channels[-1], parts))
    return places


@dataclass(frozen=True)
class Adapter:
    """A T2I-Adapter that was found for a model; its weights are read when it is loaded.

    Attributes:
        path: Its directory.
        config: Its configuration.
        downscale: Pixels of a side of the control picture for one of the latent.
        places: Where each of its features goes.
    """

    path: Path
    config: dict[str, Any]
    downscale: int
    places: tuple[Place, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash over its configuration and its weights."""
        return folder_sha256(self.path)

    def tensors(self, height: int, width: int) -> dict[str, TensorSpec]:
        """What a step is handed of it, with a latent of this size."""
        shapes = [(place.channels, height // place.parts, width // place.parts) for place in self.places]
        names = feature_names(len(shapes))
        return {name: TensorSpec(shape, torch.float32) for name, shape in zip(names, shapes, strict=True)}

    def graph(self, height: int, width: int) -> Graph:
        """Its inputs and outputs, with a symbolic batch."""
        picture = ("batch", int(self.config["in_channels"]), self.downscale * height, self.downscale * width)
        outputs = tuple(
            Tensor(name, "float32", ("batch", *spec.shape)) for name, spec in self.tensors(height, width).items()
        )
        return Graph(T2I_ADAPTER, T2I_ADAPTER, None, (Tensor(CONTROL_IMAGE, "float32", picture),), outputs)


class T2IAdapter(Part):
    """``t2i_adapter``: features [B, C, H, W] of a control picture [B, C, h, w] of 0 to 1.

    They are diffusers' before its adapter_conditioning_scale, bit for bit.
    """

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__((CONTROL_IMAGE,), tuple(feature_names(count)))
        self.net = net
        for pool in (module for module in net.modules() if isinstance(module, nn.AvgPool2d)):
            pool.ceil_mode = False  # sides are even; not every converter has the other

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Makes the features."""
        return dict(zip(self.outputs, self.net(tensors[CONTROL_IMAGE]), strict=True))


def empty_adapter(config: dict[str, Any], path: Path) -> nn.Module:
    """An adapter of diffusers' on the meta device, without weights; a ModelError where its settings make none."""
    try:
        with torch.device("meta"):
            net: nn.Module = DiffusersAdapter.from_config(config)
    except (*BAD_SETTINGS, ZeroDivisionError) as e:
        raise ModelError(f"{path}/config.json cannot be built: {one_line(e)[:300]}") from e
    return net


def adapter_with_weights(config: dict[str, Any], path: Path) -> nn.Module:
    """An adapter of diffusers', float32, in evaluation mode; a ModelError where its weights do not fit."""
    net = empty_adapter(config, path)
    fill(net, {key: tensor.float() for key, tensor in read_state(path).items()}, path, "config.json")
    return net.eval().requires_grad_(False)


def find_t2i_adapter(path: Path, unet: Any) -> Adapter:
    """Finds a T2I-Adapter in a directory that diffusers saved, and checks that its features fit a UNet.

    Raises:
        ModelError: It is missing, damaged, or of another base than the UNet.
        UnsupportedError: It is of another kind, or the UNet takes none.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is no directory; expected a T2I-Adapter that diffusers saved")
    config = read_json(path / "config.json")
    if config.get("_class_name") != CLASS:
        raise UnsupportedError(f"{path}/config.json is of class {config.get('_class_name')!r}; supported: {CLASS}")
    for key, usual, known in (("adapter_type", KINDS[0], KINDS), ("in_channels", 3, CHANNELS)):
        if config.setdefault(key, usual) not in known:
            choices = ", ".join(map(str, known))
            raise UnsupportedError(f"{path}/config.json has {key} {config[key]!r}; supported: {choices}")
    check_weights(path, weight_files(path))
    net: Any = empty_adapter(config, path)
    places = feature_places(unet)
    unshuffled = int(net.downscale_factor)
    side = TRIED * unshuffled
    with torch.device("meta"), torch.no_grad():
        made = net(torch.empty(1, config["in_channels"], side, side))
    # The first feature says how much larger than the latent the picture is.
    downscale, rest = divmod(unshuffled, places[0].parts)
    has = [(feature.shape[1], side // feature.shape[2]) for feature in made]
    wants = [(place.channels, downscale * place.parts) for place in places[: len(has)]]
    if rest or has != wants:
        raise ModelError(
            f"{path} is for another UNet: its features are {_spell(has)}, the model takes {_spell(wants)} (channels/"
            "pixels of a side for one); take one of the same base"
        )
    return Adapter(path, config, downscale, tuple(places[: len(has)]))


def _spell(features: list[tuple[int, int]]) -> str:
    return ", ".join(f"{channels}/{pixels}" for channels, pixels in features)
