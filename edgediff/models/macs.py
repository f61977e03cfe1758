"""Operations and parameters of each part, counted and not measured.

Both papers leave the attention matmuls out of their counts, a sixth of SD v1.5; here the two are counted separately.
The parts run on the meta device, so that a geometry needs no weights, and once for each split and shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edgediff.errors import UnsupportedError
from edgediff.models.clockwork import SplitUNet, check_size
from edgediff.models.conditioning import TensorSpec
from edgediff.models.part import Part
from edgediff_runtime.loop import CACHE, LOWRES_FEATURE
from edgediff_runtime.manifest import CONTROLNET, Cost

CONVOLUTION_AND_LINEAR = frozenset({"convolution", "_convolution", "addmm", "mm"})


@dataclass(frozen=True)
class Tally:
    """The cost of a split UNet for one sample.

    Attributes:
        parts: Of each part, and of a ``full`` and a ``cached`` step.
        cache_elements: Elements of the cache.
        tensors: Every tensor of a step by name, on the meta device.
    """

    parts: dict[str, Cost]
    cache_elements: int
    tensors: dict[str, Tensor] = field(compare=False)


def tally(split: SplitUNet, sample_shape: tuple[int, int, int], cond: Mapping[str, TensorSpec]) -> Tally:
    """Runs a copy of the parts on the meta device for a sample of channels, height and width; the result is kept.

    Raises:
        UnsupportedError: The levels do not divide the sample's size, or two parts disagree on a tensor.
    """
    key = (sample_shape, *cond.items())
    if key not in split.tallies:
        split.tallies[key] = _tally(split, sample_shape, cond)
    found: Tally = split.tallies[key]
    return found


def _tally(split: SplitUNet, sample_shape: tuple[int, int, int], cond: Mapping[str, TensorSpec]) -> Tally:
    check_size(sample_shape[1], sample_shape[2], split.factor)
    parts = split.on_meta().parts
    tensors = {
        "sample": torch.empty(1, *sample_shape, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        **{name: spec.empty() for name, spec in cond.items()},
        **{name: torch.empty(shape, device="meta") for each in split.factors for name, shape in each.shapes.items()},
    }
    counts: dict[str, Cost] = {}
    for name, part in parts.items():
        outputs, counts[name] = count(part, tensors)
        for key in outputs.keys() & tensors.keys():
            if outputs[key].shape != tensors[key].shape or outputs[key].dtype != tensors[key].dtype:
                raise UnsupportedError(f"{name} makes {key} of another shape or dtype than the graph before it")
        tensors.update(outputs)
        if name == "lowres":
            tensors[CACHE] = tensors[LOWRES_FEATURE]
    for step, between in (("full", "lowres"), ("cached", "adaptor")):
        run = [counts["highres_in"], counts[between], counts["highres_out"]]
        if step == "full" and CONTROLNET in counts:
            run.append(counts[CONTROLNET])
        counts[step] = Cost(
            sum(c.parameters for c in run), sum(c.macs for c in run), sum(c.macs_attention for c in run)
        )
    return Tally(counts, tensors[LOWRES_FEATURE].numel(), tensors)


def count(part: Part, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cost]:
    """Outputs and cost of a part on the meta device, which is left with hooks on its linear layers."""
    # torch runs a linear layer on a transposed input as a batched matmul, which would count as attention.
    for module in part.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        outputs = part.run(tensors)
    return outputs, Cost(sum(p.numel() for p in part.parameters()), *_split_flops(counter))


def _split_flops(counter: Any) -> tuple[int, int]:
    """Multiply-adds of convolutions and linear layers, and of everything else: attention's batched matmuls."""
    flops = counter.get_flop_counts().get("Global", {})
    plain = sum(count for op, count in flops.items() if str(op).split(".")[-1] in CONVOLUTION_AND_LINEAR)
    return plain // 2, (sum(flops.values()) - plain) // 2
