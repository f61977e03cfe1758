"""Ops that make tensors from sizes and numbers, or put numbers around or into one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError


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


def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Elements before and after along the last axes: a constant's, the mirrored ones, or the outermost one's."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        backwards = [size for pair in reversed(pairs) for size in pair]
        return F.pad(x, backwards, value=constant_val)
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
