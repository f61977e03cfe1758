"""Activations."""

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError


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


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``."""
    return F.relu(x)


def relu6(x: Tensor) -> Tensor:
    """``min(max(x, 0), 6)``."""
    return F.relu6(x)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha tanh(beta x)``."""
    return alpha * torch.tanh(beta * x)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``."""
    return torch.sigmoid(x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``min(max(alpha x + beta, 0), 1)``."""
    return (alpha * x + beta).clamp(0, 1)


def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)``."""
    return F.silu(x)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """``exp(x) / sum(exp(x))`` along an axis."""
    return torch.softmax(x, axis)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``."""
    return F.softplus(x)


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha_c log(1 + exp(beta_c x))`` for channel ``c``."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    return alpha.reshape(shape) * F.softplus(beta.reshape(shape) * x)


def softsign(x: Tensor) -> Tensor:
    """``x / (1 + |x|)``."""
    return F.softsign(x)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """``x`` where ``x >= alpha``, else 0."""
    return torch.where(x >= alpha, x, torch.zeros_like(x))
