"""Ops that take a part of a tensor, or put something around it."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.errors import ProgramError


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


def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Elements before and after along the last axes: a constant's, the mirrored ones, or the outermost one's."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        backwards = [size for pair in reversed(pairs) for size in pair]
        return torch.nn.functional.pad(x, backwards, value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ProgramError(f"mode {mode!r}; choices: constant, reflect, replicate")
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        if before or after:
            size = x.shape[axis]
            places = torch.arange(-before, size + after)
            if mode == "reflect":
                places = (size - 1) - ((size - 1) - places.abs()).abs()
            x = x.index_select(axis, places.clamp(0, size - 1) if mode == "replicate" else places)
    return x


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """A band around the diagonal of the last two axes, zero elsewhere; a negative bound is open."""
    rows, columns = x.shape[-2:]
    offset = torch.arange(rows)[:, None] - torch.arange(columns)
    band = torch.ones(rows, columns, dtype=torch.bool)
    if lower >= 0:
        band &= offset <= lower
    if upper >= 0:
        band &= -offset <= upper
    return torch.where(band, x, torch.zeros_like(x))


SLICES: dict[str, Callable[..., Tensor]] = {
    "band_part": band_part,
    "crop": crop,
    "pad": pad,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
}
