"""Layers: convolutions and pooling over one to three spatial axes, matmuls and attention, normalizations."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError

CONV = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
AVG_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
SAME = ("same", "same_lower")
Pairs = list[tuple[int, int]]


def _halves(total: int, pad_type: str) -> tuple[int, int]:
    less, more = total // 2, total - total // 2
    return (less, more) if pad_type == "same" else (more, less)


def _pairs(x: Tensor, kernel: list[int], strides: list[int], pad_type: str, pad: list[int] | None) -> Pairs:
    """Elements before and after along each spatial axis; `kernel` with its dilation."""
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        pad = [0] * 2 * len(kernel) if pad is None else pad
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type not in SAME:
        raise ProgramError(f"pad_type {pad_type!r}; choices: valid, custom, same, same_lower")
    totals = (max(0, (math.ceil(n / s) - 1) * s + k - n) for n, k, s in zip(x.shape[2:], kernel, strides, strict=True))
    return [_halves(total, pad_type) for total in totals]


def _flat(pairs: Pairs) -> list[int]:
    return [size for pair in reversed(pairs) for size in pair]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """[N, C, *D] with weights [C', C / groups, *K] -> [N, C', *D']."""
    rank = x.ndim - 2
    strides = [1] * rank if strides is None else strides
    dilations = [1] * rank if dilations is None else dilations
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pairs = _pairs(x, kernel, strides, pad_type, pad)
    if any(before != after for before, after in pairs):
        x = F.pad(x, _flat(pairs))
        pairs = [(0, 0)] * rank
    return CONV[rank - 1](x, weight, bias, strides, [before for before, _ in pairs], dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """[N, C, *D] with weights [C, C' / groups, *K] -> [N, C', *D']; what is padded in `conv` is cropped here."""
    rank = x.ndim - 2
    strides = [1] * rank if strides is None else strides
    dilations = [1] * rank if dilations is None else dilations
    full = CONV_TRANSPOSE[rank - 1](x, weight, None, strides, 0, 0, groups, dilations)
    crops = []
    for axis, (n, whole) in enumerate(zip(x.shape[2:], full.shape[2:], strict=True)):
        size = None if output_shape is None else output_shape[2 + axis]
        if pad_type in SAME:
            size = n * strides[axis] if size is None else size
            before, _ = _halves(max(0, whole - size), pad_type)
        else:
            before, after = _pairs(x, list(weight.shape[2:]), strides, pad_type, pad)[axis]
            size = whole - before - after if size is None else size
        # Negative padding crops; outside of the full result there is only the bias.
        crops.append((-before, size - (whole - before)))
    out = F.pad(full, _flat(crops))
    return out if bias is None else out + bias.reshape(1, -1, *[1] * rank)


def _pool_pairs(
    x: Tensor, kernel: list[int], strides: list[int], pad_type: str, pad: list[int] | None, ceil_mode: bool
) -> tuple[Pairs, list[int]]:
    """Padding along each spatial axis, and what the last window reaches over it where sizes are rounded up."""
    pairs = _pairs(x, kernel, strides, pad_type, pad)
    beyond = []
    for n, k, s, (before, after) in zip(x.shape[2:], kernel, strides, pairs, strict=True):
        windows = (n + before + after - k) // s + 1
        if ceil_mode:
            windows = -(-(n + before + after - k) // s) + 1
            # As in torch: a window that would begin in the padding after the input is left out.
            windows -= (windows - 1) * s >= n + before
        beyond.append(max(0, (windows - 1) * s + k - n - before - after))
    return pairs, beyond


def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """Means over windows of [N, C, *D]."""
    rank = x.ndim - 2
    strides = [1] * rank if strides is None else strides
    pool = AVG_POOL[rank - 1]
    pairs, beyond = _pool_pairs(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if not any(map(any, pairs)) and not any(beyond):
        return pool(x, kernel_sizes, strides)
    reach = [(before, after + more) for (before, after), more in zip(pairs, beyond, strict=True)]
    counted = torch.ones(1, 1, *x.shape[2:])
    if exclude_padding_from_average:
        counted = F.pad(counted, _flat(reach))
    else:
        counted = F.pad(F.pad(counted, _flat(pairs), value=1.0), _flat([(0, more) for more in beyond]))
    return pool(F.pad(x, _flat(reach)), kernel_sizes, strides) / pool(counted, kernel_sizes, strides)


def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Maxima over windows of [N, C, *D]."""
    rank = x.ndim - 2
    strides = [1] * rank if strides is None else strides
    pairs, beyond = _pool_pairs(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    reach = [(before, after + more) for (before, after), more in zip(pairs, beyond, strict=True)]
    return MAX_POOL[rank - 1](F.pad(x, _flat(reach), value=-math.inf), kernel_sizes, strides)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: [..., D] with [D', D] -> [..., D']."""
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Products of the last two axes, which may be transposed before; the others are broadcast."""
    if transpose_x and x.ndim > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.ndim > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    """A sum of products as the equation says; axes of size 1 are broadcast."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """``softmax(query key^T / sqrt(E) + mask) value``: [B, ..., L, E], [B, ..., S, E], [B, ..., S, V]."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


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
    return _normalized(x, axes, [1, -1, *[1] * len(axes)], gamma, beta, epsilon)


def _normalized(
    x: Tensor, axes: list[int], shape: list[int], gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> Tensor:
    """By mean and variance over the axes; `gamma` and `beta` take the shape."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
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
    return _normalized(x, places, shape, gamma, beta, epsilon)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + epsilon)`` over the last three axes."""
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)
