"""What torch computes with rounded weights and constants: the sharp half of the reference of graphs that round.

A graph whose results are rounded to fp16 is about 50 to 70 dB from fp32 torch, whether it is right or slightly wrong;
one whose weights are in four bits is at 30. The same graph in fp32 arithmetic, compared with torch on equally rounded
weights, constants and inputs, is as exact as fp32: a wrong constant shows.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import GaussianFourierProjection, Timesteps
from torch import nn
from torch.overrides import TorchFunctionMode

from edgediff.bundle.reference import Reference, step_inputs
from edgediff.errors import UnsupportedError
from edgediff.models.clockwork import SplitUNet
from edgediff.models.part import Part
from edgediff.models.spectral import WaveletGating
from edgediff.models.stored_weights import StoredWeights
from edgediff.targets import TARGETS
from edgediff.targets.base import LARGEST_HALF, HalfConstants
from edgediff.targets.layout import modules
from edgediff_runtime import Manifest
from edgediff_runtime.manifest import Target

ARITHMETIC = {
    "add", "add_", "__add__", "__radd__", "sub", "sub_", "rsub", "__sub__", "__rsub__", "mul", "mul_", "multiply",
    "__mul__", "__rmul__", "__rtruediv__",
}  # fmt: skip
DIVISIONS = {"div", "div_", "divide", "true_divide", "__truediv__"}
NORMS = ("group_norm", "layer_norm")


class Rounding(TorchFunctionMode):
    """Rounds a module's weights, and numbers that its code holds, as a graph of a target stores them.

    A weight is rounded where a function of torch takes it, so that there is no second copy of them all.
    """

    def __init__(self, constants: HalfConstants | None, weights: StoredWeights | None) -> None:
        """Takes how an fp16 graph holds numbers, None where it is fp32, and what weights are stored as."""
        super().__init__()
        self.constants = constants
        self.weights = weights
        self.is_exact = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch with rounded weights and numbers."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if self.is_exact:
            return func(*args, **kwargs)
        if name == "__get__":  # an attribute: most say nothing of the numbers
            made = func(*args, **kwargs)
            is_weight = isinstance(args[0], nn.Parameter) and isinstance(made, torch.Tensor)
            return func(self._rounded(args[0])) if is_weight and made.is_floating_point() else made
        args = [self._rounded(value) for value in args]
        kwargs = {key: self._rounded(value) for key, value in kwargs.items()}
        if self.constants is None:
            return func(*args, **kwargs)
        if name in ARITHMETIC:
            args = [_half(value) if _is_number(value) else value for value in args]
        elif name in DIVISIONS and len(args) > 1 and _is_number(args[1]):
            divisor = _half(args[1]) if self.constants.divides else 1 / _half(1 / args[1])
            return func(args[0], divisor, **kwargs)
        elif name in NORMS and self.constants.rounds_epsilon:
            # eps is the fifth argument of both where it is not named.
            if "eps" in kwargs:
                kwargs["eps"] = _half(kwargs["eps"])
            else:
                args = [*args[:4], _half(args[4] if len(args) > 4 else 1e-5), *args[5:]]
        elif name == "scaled_dot_product_attention":
            how = self.constants.attention_scale
            kwargs["scale"] = self._attention_scale(how, kwargs.get("scale"), args[0].shape[-1])
        return func(*args, **kwargs)

    def _rounded(self, value: Any) -> Any:
        """A weight as it is stored; anything else as it is."""
        if not (isinstance(value, nn.Parameter) and value.is_floating_point()):
            return value
        stored = None if self.weights is None else self.weights.rounded(value)
        weight = value if stored is None else stored
        return weight if self.constants is None else weight.half().float()

    @staticmethod
    def _attention_scale(how: str, given: float | None, width: int) -> float | None:
        if given is None and how == "exact":
            return None
        scale = 1 / math.sqrt(width) if given is None else given
        return _half(math.sqrt(scale)) ** 2 if how == "root" else _half(scale)


class RoundedPart(Part):
    """A part with rounded weights and constants, in fp32 arithmetic; the weights themselves are shared.

    The timestep's frequencies, and what is computed of them up to sine and cosine, stay exact, as they do in a program.
    """

    def __init__(
        self,
        part: Part,
        constants: HalfConstants | None,
        weights: StoredWeights | None,
        component: str = "unet",
    ) -> None:
        """Takes a part of a component; an UnsupportedError names a weight that fp16 does not hold.

        Args:
            constants: How an fp16 graph holds numbers; None where the graph is fp32.
            weights: What weights are stored as.
        """
        super().__init__(part.inputs, part.outputs)
        self.part = copy.deepcopy(part, {id(parameter): parameter for parameter in part.parameters()})
        self.rounding = Rounding(constants, weights)
        if constants is None:
            return
        exact = [m for m in self.part.modules() if isinstance(m, GaussianFourierProjection | Timesteps)]
        kept = {id(parameter) for module in exact for parameter in module.parameters()}
        with torch.no_grad():
            for name, parameter in self.part.named_parameters():
                if id(parameter) in kept:
                    continue
                largest = float(parameter.abs().amax()) if parameter.numel() else 0.0
                if largest > LARGEST_HALF:
                    raise UnsupportedError(
                        f"{component}: fp16 overflows in the weight {name} (largest {largest:.2g}, fp16 holds "
                        f"{LARGEST_HALF:.0f}); keep it in fp32: --dtype {component}=fp32"
                    )
        for module in exact:
            module.register_forward_pre_hook(lambda *_: setattr(self.rounding, "is_exact", True))
            module.register_forward_hook(lambda *_: setattr(self.rounding, "is_exact", False))
        for gating in (m for m in self.part.modules() if isinstance(m, WaveletGating)):
            gating.taps = torch.float16

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the part with rounded constants."""
        with self.rounding:
            return self.part.run(tensors)


