"""The four parts as graphs: names, shapes and when each one runs, as the loop and the manifest want to know it."""

from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from edgediff.errors import UnsupportedError
from edgediff.models.adaptors import IdentityAdaptor
from edgediff.models.clockwork import SplitUNet, check_size
from edgediff.models.load import Model
from edgediff_runtime.manifest import Frequency, Graph, Tensor

FREQUENCY: dict[str, Frequency] = {
    "highres_in": "step",
    "lowres": "full_step",
    "adaptor": "cached_step",
    "highres_out": "step",
}
DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {torch.float32: "float32", torch.int64: "int64"}


def graph_list(split: SplitUNet, model: Model) -> tuple[Graph, ...]:
    """Lists the four parts of a divided UNet with the shapes of their tensors, in fp32.

    Args:
        split: The divided UNet.
        model: What it was divided from.

    Returns:
        The graphs in the order in which a step runs them. What a graph's `file` says is only whether there is anything
        to run: the identity adaptor has none, the others have their name until a target gives them one.

    Raises:
        UnsupportedError: The levels do not divide the sample's size, or two graphs disagree on a tensor.
    """
    check_size(*model.sample_shape[1:], split.factor)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = {"sample": torch.empty(2, *model.sample_shape), "timestep": torch.empty(1)}
        for name, spec in model.conditioning.tensors.items():
            tensors[name] = torch.empty(2, *spec.shape, dtype=spec.dtype)
        graphs = []
        for name, part in split.parts.items():
            inputs = {key: tensors[key] for key in part.inputs}
            outputs = dict(zip(part.outputs, part(*inputs.values()), strict=True))
            for key in outputs.keys() & tensors.keys():
                if outputs[key].shape != tensors[key].shape or outputs[key].dtype != tensors[key].dtype:
                    raise UnsupportedError(f"{name} makes {key} of another shape or dtype than the graph before it")
            tensors.update(outputs)
            graphs.append(
                Graph(
                    name=name,
                    file=name if not isinstance(part, IdentityAdaptor) else None,
                    frequency=FREQUENCY[name],
                    inputs=tuple(_tensor(key, value) for key, value in inputs.items()),
                    outputs=tuple(_tensor(key, value) for key, value in outputs.items()),
                )
            )
    return tuple(graphs)


def _tensor(name: str, value: torch.Tensor) -> Tensor:
    shape = tuple(value.shape) if name == "timestep" else ("batch", *value.shape[1:])
    return Tensor(name=name, dtype=DTYPES[value.dtype], shape=shape)
