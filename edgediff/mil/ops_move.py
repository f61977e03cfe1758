"""Ops whose results are only numbers of their operands: shapes, slices and gathers.

Up to iOS 16 a negative index of a gather counts from the end. From iOS 17 on, where these ops have `validate_indices`,
it is out of bounds and what comes back undefined: a program that relies on it is refused.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError


def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Joins tensors along an axis, one after the other or in turns."""
    if not interleave:
        return torch.cat(values, axis)
    axis = axis % values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """[N, C, H, W] -> [N, C / b^2, H b, W b]; the block's place is the slow part of a channel's number (as in TF)."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    """New axes of size 1, at their places in the result."""
    rank = x.ndim + len(axes)
    shape = iter(x.shape)
    new = {axis % rank for axis in axes}
    return x.reshape([1 if i in new else next(shape) for i in range(rank)])


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis` are its rows."""
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


def identity(x: Tensor) -> Tensor:
    """``x``."""
    return x


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """[N, C f^2, H, W] -> [N, C, H f, W f]; the pixel's place is the fast part of a channel's number."""
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """The inverse of `pixel_shuffle`."""
    return F.pixel_unshuffle(x, downscale_factor)


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """Another shape; 0 takes the operand's size at its place, -1 what is left."""
    return x.reshape([x.shape[i] if size == 0 and len(shape) == x.ndim else size for i, size in enumerate(shape)])


def reshape_like(
    x: Tensor,
    ref_tensors: list[Tensor],
    begins: tuple[int, ...],
    ends: tuple[int, ...],
    end_masks: tuple[bool, ...],
) -> Tensor:
    """A shape put together from parts of other tensors' shapes."""
    shape: list[int] = []
    for other, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += other.shape[begin : None if to_end else end]
    return x.reshape(shape)


def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """The order along the axes, along all of them where none is named, turned round."""
    return x.flip(list(range(x.ndim)) if axes is None else axes)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of `depth_to_space`."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    """Parts along an axis, equal ones or of the sizes given."""
    sizes = split_sizes
    if sizes is None:
        if num_splits is None or x.shape[axis] % num_splits:
            raise ValueError(f"cannot split {x.shape[axis]} into {num_splits} equal parts")
        sizes = [x.shape[axis] // num_splits] * num_splits
    return torch.split(x, sizes, axis)


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Without axes of size 1; those named of another size stay."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def stack(values: list[Tensor], axis: int) -> Tensor:
    """Tensors side by side along a new axis."""
    return torch.stack(values, axis)


def tile(x: Tensor, reps: list[int]) -> Tensor:
    """Repeated along each axis."""
    return x.repeat(reps)


def transpose(x: Tensor, perm: list[int]) -> Tensor:
    """The axes in another order."""
    return x.permute(perm)


def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    """[..., H, W] without a border: (top, bottom) and (left, right)."""
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]


def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """As numpy does ``x[begin:end:stride, ...]``; masks leave a bound open, or take one element and drop the axis."""
    squeezed = []
    for axis, size in enumerate(x.shape):
        first = None if begin_mask and begin_mask[axis] else begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            x = x.narrow(axis, (0 if first is None else first) % size, 1)
            squeezed.append(axis)
            continue
        last = None if end_mask and end_mask[axis] else end[axis]
        places = range(*slice(first, last, stride[axis] if stride else 1).indices(size))
        if places.step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, places.stop, places.step),)]
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.long))
    return x.squeeze(tuple(squeezed)) if squeezed else x


def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """So many elements from `begin` on along each axis; -1 takes the rest."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first %= x.shape[axis]
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def _places(indices: Tensor, size: int, validate_indices: bool | None) -> Tensor:
    places = indices.long()
    if places.numel():
        low, high = int(places.min()), int(places.max())
        if high >= size or low < -size:
            raise ProgramError(f"index {high if high >= size else low} is out of bounds for {size} elements")
        if low < 0 and validate_indices is not None:
            raise ProgramError(f"index {low} is negative, which is undefined from iOS 17 on")
    return torch.where(places < 0, places + size, places) if validate_indices is None else places


def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool | None = None
) -> Tensor:
    """Slices of `x` along an axis; the first `batch_dims` axes of both go together."""
    axis = axis % x.ndim
    places = _places(indices, x.shape[axis], validate_indices)
    batch, rest = x.shape[:batch_dims], places.shape[batch_dims:]
    if not batch:
        return x.index_select(axis, places.reshape(-1)).reshape(*x.shape[:axis], *rest, *x.shape[axis + 1 :])
    rows = x.reshape(-1, *x.shape[batch_dims:])
    taken = [
        row.index_select(axis - batch_dims, chosen)
        for row, chosen in zip(rows, places.reshape(math.prod(batch), -1), strict=True)
    ]
    return torch.stack(taken).reshape(*x.shape[:axis], *rest, *x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = None) -> Tensor:
    """Elements of `x` along an axis, one for each index at its place."""
    return torch.gather(x, axis, _places(indices, x.shape[axis], validate_indices))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = None) -> Tensor:
    """Slices of `x` at places given by the last axis of the indices; the first `batch_dims` axes go together."""
    depth = indices.shape[-1]
    sizes = x.shape[batch_dims : batch_dims + depth]
    places = [_places(indices[..., i], size, validate_indices) for i, size in enumerate(sizes)]
    outer = indices.ndim - 1
    rows = []
    for axis in range(batch_dims):
        shape = [1] * outer
        shape[axis] = x.shape[axis]
        rows.append(torch.arange(x.shape[axis]).reshape(shape))
    return x[(*rows, *places)]
