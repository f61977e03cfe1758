"""Quantization: ops that unpack compressed weights, once, when a function is prepared; and those of activations.

iOS 16 packs indices and masks into bytes and gives the shape; iOS 18 has dtypes below a byte, and blocks.
"""

import math

import numpy as np
import torch
from torch import Tensor

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import DTYPES, MIL_NAMES, unpack


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
    info = torch.iinfo(DTYPES[MIL_NAMES.get(output_dtype, output_dtype)].computed)
    return x.clamp(info.min, info.max)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """``scale (input - zero_point)``."""
    x = input.float()
    if zero_point is not None:
        x = x - _along(zero_point, input, axis)
    return x * _along(scale, input, axis)


def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``scale (quantized_data - zero_point)``, each a scalar or along the axis."""
    return dequantize(quantized_data, scale, zero_point, axis)


def _like(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Repeats each block's number over the block, the last axes of `blocks` being those of the shape."""
    for axis, (size, count) in enumerate(zip(shape, blocks.shape, strict=False)):
        if size % count:
            raise ProgramError(f"{count} blocks along axis {axis} do not divide its {size} elements")
        if 1 < count < size:
            blocks = blocks.repeat_interleave(size // count, axis)
    return blocks


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale (data - offset)``, one of each for a block."""
    x = data.float()
    if offset is not None:
        x = x - _like(offset.float(), data.shape)
    return _like(scale, data.shape) * x


def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """float16 as float32, as the evaluator already stores it."""
    return source_val


def _bits(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if packed.numel() != -(-count * bits // 8):
        raise ProgramError(f"{packed.numel()} bytes for {count} elements of {bits} bits")
    return torch.from_numpy(unpack(packed.numpy(), bits, count, signed=False)).reshape(shape)


def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """Looks each index up, up to iOS 17 in one palette, from iOS 18 on in its block's, whose entries may be vectors."""
    if shape is not None:
        bits = int(np.log2(lut.numel()))
        return lut[_bits(indices, bits, shape).long()]
    return _look_up(indices, lut, vector_axis)


def _look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Indices [*D] in palettes [*blocks, P, V] -> [*D], the vector's axis V times as long."""
    palettes, width = lut.shape[-2:]
    tables = lut.reshape(-1, palettes, width)
    table = torch.arange(tables.shape[0]).reshape(lut.shape[:-2])
    found = tables[_like(table, indices.shape).expand(indices.shape), indices.long()]
    if width == 1:
        return found[..., 0]
    if vector_axis is None:
        raise ProgramError("palettes of vectors without vector_axis")
    axis = vector_axis % indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """Puts the nonzero numbers where the mask has ones; up to iOS 17 the mask is packed into bytes."""
    places = (mask if shape is None else _bits(mask, 1, shape)) != 0
    if int(places.sum()) != nonzero_data.numel():
        raise ProgramError(f"{nonzero_data.numel()} numbers for {int(places.sum())} places")
    dense = torch.zeros(places.shape, dtype=nonzero_data.dtype)
    dense[places] = nonzero_data
    return dense


def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mask and the nonzero numbers, looked up; vectors make both longer."""
    dense = _look_up(constexpr_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mask and the nonzero numbers, shifted and scaled."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]
