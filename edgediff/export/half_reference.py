"""What torch computes with weights rounded to fp16: the sharp half of an fp16 graph's reference.

A graph whose results are rounded to fp16 is some 50 to 70 dB of fp32 torch whether it is right or slightly wrong. The
same graph in fp32 arithmetic, held to torch on equally rounded weights and inputs, is as exact as fp32 is: a wrong
constant shows.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from diffusers.models.embeddings import GaussianFourierProjection

from edgediff.bundle.reference import Reference, step_inputs
from edgediff.models.clockwork import SplitUNet
from edgediff.models.part import Part
from edgediff.models.spectral import WaveletGating
from edgediff.targets.layout import modules
from edgediff_runtime import Manifest


@torch.no_grad()
def with_half_weights(module: Part) -> Part:
    """Copies a module and rounds its weights to fp16, as an fp16 graph has them.

    Args:
        module: Left as it was.

    Returns:
        The copy, in fp32 arithmetic, the taps of wavelets rounded too. The frequencies of Fourier features stay exact:
        they are on the timestep's path.
    """
    rounded = copy.deepcopy(module)
    exact = {id(p) for m in rounded.modules() if isinstance(m, GaussianFourierProjection) for p in m.parameters()}
    for parameter in rounded.parameters():
        if id(parameter) not in exact:
            parameter.copy_(parameter.half().float())
    for gating in (m for m in rounded.modules() if isinstance(m, WaveletGating)):
        gating.taps = torch.float16
    return rounded


@torch.no_grad()
def half_outputs(manifest: Manifest, divided: SplitUNet, reference: Reference, say: Callable[[str], None]) -> Reference:
    """Adds to a reference what the graphs of fp16 targets give in fp32 arithmetic on rounded weights.

    Args:
        manifest: The draft.
        divided: The divided UNet; left as it was.
        reference: What fp32 torch computed.
        say: Told what is being done.

    Returns:
        The reference, with `half` filled where a target is fp16.
    """
    found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for target in manifest.targets:
        unet = target.unet
        if unet.dtype != "fp16" or unet.layout is None:
            continue
        parts = modules(divided, unet.layout)
        for graph in unet.graphs:
            if graph.file is None:
                continue
            say(f"reference with weights of fp16: {graph.name}")
            module = with_half_weights(parts[graph.name])
            for step in reference.steps:
                if graph.runs(step.full):
                    inputs = step_inputs(step, graph)
                    given = [torch.from_numpy(inputs[name].astype(np.float32)) if inputs[name].dtype == np.float16
                             else torch.from_numpy(inputs[name]) for name in module.inputs]  # fmt: skip
                    made = zip(module.outputs, module(*given), strict=True)
                    found[step.index, graph.name] = {name: value.numpy() for name, value in made}
            del module
    return replace(reference, half=found)
