"""Elementwise ops, activations, comparisons and casts; reductions over axes, and sums along one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import MIL_NAMES, to_declared

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _of_x(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def op(x: Tensor) -> Tensor:
        return function(x)

    return op


def _of_x_and_y(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return op


def cast(x: Tensor, dtype: str) -> Tensor:
    """``x`` in another dtype; floats to integers toward zero."""
    # The op's declared result rounds to float16, so that rounding can be switched off.
    return to_declared(x, MIL_NAMES.get(dtype, dtype), rounded=False)


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
    """``a`` where `cond` is true, else ``b``."""
    return torch.where(cond, a, b)


def threshold(x: Tensor, alpha: float) -> Tensor:
    """``max(x, alpha)``."""
    return x.clamp(min=alpha)


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``min(x, beta)`` where ``x >= 0``, else ``min(alpha x, beta)``."""
    return F.leaky_relu(x, alpha).clamp(max=beta)


def elu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where ``x > 0``, else ``alpha (exp(x) - 1)``."""
    return F.elu(x, alpha)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """``x Phi(x)``, or one of two approximations of it."""
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ProgramError(f"mode {mode!r}; choices: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where ``x >= 0``, else ``alpha x``."""
    return F.leaky_relu(x, alpha)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha x + beta``."""
    return x * alpha + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x`` where ``x > 0``, else ``alpha_c x`` for channel ``c``."""
    return F.prelu(x, alpha)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha tanh(beta x)``."""
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``min(max(alpha x + beta, 0), 1)``."""
    return (alpha * x + beta).clamp(0, 1)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along an axis."""
    return torch.softmax(x, axis)


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha_c log(1 + exp(beta_c x))`` for channel ``c``."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    return alpha.reshape(shape) * F.softplus(beta.reshape(shape) * x)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where ``x >= alpha``, else 0."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))


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


# Ops that are one function of torch, most under its own name.
OF_X = (
    "abs acos asin atan atanh ceil cos cosh erf exp exp2 floor logical_not relu round sigmoid sign sin sinh sqrt "
    "square tan tanh"
)
OF_X_AND_Y = (
    "add greater greater_equal less less_equal logical_and logical_or logical_xor maximum minimum mul not_equal pow sub"
)
TABLE: dict[str, Callable[..., Tensor]] = {
    **{name: _of_x(getattr(torch, name)) for name in OF_X.split()},
    **{name: _of_x(getattr(F, name)) for name in ("relu6", "silu", "softplus", "softsign")},
    **{name: _of_x_and_y(getattr(torch, name)) for name in OF_X_AND_Y.split()},
    "equal": _of_x_and_y(torch.eq),
    "floor_div": _of_x_and_y(torch.floor_divide),
    "mod": _of_x_and_y(torch.remainder),
    "real_div": _of_x_and_y(torch.true_divide),
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
