"""A ControlNet beside a UNet (Zhang et al. 2023): from a control image to residuals for the UNet's skip connections.

It is a part of a step like the UNet's own four: ``controlnet`` runs on full steps, and what it made stays for the
cached ones, whose graphs take the residuals of the high-resolution levels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import nn

from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.conditioning import TensorSpec
from edgediff.models.embedding import StepEmbedding
from edgediff.models.layers import AnyLayer, Mid, layers_of
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
from edgediff_runtime.manifest import CONTROL_IMAGE, CONTROL_SCALE, CONTROLNET, numbered

MID = "control_mid"
TEXT = "encoder_hidden_states"
# What has to be the UNet's own, so that residuals fit its skip connections and the prompt fits both.
SAME = (
    "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
    "down_block_types",
)  # fmt: skip


def control_names(count: int) -> list[str]:
    """The names of the residuals for skip connections: ``control_0`` for conv_in's output, and so on."""
    return [f"control_{i}" for i in range(count)]


@dataclass(frozen=True)
class Control:
    """A ControlNet that was loaded for a model.

    Attributes:
        path: Its directory.
        net: diffusers' own, float32, in evaluation mode.
        sha256: Hash over its configuration and its weights.
    """

    path: Path
    net: ControlNetModel
    sha256: str

    @property
    def downscale(self) -> int:
        """Pixels of a side of the control image for one of the latent."""
        return int(2 ** (len(self.net.config.conditioning_embedding_out_channels) - 1))

    def tensors(self, height: int, width: int, i: int = 0) -> dict[str, TensorSpec]:
        """What a step is handed for it, the i-th of a bundle, with a latent of this size."""
        image = (int(self.net.config.conditioning_channels), self.downscale * height, self.downscale * width)
        specs = {CONTROL_IMAGE: TensorSpec(image, torch.float32), CONTROL_SCALE: TensorSpec((), torch.float32)}
        return {numbered(name, i): spec for name, spec in specs.items()}


class ControlNet(Part):
    """``controlnet``: residuals [B, C, H, W] for every skip connection and for the middle block's output.

    They are multiplied by ``control_scale`` [B], which diffusers calls controlnet_conditioning_scale. diffusers'
    ControlNetModel comes to the same bit for bit.
    """

    def __init__(self, net: ControlNetModel) -> None:
        embedding = StepEmbedding(net)
        layers: list[AnyLayer] = [layer for block in net.down_blocks for layer in layers_of(block, "down")]
        mid = None if net.mid_block is None else Mid(net.mid_block)
        inputs = ["sample", *embedding.inputs]
        if TEXT not in inputs and any(layer.needs_text for layer in (*layers, *([] if mid is None else [mid]))):
            inputs.append(TEXT)
        residuals = (*control_names(len(net.controlnet_down_blocks)), MID)
        super().__init__((*inputs, CONTROL_IMAGE, CONTROL_SCALE), residuals)
        self.embedding = embedding
        self.conv_in = net.conv_in
        self.of_image = net.controlnet_cond_embedding
        self.layers = nn.ModuleList(layers)
        self.mid = mid
        self.down_convs = net.controlnet_down_blocks
        self.mid_conv = net.controlnet_mid_block

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs its way down and its middle."""
        sample = tensors["sample"]
        emb = self.embedding(sample, tensors)
        text = tensors.get(TEXT)
        if self.embedding.projects_text:
            text = self.embedding.project_text(tensors[TEXT])
        x = self.conv_in(sample) + self.of_image(tensors[CONTROL_IMAGE])
        skips = [x]
        for layer in self.layers:
            x = layer(x, skips, emb, text)
        if self.mid is not None:
            x = self.mid(x, skips, emb, text)
        scale = tensors[CONTROL_SCALE].reshape(-1, 1, 1, 1)
        made = [conv(skip) * scale for conv, skip in zip(self.down_convs, skips, strict=True)]
        return dict(zip(self.outputs, [*made, self.mid_conv(x) * scale], strict=True))


class ControlNets(Part):
    """``controlnet`` of several: the residuals of all of them added up, as diffusers' MultiControlNetModel does.

    The second one takes ``control_image_2`` and ``control_scale_2``, and so on.
    """

    def __init__(self, nets: Sequence[ControlNetModel]) -> None:
        parts = [ControlNet(net) for net in nets]
        renamed = [{name: numbered(name, i) for name in (CONTROL_IMAGE, CONTROL_SCALE)} for i in range(len(parts))]
        each = zip(parts, renamed, strict=True)
        inputs = dict.fromkeys(names.get(name, name) for part, names in each for name in part.inputs)
        super().__init__(tuple(inputs), parts[0].outputs)
        self.parts = nn.ModuleList(parts)
        self.renamed = renamed

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs each, and adds."""
        made: dict[str, torch.Tensor] = {}
        for part, names in zip(self.parts, self.renamed, strict=True):
            assert isinstance(part, ControlNet)
            own = part.run(tensors | {name: tensors[said] for name, said in names.items()})
            made = {name: made[name] + value for name, value in own.items()} if made else own
        return made


def control_part(control: Sequence[Control]) -> Part | None:
    """What makes the residuals of so many ControlNets; None where there is none."""
    nets = [each.net for each in control]
    if not nets:
        return None
    return ControlNet(nets[0]) if len(nets) == 1 else ControlNets(nets)


def control_hashes(control: Sequence[Control]) -> dict[str, str]:
    """The hash of each, as a bundle names them: ``controlnet``, ``controlnet_2`` and so on."""
    return {numbered(CONTROLNET, i): each.sha256 for i, each in enumerate(control)}


def load_control(path: Path, unet: Any) -> Control:
    """Loads a ControlNet from a directory that diffusers saved.

    Raises:
        ModelError: It is missing, damaged, or of another base than the UNet.
        UnsupportedError: It is of another kind, or has a setting that edgediff does not handle.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is no directory; expected a ControlNet that diffusers saved")
    config = read_json(path / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise UnsupportedError(
            f"{path}/config.json is of class {config.get('_class_name')!r}; supported: ControlNetModel"
        )
    for key in SAME:
        own, other = _plain(unet.config.get(key)), _plain(config.get(key))
        if key in config and own != other:
            raise ModelError(
                f"{path} is for another UNet: its {key} is {other!r}, the model's {own!r}; take one of the same base"
            )
    for key, value in (("controlnet_conditioning_channel_order", "rgb"), ("global_pool_conditions", False)):
        if config.get(key, value) != value:
            raise UnsupportedError(f"{path}/config.json has {key} {config[key]!r}; supported: {value!r}")
    check_weights(path, weight_files(path))
    try:
        net = ControlNetModel.from_config(config)
    except BAD_SETTINGS as e:
        raise ModelError(f"{path}/config.json cannot be built: {one_line(e)[:300]}") from e
    fill(net, {key: tensor.float() for key, tensor in read_state(path).items()}, path, "config.json")
    return Control(path, net.eval().requires_grad_(False), folder_sha256(path))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
