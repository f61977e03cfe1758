"""An undivided UNet behind the runtime's `Session`: the one loop samples models before they are ever exported."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from edgediff.models.load import Model
from edgediff.models.tensors import TorchTensors
from edgediff_runtime.manifest import Graph, Tensor

Shape = tuple[int | Literal["batch"], ...]


class WholeSession(TorchTensors):
    """Runs a UNet with classes or with nothing to look at, in eager torch; every step is full.

    Attributes:
        graphs: One, the whole step.
        batch: Rows that go through the UNet at once; None for all of them.
        device: Where the UNet's weights are.
    """

    def __init__(self, model: Model, device: torch.device, batch: int | None = None) -> None:
        """Takes the UNet to the device.

        Args:
            model: One that does not look at text; its UNet is moved.
            device: Where it is to run.
            batch: Rows at once; None for all of them.
        """
        self.device = device
        self.batch = batch
        self._unet = model.unet.to(device)
        shape: Shape = ("batch", *model.sample_shape)
        inputs = [Tensor("sample", "float32", shape), Tensor("timestep", "float32", (1,))]
        if model.conditioning.kind == "class":
            inputs.append(Tensor("class_labels", "int64", ("batch",)))
        outputs = (Tensor("out_sample", "float32", shape),)
        self.graphs: tuple[Graph, ...] = (
            Graph("full", file="full", frequency="step", inputs=tuple(inputs), outputs=outputs),
        )

    @torch.no_grad()
    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs the whole step.

        Args:
            graph: The one that there is.
            tensors: By name; ``out_sample`` is added.
        """
        tensors["out_sample"] = predict(self._unet, tensors["sample"], tensors["timestep"], tensors)


def predict(unet: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a UNet without text says.

    Args:
        unet: One of diffusers' classes.
        sample: [B, C, H, W].
        timestep: [1] or [B].
        cond: By name; of it ``class_labels``, int64 [B], is handed on where there is one.

    Returns:
        [B, C, H, W].
    """
    # The conditional class wants it said that there is no text.
    text = {"encoder_hidden_states": None} if hasattr(unet.config, "cross_attention_dim") else {}
    out: torch.Tensor = unet(sample, timestep, class_labels=cond.get("class_labels"), **text).sample
    return out
