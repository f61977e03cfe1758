"""Elementwise ops of one and of two operands, comparisons and casts."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.mil.dtypes import MIL_NAMES, settle


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
    # Rounding to float16 is left to the op's declared result, so that it can be left out.
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


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
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
    "cast": cast,
    "clip": clip,
    "inverse": inverse,
    "log": log,
    "rsqrt": rsqrt,
    "select": select,
    "threshold": threshold,
}
