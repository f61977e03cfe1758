"""Ops that make tensors from sizes and numbers, and quantization of activations."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.mil.dtypes import DTYPES, MIL_NAMES


def fill(shape: list[int], value: float = 0.0) -> Tensor:
    """A shape full of one value."""
    return torch.full(shape, value)


def fill_like(ref_tensor: Tensor, value: float = 0.0) -> Tensor:
    """The shape of a tensor full of one value."""
    return torch.full(ref_tensor.shape, value)


def range_1d(start: float, end: float, step: float) -> Tensor:
    """``start``, ``start + step``, and so on before ``end``."""
    return torch.arange(start, end, step)


def shape(x: Tensor) -> Tensor:
    """The sizes of a tensor."""
    return torch.tensor(x.shape, dtype=torch.int32)


def _along(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector laid along an axis."""
    if values.ndim == 0 or axis is None:
        return values
    sizes = [1] * like.ndim
    sizes[axis] = -1
    return values.reshape(sizes)


def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """``clip(round(input / scale) + zero_point)`` to int8 or uint8."""
    x = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        x = x + _along(zero_point, input, axis)
    info = torch.iinfo(DTYPES[MIL_NAMES.get(output_dtype, output_dtype)].held)
    return x.clamp(info.min, info.max)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """``scale (input - zero_point)``."""
    x = input.float()
    if zero_point is not None:
        x = x - _along(zero_point, input, axis)
    return x * _along(scale, input, axis)


FILLS: dict[str, Callable[..., Tensor]] = {
    "dequantize": dequantize,
    "fill": fill,
    "fill_like": fill_like,
    "quantize": quantize,
    "range_1d": range_1d,
    "shape": shape,
}
