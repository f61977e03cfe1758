"""Layouts as data: which parts of the UNet each graph is made of, and when it runs.

``split`` keeps the four parts apart: a device holds the cache and the skip connections between them. ``pair`` joins
them to a whole full step and a whole cached step, whose shared weights are stored once.
"""

from dataclasses import dataclass

from edgediff.models.adaptors import IdentityAdaptor
from edgediff.models.clockwork import SplitUNet
from edgediff.models.part import Chain, Part
from edgediff.targets.base import Layout
from edgediff_runtime.loop import LOWRES_FEATURE
from edgediff_runtime.manifest import CONTROLNET, Frequency, Graph


@dataclass(frozen=True)
class Packed:
    """A graph of a layout: the parts that it joins, in order, and the steps that it runs in."""

    name: str
    frequency: Frequency
    parts: tuple[str, ...]


LAYOUTS: dict[Layout, tuple[Packed, ...]] = {
    "split": (
        Packed("highres_in", "step", ("highres_in",)),
        Packed("lowres", "full_step", ("lowres",)),
        Packed("adaptor", "cached_step", ("adaptor",)),
        Packed("highres_out", "step", ("highres_out",)),
    ),
    "pair": (
        Packed("full", "full_step", ("highres_in", "lowres", "highres_out")),
        Packed("cached", "cached_step", ("highres_in", "adaptor", "highres_out")),
    ),
}


def packings(divided: SplitUNet, layout: Layout) -> tuple[Packed, ...]:
    """What the graphs of a layout are made of; a ControlNet is one of its own, so that steps can do without it."""
    before = () if divided.controlnet is None else (Packed(CONTROLNET, "full_step", (CONTROLNET,)),)
    return (*before, *LAYOUTS[layout])


def modules(divided: SplitUNet, layout: Layout) -> dict[str, Part]:
    """The modules of a layout's graphs by the graphs' names, in the order of a step; they share the UNet's weights."""
    return {packed.name: _join(divided, packed) for packed in packings(divided, layout)}


def _join(divided: SplitUNet, packed: Packed) -> Part:
    parts = [divided.parts[name] for name in packed.parts]
    if len(parts) == 1:
        return parts[0]
    # The identity adaptor does not change the feature: the step need not return it.
    kept = packed.frequency == "cached_step" and isinstance(divided.adaptor, IdentityAdaptor)
    return Chain(parts, ("out_sample",) if kept else ("out_sample", LOWRES_FEATURE))


def pack(parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout) -> tuple[Graph, ...]:
    """The graphs of a layout, in a step's order, in fp32 with a symbolic batch; the identity adaptor has no file."""
    tensors = {tensor.name: tensor for graph in parts for tensor in (*graph.inputs, *graph.outputs)}
    files = {graph.name: graph.file for graph in parts}
    return tuple(
        Graph(
            name=packed.name,
            file=files.get(packed.name, packed.name),
            frequency=packed.frequency,
            inputs=tuple(tensors[name] for name in module.inputs),
            outputs=tuple(tensors[name] for name in module.outputs),
        )
        for packed, module in zip(packings(divided, layout), modules(divided, layout).values(), strict=True)
    )
