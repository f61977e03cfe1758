"""Low-rank updates of a UNet as inputs of its graphs: W x + up (down x) at every projection of attention.

A LoRA that is fused at the export is part of the weights; here the factors come with each generation (Hu et al. 2021,
section 4.1). A part takes the factors of all its layers in two tensors, which are the same for all rows and steps.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from edgediff.errors import UnsupportedError
from edgediff_runtime.manifest import LoraInputs, LoraLayer

PROJECTIONS = ("to_q", "to_k", "to_v")
Module = TypeVar("Module", bound=nn.Module)
# Of the part that runs: down [in, r] and up [r, out] by the names of layers.
_GIVEN: ContextVar[Mapping[str, tuple[Tensor, Tensor]] | None] = ContextVar("low-rank factors", default=None)


class LoraLinear(nn.Linear):
    """A linear layer that adds up (down x) to its result where factors are given for its name.

    It has the weight and the bias of another one.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x [..., in] by the weight, and by the factors beside it."""
        out = super().forward(x)
        given = _GIVEN.get()
        if given is None or self.name not in given:
            return out
        down, up = given[self.name]
        return out + (x @ down) @ up


@dataclass(frozen=True)
class Factors:
    """What a part takes: of each of its layers ``down`` [in, r] and ``up`` [r, out], flat, one after the other.

    Attributes:
        part: The part's name.
    """

    part: str
    rank: int
    layers: tuple[LoraLayer, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the two tensors by their names."""
        return LoraInputs(self.rank, {self.part: self.layers}).shapes

    def by_layer(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of each layer, from the two tensors."""
        downs, ups = (tensors[name] for name in self.shapes)
        found, down, up = {}, 0, 0
        for layer in self.layers:
            taken, made = self.rank * layer.inputs, self.rank * layer.outputs
            found[layer.name] = (
                downs[0, down : down + taken].reshape(layer.inputs, self.rank),
                ups[0, up : up + made].reshape(self.rank, layer.outputs),
            )
            down, up = down + taken, up + made
        return found


@contextmanager
def given(factors: tuple[Factors, ...], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives layers their factors while the block runs."""
    if not factors:
        yield
        return
    before = _GIVEN.set({name: pair for each in factors for name, pair in each.by_layer(tensors).items()})
    try:
        yield
    finally:
        _GIVEN.reset(before)


def with_lora_layers(unet: Module) -> Module:
    """A copy of a UNet, whose weights are shared, with a `LoraLinear` for every projection of attention.

    Those are ``to_q``, ``to_k``, ``to_v`` and ``to_out.0``, of self-attention and of attention to the text.

    Raises:
        UnsupportedError: It has no attention.
    """
    weights: Any = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    copied = copy.deepcopy(unet, weights)
    names = [name for name, module in copied.named_modules() if isinstance(module, nn.Linear) and _is_projection(name)]
    if not names:
        raise UnsupportedError("'lora_inputs' is for UNets with attention, and this one has none; leave it out")
    for name in names:
        place, _, last = name.rpartition(".")
        linear = copied.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        copied.get_submodule(place).register_module(last, LoraLinear(linear, name))
    return copied


def _is_projection(name: str) -> bool:
    return name.endswith(tuple(f".{each}" for each in (*PROJECTIONS, "to_out.0")))


def factors_of(part: str, module: nn.Module, rank: int) -> tuple[Factors, ...]:
    """What a part with so many `LoraLinear` takes; nothing where it has none."""
    layers = tuple(
        LoraLayer(each.name, each.in_features, each.out_features)
        for each in module.modules()
        if isinstance(each, LoraLinear)
    )
    return (Factors(part, rank, layers),) if layers else ()


def lora_inputs(factors: tuple[Factors, ...]) -> LoraInputs | None:
    """What the manifest says of the factors that parts take; None where none does."""
    if not factors:
        return None
    return LoraInputs(factors[0].rank, {each.part: each.layers for each in factors})
