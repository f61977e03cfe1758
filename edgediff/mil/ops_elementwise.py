"""Elementwise ops of one and of two operands, comparisons and casts; reductions over axes, and sums along one."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.mil.dtypes import MIL_NAMES, settle

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _of_x(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def op(x: Tensor) -> Tensor:
        return function(x)

    return op


def _of_x_and_y(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return op


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


def cast(x: Tensor, dtype: str) -> Tensor:
    """``x`` in another dtype; floats to integers toward zero."""
    # The op's declared result rounds to float16, so that rounding can be switched off.
    return settle(x, MIL_NAMES.get(dtype, dtype), rounded=False)


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``min(max(x, alpha), beta)``."""
    return x.clamp(alpha, beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    """``1 / (x + epsilon)``."""
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    """``log(x + epsilon)``."""
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    """``1 / sqrt(x + epsilon)``."""
    return torch.rsqrt(x + epsilon)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where `cond` holds, else ``b``."""
    return torch.where(cond, a, b)


def threshold(x: Tensor, alpha: float) -> Tensor:
    """``max(x, alpha)``."""
    return x.clamp(min=alpha)


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


# Ops that are one function of torch.
TABLE: dict[str, Callable[..., Tensor]] = {
    "abs": _of_x(torch.abs),
    "acos": _of_x(torch.acos),
    "asin": _of_x(torch.asin),
    "atan": _of_x(torch.atan),
    "atanh": _of_x(torch.atanh),
    "ceil": _of_x(torch.ceil),
    "cos": _of_x(torch.cos),
    "cosh": _of_x(torch.cosh),
    "erf": _of_x(torch.erf),
    "exp": _of_x(torch.exp),
    "exp2": _of_x(torch.exp2),
    "floor": _of_x(torch.floor),
    "logical_not": _of_x(torch.logical_not),
    "round": _of_x(torch.round),
    "sign": _of_x(torch.sign),
    "sin": _of_x(torch.sin),
    "sinh": _of_x(torch.sinh),
    "sqrt": _of_x(torch.sqrt),
    "square": _of_x(torch.square),
    "tan": _of_x(torch.tan),
    "tanh": _of_x(torch.tanh),
    "add": _of_x_and_y(torch.add),
    "equal": _of_x_and_y(torch.eq),
    "floor_div": _of_x_and_y(_floor_div),
    "greater": _of_x_and_y(torch.gt),
    "greater_equal": _of_x_and_y(torch.ge),
    "less": _of_x_and_y(torch.lt),
    "less_equal": _of_x_and_y(torch.le),
    "logical_and": _of_x_and_y(torch.logical_and),
    "logical_or": _of_x_and_y(torch.logical_or),
    "logical_xor": _of_x_and_y(torch.logical_xor),
    "maximum": _of_x_and_y(torch.maximum),
    "minimum": _of_x_and_y(torch.minimum),
    "mod": _of_x_and_y(torch.remainder),
    "mul": _of_x_and_y(torch.mul),
    "not_equal": _of_x_and_y(torch.ne),
    "pow": _of_x_and_y(torch.pow),
    "real_div": _of_x_and_y(torch.true_divide),
    "sub": _of_x_and_y(torch.sub),
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
}