@torch.no_grad()
def half_outputs(
    manifest: Manifest,
    divided: SplitUNet,
    reference: Reference,
    weights: Mapping[str, StoredWeights],
    say: Callable[[str], None],
) -> Reference:
    """Adds to a reference what the graphs of targets that round give in fp32 arithmetic on rounded constants.

    Args:
        weights: What the UNet's weights are stored as, by the targets' names.

    Returns:
        The reference, with `half` filled where a target is fp16 or has weights in fewer bits.
    """
    found: dict[tuple[str, int, str], dict[str, np.ndarray]] = {}
    for target in manifest.targets:
        unet = target.unet
        stored = weights.get(target.target)
        if unet.layout is None or (unet.dtype != "fp16" and stored is None):
            continue
        parts = modules(divided, unet.layout)
        constants = TARGETS[target.target].half_constants(target) if unet.dtype == "fp16" else None
        for graph in unet.graphs:
            if graph.file is None:
                continue
            say(f"reference with rounded weights for {target.target}: {graph.name}")
            module = RoundedPart(parts[graph.name], constants, stored)
            for step in reference.steps:
                if graph.runs(step.full):
                    inputs = step_inputs(step, graph)
                    given = [torch.from_numpy(inputs[name].astype(np.float32)) if inputs[name].dtype == np.float16
                             else torch.from_numpy(inputs[name]) for name in module.inputs]  # fmt: skip
                    made = zip(module.outputs, module(*given), strict=True)
                    found[target.target, step.index, graph.name] = {name: value.numpy() for name, value in made}
            del module
    return replace(reference, half=found)


@torch.no_grad()
def half_component(
    target: Target, name: str, part: Part, inputs: dict[str, np.ndarray], weights: StoredWeights | None
) -> dict[str, np.ndarray]:
    """What a component of a target gives in fp32 arithmetic on rounded weights, constants and inputs."""
    is_half = target.components[name].dtype == "fp16"
    module = RoundedPart(part, TARGETS[target.target].half_constants(target) if is_half else None, weights, name)
    taken = {tensor.name: tensor.dtype for tensor in target.components[name].graphs[0].inputs}
    rounded = {key: _rounded(value, taken[key]) for key, value in inputs.items()}
    outputs = module.run({key: torch.from_numpy(value) for key, value in rounded.items()})
    return {key: value.numpy() for key, value in outputs.items()}


def _rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    return value.astype(np.float16).astype(np.float32) if dtype == "float16" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _half(value: float) -> float:
    return float(np.float16(value))
