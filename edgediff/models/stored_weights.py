"""A component's weights as they are stored: which format each has, and what it becomes.

A weight is known by its name in torch. What a converter has made of it is known again by its bytes: a graph may hold it
transposed and under another name, but not rounded to anything else.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgediff.config.weight_plan import BITS
from edgediff.errors import UnsupportedError
from edgediff.models.part import Part
from edgediff.models.weight_formats import BLOCK, Scales, Stored, store
from edgediff_runtime.manifest import WeightFormat

# Fewer elements are not worth a format: biases, norms, tables of frequencies.
SMALLEST = 256
# The share of the weights, smallest layers first, that is stored in int8 where the others have fewer bits. The smallest
# layers are the first and the last convolution and the shortcuts, whose errors no norm evens out: on drawings-64 and
# its student they are worth 4 to 9 dB for a tenth of the bytes (benchmarks/README.md).
SMALL_SHARE = 0.1
# The same share where int4 has a scale for a whole channel: with it, it is as near to fp32 as int4 in blocks is.
SMALL_SHARE_BY_CHANNEL = 0.4
# How near a weight that was multiplied in float32 is to what it was multiplied from, of its channel's largest number.
NEARLY = 1e-6


def weights_of(*modules: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of modules that a format can be chosen for, by their names; of the first, as torch names them.

    Those of further modules, such as an adaptor, follow with ``adaptor.`` before their names.
    """
    found: dict[str, nn.Parameter] = {}
    for place, module in enumerate(modules):
        prefix = "adaptor." if place else ""
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and parameter.numel() >= SMALLEST:
                found[f"{prefix}{name}"] = parameter
    return found


def uniform(
    weights: Mapping[str, torch.Tensor], form: WeightFormat, scales: Scales = "blocks"
) -> dict[str, WeightFormat]:
    """One format for every weight; below eight bits, int8 for the smallest and for those that `fits` leaves out.

    >>> weights = {"large": torch.empty(90, 100), "small": torch.empty(10, 90)}
    >>> uniform(weights, "int4")
    {'large': 'int4', 'small': 'int8'}
    """
    forms = dict.fromkeys(weights, form)
    if BITS[form] >= 8:
        return forms
    share = SMALL_SHARE_BY_CHANNEL if form == "int4" and scales == "channels" else SMALL_SHARE
    left = share * sum(weight.numel() for weight in weights.values())
    for name, weight in sorted(weights.items(), key=lambda item: item[1].numel()):
        left -= weight.numel()
        if left >= 0 or not fits(weight, form, scales):
            forms[name] = "int8"
    return forms


def fits(weight: torch.Tensor, form: WeightFormat, scales: Scales) -> bool:
    """Whether a weight has inputs for a block, or for a scale, and, where a target wants it, for whole blocks alone."""
    inputs = weight[0].numel()
    return form != "int4" or (inputs >= BLOCK and not (scales == "whole_blocks" and inputs % BLOCK))


@torch.no_grad()
def taken_weights(part: Part, inputs: Mapping[str, np.ndarray]) -> dict[str, nn.Parameter]:
    """The weights that a part computes with, by name: an encoder's module may hold the decoder too."""
    with TakenWeights() as taking:
        part.run({name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: weight for name, weight in weights_of(part).items() if id(weight) in taking.taken}


class TakenWeights(TorchFunctionMode):
    """A context that remembers which parameters functions of torch are given.

    Attributes:
        taken: The ids of the parameters.
    """

    def __init__(self) -> None:
        """Begins with none."""
        super().__init__()
        self.taken: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch as it is."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            self.taken.update(id(value) for value in (*args, *kwargs.values()) if isinstance(value, nn.Parameter))
        return func(*args, **kwargs)


class StoredWeights:
    """What becomes of a component's weights.

    Attributes:
        forms: Formats by the weights' names; what is not in it stays as it is.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], forms: Mapping[str, WeightFormat], scales: Scales = "blocks"
    ) -> None:
        """Takes weights by name, the formats of some of them, and where int4 has its scales."""
        self.forms, self._scales = dict(forms), scales
        self._weights = {name: weights[name] for name in forms}
        self._names = {id(weight): name for name, weight in self._weights.items()}
        self._stored: dict[str, Stored] = {}
        self._names_of: dict[np.dtype[Any], dict[bytes, list[str]]] = {}

    @property
    def elements(self) -> dict[str, int]:
        """How many elements are stored in each format."""
        counted: Counter[str] = Counter()
        for name, form in self.forms.items():
            counted[form] += self._weights[name].numel()
        return dict(sorted(counted.items()))

    def check_found(self, component: str, found: Collection[str], where: str) -> None:
        """Checks that every weight was found in what a target wrote; an UnsupportedError names one that was not."""
        missing = [name for name in self.forms if name not in found]
        if missing:
            raise UnsupportedError(
                f"{component}: {len(missing)} weights that are to be stored in fewer bits are not in its {where}, "
                f"such as {missing[0]}; leave them out of the plan of formats"
            )

    def stored(self, name: str) -> Stored:
        """A weight in its format; an UnsupportedError says that it does not fit."""
        if name not in self._stored:
            self._stored[name] = store(_array(self._weights[name]), self.forms[name], name, self._scales)
        return self._stored[name]

    def rounded(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What a parameter is once it is stored; None where it stays as it is."""
        name = self._names.get(id(weight))
        return None if name is None else torch.from_numpy(self.stored(name).values())

    def find(self, array: np.ndarray) -> list[str]:
        """The names of the weights that an array is, bit for bit: none, one, or several that are equal.

        An array in fp16 is what weights are that were rounded to it.
        """
        dtype = array.dtype
        if dtype not in self._names_of:
            known: dict[bytes, list[str]] = {}
            for name, weight in self._weights.items():
                known.setdefault(_digest(_array(weight).astype(dtype)), []).append(name)
            self._names_of[dtype] = known
        return self._names_of[dtype].get(_digest(array), [])

    def find_scaled(self, array: np.ndarray) -> str | None:
        """The weight that an array is but for one factor for each output channel, or for each of its inputs.

        Converters multiply a weight by constants that come after it, attention's scale, or before it, a norm's.
        """
        for name, weight in self._weights.items():
            if _sizes(tuple(weight.shape)) == _sizes(array.shape):
                own = _array(weight).reshape(len(weight), -1).astype(np.float64)
                made = array.reshape(own.shape).astype(np.float64)
                if _is_scaled(own, made) or _is_scaled(own.T, made.T):
                    return name
        return None

    def store_as(self, name: str, array: np.ndarray) -> Stored:
        """What a converter made of a weight, in the weight's format."""
        return store(np.ascontiguousarray(array, np.float32), self.forms[name], name, self._scales)


def _is_scaled(own: np.ndarray, made: np.ndarray) -> bool:
    """Whether rows are those of another matrix, each times a number."""
    factors = (own * made).sum(axis=1) / np.maximum(np.square(own).sum(axis=1), 1e-30)
    return bool((np.abs(made - factors[:, None] * own) <= NEARLY * np.abs(made).max(axis=1, keepdims=True)).all())


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    # A convolution of one pixel may have become a matmul, a table of positions have a row's dimension.
    return tuple(size for size in shape if size > 1)


def _array(weight: torch.Tensor) -> np.ndarray:
    array: np.ndarray = weight.detach().cpu().float().numpy()
    return array


def _digest(array: np.ndarray) -> bytes:
    shape = ",".join(map(str, _sizes(array.shape))).encode()
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes() + shape, digest_size=16).digest()
