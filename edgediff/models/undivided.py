"""The undivided UNet as a part: what a full step of the divided one is held to, and what a clock saves time against."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from edgediff.models.part import Part
from edgediff_runtime.manifest import Graph

NAME = "undivided"
ADDED = ("text_embeds", "time_ids")


class Undivided(Part):
    """A diffusers UNet with named tensors in the place of its keywords; weights are shared."""

    def __init__(self, unet: Any, inputs: tuple[str, ...]) -> None:
        """Takes a UNet as it is.

        Args:
            unet: One of diffusers' classes.
            inputs: What it takes: ``sample``, ``timestep`` and the conditioning, as `SplitUNet.inputs` lists them.
        """
        super().__init__(inputs, ("out_sample",))
        self.unet = unet

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the UNet; ``out_sample`` is [B, C, H, W]."""
        given: dict[str, Any] = {name: value for name, value in tensors.items() if name not in ADDED}
        added = {name: tensors[name] for name in ADDED if name in tensors}
        if added:
            given["added_cond_kwargs"] = added
        if isinstance(self.unet, UNet2DConditionModel):
            given.setdefault("encoder_hidden_states", None)  # asked for, also where no layer looks at it
        return {"out_sample": self.unet(**given, return_dict=False)[0]}


def undivided_graph(graphs: tuple[Graph, ...], inputs: tuple[str, ...], file: str = NAME) -> Graph:
    """The undivided UNet as the manifest would list it.

    Args:
        graphs: The graphs of the divided one, which know the shapes.
        inputs: As of `Undivided`.
        file: Where it lies.

    Returns:
        A graph that every step runs.
    """
    tensors: Mapping[str, Any] = {tensor.name: tensor for graph in graphs for tensor in (*graph.inputs, *graph.outputs)}
    return Graph(
        name=NAME,
        file=file,
        frequency="step",
        inputs=tuple(tensors[name] for name in inputs),
        outputs=(tensors["out_sample"],),
    )
