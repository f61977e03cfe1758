"""What Apple's Swift pipeline (apple/ml-stable-diffusion) calls: names and shapes, and the modules that have them.

It calls the default function of each package. Of the UNet and the autoencoder it takes the only output, of a text
encoder outputs by their names; token ids and timesteps are float32.
"""

from collections.abc import Iterable

import msgspec
import torch

from edgediff.models.part import Chain, Part
from edgediff_runtime.manifest import SAMPLE, TEXT, TIMESTEP, Graph, Tensor

OUTPUT = "out_sample"
# What it hands to a UNet: one that takes anything else, or more channels than it gives, it cannot call.
INPUTS = {SAMPLE, TIMESTEP, TEXT, "text_embeds", "time_ids"}


def undivided_graph(graphs: Iterable[Graph], file: str) -> Graph | None:
    """The undivided step as a function of a package; None where Apple's pipeline could not call it.

    Args:
        graphs: Those of a layout, of a fixed batch B.

    Returns:
        ``sample`` [B, C, H, W], ``timestep`` [B], ``encoder_hidden_states`` [B, D, 1, S], for SDXL also ``text_embeds``
        and ``time_ids`` -> ``out_sample`` [B, C, H, W], which the package calls ``noise_pred``; all float32.
    """
    full = [graph for graph in graphs if graph.runs(full=True)]
    made = {tensor.name: tensor for graph in full for tensor in graph.outputs}
    inputs = {tensor.name: tensor for graph in full for tensor in graph.inputs if tensor.name not in made}
    out = msgspec.structs.replace(made[OUTPUT], stored_as="noise_pred")
    if TEXT not in inputs or not inputs.keys() <= INPUTS or inputs[SAMPLE].shape != out.shape:
        return None
    rows, tokens, width = inputs[TEXT].shape
    inputs[TIMESTEP] = Tensor(TIMESTEP, "float32", (rows,))
    inputs[TEXT] = Tensor(TEXT, "float32", (rows, width, 1, tokens))
    name = "undivided"
    return Graph(name, file, "step", tuple(inputs.values()), (out,), function=name)


class SwiftStep(Part):
    """The undivided step of `undivided_graph`, made of the modules of a full step."""

    def __init__(self, graph: Graph, full: Iterable[Part]) -> None:
        super().__init__(tuple(tensor.name for tensor in graph.inputs), (OUTPUT,))
        self.step = Chain(full, (OUTPUT,))

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the step on a text of channels before tokens."""
        text = tensors[TEXT].squeeze(2).transpose(1, 2)
        return self.step.compute({**tensors, TEXT: text})


def encoder_names(outputs: Iterable[Tensor]) -> dict[str, str]:
    """What Apple's pipeline calls outputs of SDXL's text encoders; none for other models, where names are ours.

    >>> encoder_names(Tensor(name, "float32", ()) for name in ("text_embeds", "hidden_states.0", "hidden_states.1"))
    {'hidden_states.1': 'hidden_embeds', 'text_embeds': 'pooled_outputs'}
    """
    names = [tensor.name for tensor in outputs]
    states = [name for name in names if name.startswith("hidden_states.")]
    if not states:
        return {}
    return {states[-1]: "hidden_embeds", "text_embeds" if "text_embeds" in names else "pooler_output": "pooled_outputs"}


class FloatIds(Part):
    """A text encoder that takes its token ids as float32."""

    def __init__(self, encoder: Part) -> None:
        super().__init__(encoder.inputs, encoder.outputs)
        self.encoder = encoder

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encodes float32 [B, S]."""
        return self.encoder.compute({name: ids.to(torch.int32) for name, ids in tensors.items()})
