"""Ops that take elements by computed indices.

Up to iOS 16 a negative index counts from the end. From iOS 17 on, where these ops have `validate_indices`, it is out of
bounds and what comes back undefined: a program that relies on it is refused.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.errors import ProgramError


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
    """Slices of `x` at places that the last axis of the indices spells; the first `batch_dims` axes go together."""
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


GATHERS: dict[str, Callable[..., Tensor]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
}
