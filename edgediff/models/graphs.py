"""The four parts as graphs: names, shapes and when each one runs, as the loop and the manifest want to know it."""

from typing import Literal

import torch

from edgediff.errors import UnsupportedError
from edgediff.models.adaptors import TEXT_INPUTS, AdaptorShape, IdentityAdaptor
from edgediff.models.clockwork import SplitUNet, check_size
from edgediff.models.conditioning import TensorSpec
from edgediff.models.load import Model
from edgediff_runtime.loop import CACHE, LOWRES_FEATURE
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
    parts = split.on_meta().parts
    with torch.device("meta"), torch.no_grad():
        tensors = {"sample": torch.empty(2, *model.sample_shape), "timestep": torch.empty(1)}
        for name, spec in model.conditioning.tensors.items():
            tensors[name] = torch.empty(2, *spec.shape, dtype=spec.dtype)
        graphs = []
        for name, part in parts.items():
            inputs = {key: tensors[key] for key in part.inputs}
            outputs = dict(zip(part.outputs, part(*inputs.values()), strict=True))
            for key in outputs.keys() & tensors.keys():
                if outputs[key].shape != tensors[key].shape or outputs[key].dtype != tensors[key].dtype:
                    raise UnsupportedError(f"{name} makes {key} of another shape or dtype than the graph before it")
            tensors.update(outputs)
            if name == "lowres":
                tensors[CACHE] = tensors[LOWRES_FEATURE]
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


def adaptor_shape(split: SplitUNet, model: Model) -> AdaptorShape:
    """What an adaptor must fit at a cut.

    Args:
        split: The divided UNet.
        model: What it was divided from.

    Returns:
        The shapes of the features that the adaptor is given.

    Raises:
        UnsupportedError: As `graph_list`.
    """
    graphs = graph_list(split, model)
    shapes = {tensor.name: tensor.shape[1:] for graph in graphs for tensor in (*graph.inputs, *graph.outputs)}
    looked_at = {tensor.name for graph in graphs if graph.name != "highres_in" for tensor in graph.inputs}
    text = next((name for name in TEXT_INPUTS if name in looked_at), None)
    return AdaptorShape(
        highres=_sizes(shapes["highres_feature"]),
        lowres=_sizes(shapes[LOWRES_FEATURE]),
        emb=int(shapes["emb"][0]),
        text=None if text is None else (text, int(shapes[text][-1])),
    )


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, int, int]:
    channels, height, width = (int(size) for size in shape)
    return channels, height, width


def _tensor(name: str, value: torch.Tensor) -> Tensor:
    shape = tuple(value.shape) if name == "timestep" else ("batch", *value.shape[1:])
    return Tensor(name=name, dtype=DTYPES[value.dtype], shape=shape)


def tensor_entry(name: str, spec: TensorSpec) -> Tensor:
    """A conditioning tensor as the manifest lists it."""
    return Tensor(name, DTYPES[spec.dtype], ("batch", *spec.shape))
