"""Ops that change a tensor's shape and none of its numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


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


SHAPES: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "concat": concat,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "identity": identity,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
