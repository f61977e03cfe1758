"""An undivided UNet behind the runtime's `Session`: the one loop samples models before they are ever exported."""

from typing import Any, Literal

import torch

from edgediff.models.load import Model
from edgediff.models.tensors import TorchTensors
from edgediff_runtime.manifest import Graph, Tensor

Shape = tuple[int | Literal["batch"], ...]


class WholeSession(TorchTensors):
    """Runs a UNet of pixels, with classes or without, in eager torch; every step is full.

    Attributes:
        graphs: One, the whole step.
        batch: None: any number of rows.
        device: Where the UNet's weights are.
    """

    batch: int | None = None

    def __init__(self, model: Model, device: torch.device) -> None:
        """Takes the UNet to the device.

        Args:
            model: One that `edgediff.evaluate.comparable.check_model` let pass; its UNet is moved.
            device: Where it is to run.
        """
        self.device = device
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
        tensors["out_sample"] = predict(self._unet, tensors["sample"], tensors["timestep"], tensors.get("class_labels"))


def predict(unet: Any, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
    """What a UNet without text says.

    Args:
        unet: One of diffusers' classes.
        sample: [B, C, H, W].
        timestep: [1].
        class_labels: int64 [B]; None where it has no classes.

    Returns:
        [B, C, H, W].
    """
    text = {"encoder_hidden_states": None} if hasattr(unet.config, "cross_attention_dim") else {}
    out: torch.Tensor = unet(sample, timestep, class_labels=class_labels, **text).sample
    return out
