"""A part of a divided UNet: a module whose inputs and outputs have names.

Graph exporters want positional tensors, wiring wants names. A part has both, so that one list of names serves torch,
the exporter, the manifest and every runtime.
"""

import torch
from torch import nn


class Part(nn.Module):
    """One of ``highres_in``, ``lowres``, ``adaptor``, ``highres_out``.

    Attributes:
        inputs: Names of the tensors that `forward` takes, in order.
        outputs: Names of the tensors that it returns, in order.
    """

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the part on positional tensors, in the order of `inputs`."""
        outputs = self.compute(dict(zip(self.inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self.outputs)

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the part on named tensors; what a subclass writes."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")
