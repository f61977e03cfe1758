"""The four parts as graphs: names, shapes and when each one runs, as the loop and the manifest list them."""

from edgediff.config.choices import Cut
from edgediff.models.adaptors import TEXT_INPUTS, AdaptorShape, IdentityAdaptor
from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.controlnet import control_part
from edgediff.models.load import Model
from edgediff.models.macs import tally
from edgediff.models.part import Part
from edgediff.models.torch_session import graph_tensor
from edgediff_runtime.loop import LOWRES_FEATURE
from edgediff_runtime.manifest import CONTROLNET, Frequency, Graph, Tensor

FREQUENCY: dict[str, Frequency] = {
    CONTROLNET: "full_step",
    "highres_in": "step",
    "lowres": "full_step",
    "adaptor": "cached_step",
    "highres_out": "step",
}


def divide(model: Model, cut: Cut, adaptor: Part | None = None, lora_rank: int | None = None) -> SplitUNet:
    """Divides a model's UNet as what steers it asks for; arguments and errors are those of `split`."""
    features = 0 if model.t2i_adapter is None else len(model.t2i_adapter.places)
    return split(
        model.unet, cut, adaptor, controlnet=control_part(model.control), features=features, injects=model.injects,
        lora_rank=lora_rank,
    )  # fmt: skip


def graph_list(split: SplitUNet, model: Model) -> tuple[Graph, ...]:
    """Lists the four parts of a divided UNet with the shapes of their tensors, in fp32, in the order of a step.

    A graph's `file` is its name until a target writes it; None for the identity adaptor, which is not run.

    Raises:
        UnsupportedError: The levels do not divide the sample's size, or two graphs disagree on a tensor.
    """
    tensors = tally(split, model.sample_shape, model.step_tensors).tensors
    return tuple(
        Graph(
            name=name,
            file=name if not isinstance(part, IdentityAdaptor) else None,
            frequency=FREQUENCY[name],
            inputs=tuple(graph_tensor(key, tensors[key]) for key in part.inputs),
            outputs=tuple(graph_tensor(key, tensors[key]) for key in part.outputs),
        )
        for name, part in split.parts.items()
    )


def adaptor_shape(split: SplitUNet, model: Model) -> AdaptorShape:
    """What an adaptor must fit at a cut; raises as `graph_list`."""
    tensors = tally(split, model.sample_shape, model.step_tensors).tensors
    looked_at = {*split.lowres.inputs, *split.highres_out.inputs}
    text = next((name for name in TEXT_INPUTS if name in looked_at), None)
    return AdaptorShape(
        highres=_sizes(tensors["highres_feature"].shape),
        lowres=_sizes(tensors[LOWRES_FEATURE].shape),
        emb=tensors["emb"].shape[1],
        text=None if text is None else (text, tensors[text].shape[-1]),
    )


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    _, channels, height, width = shape
    return channels, height, width


def conditioning_tensors(model: Model) -> tuple[Tensor, ...]:
    """The inputs of a step besides the sample and the timestep, as the manifest lists them."""
    return tuple(graph_tensor(name, spec.empty()) for name, spec in model.step_tensors.items())
