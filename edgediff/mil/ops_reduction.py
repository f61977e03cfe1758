"""Reductions over axes, and sums along one."""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _over_axes(reduce: Reduce) -> Callable[..., Tensor]:
    def op(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return reduce(x, list(range(x.ndim)) if axes is None else axes, keep_dims)

    return op


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.mean(x if x.is_floating_point() else x.double(), axes, keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Where the largest value along an axis lies; the declared result has `output_dtype`."""
    return torch.argmax(x, axis, keep_dims)


def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Where the smallest value along an axis lies; the declared result has `output_dtype`."""
    return torch.argmin(x, axis, keep_dims)


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Running sums along an axis; exclusive ones leave the element itself out."""
    if reverse:
        x = x.flip(axis)
    total = torch.cumsum(x, axis)
    if exclusive:
        total = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return total.flip(axis) if reverse else total


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "reduce_l1_norm": _over_axes(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": _over_axes(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_log_sum": _over_axes(lambda x, axes, keep: x.sum(axes, keep).log()),
    "reduce_log_sum_exp": _over_axes(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "reduce_max": _over_axes(torch.amax),
    "reduce_mean": _over_axes(_mean),
    "reduce_min": _over_axes(torch.amin),
    "reduce_prod": _over_axes(_prod),
    "reduce_sum": _over_axes(torch.sum),
    "reduce_sum_square": _over_axes(lambda x, axes, keep: x.square().sum(axes, keep)),
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "cumsum": cumsum,
}
