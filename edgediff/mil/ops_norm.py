"""Normalisations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """``gamma_c (x - mean_c) / sqrt(variance_c + epsilon) + beta_c`` for channel ``c`` of [N, C, *D]."""
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each sample of [N, C, *D] by its own mean and variance."""
    axes = list(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    shape = (1, -1, *[1] * len(axes))
    y = (x - mean) / torch.sqrt(variance + epsilon)
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """By mean and variance over the axes, all where none is named; `gamma` and `beta` have their sizes."""
    places = sorted(axis % x.ndim for axis in (range(x.ndim) if axes is None else axes))
    if places == list(range(x.ndim - len(places), x.ndim)):
        return F.layer_norm(x, [x.shape[axis] for axis in places], gamma, beta, epsilon)
    shape = [size if axis in places else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, places, correction=0, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + epsilon)
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + epsilon)`` over the last three axes."""
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


NORMS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
}
