"""The 2-D discrete wavelet transform and its inverse, as tensor operations that every exporter supports.

Slices, concatenations, additions and convolutions; no FFT, no rank above 4, and no pixel shuffle, whose order of
channels differs between exporters. Haar is a few additions; any other orthogonal filter is a strided convolution of the
periodic signal. Values, order and signs are PyWavelets' with ``mode="periodization"``.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ConfigError
from edgediff.extras import needing

HAAR = ("haar", "db1")
# The orthogonal filters of PyWavelets, by family, without dmey, which is orthogonal only approximately.
ORTHOGONAL = (
    "haar",
    *(f"db{n}" for n in range(1, 39)),
    *(f"sym{n}" for n in range(2, 21)),
    *(f"coif{n}" for n in range(1, 18)),
)

Bands = tuple[Tensor, Tensor, Tensor, Tensor]


def check_wavelet(wavelet: str) -> str:
    """Returns the name of one of PyWavelets' orthogonal wavelets; a ConfigError names the choices."""
    if wavelet not in ORTHOGONAL:
        raise ConfigError(f"wavelet {wavelet!r} is unknown; choices: haar, db1 to db38, sym2 to sym20, coif1 to coif17")
    return wavelet


def dwt2(x: Tensor, wavelet: str = "haar", taps: torch.dtype | None = None) -> Bands:
    """Divides an image into four bands of half its size.

    Args:
        x: [B, C, H, W]; an odd height or width is continued by its last row or column.
        wavelet: An orthogonal filter's name; a ConfigError where it is unknown.
        taps: The dtype to which the filter's numbers are rounded first, as in a graph of less precision; None takes
            x's. Haar's are exact in any.

    Returns:
        LL, LH, HL, HH, each [B, C, ceil(H/2), ceil(W/2)]: approximation, horizontal, vertical and diagonal detail, as
        PyWavelets' cA, cH, cV, cD.
    """
    check_wavelet(wavelet)
    if x.shape[2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    if x.shape[3] % 2:
        x = torch.cat([x, x[:, :, :, -1:]], dim=3)
    if wavelet in HAAR:
        top, bottom = x[:, :, 0::2], x[:, :, 1::2]
        (ll, hl), (lh, hh) = _haar_pair(top + bottom), _haar_pair(top - bottom)
        return 0.5 * ll, 0.5 * lh, 0.5 * hl, 0.5 * hh
    filters = _filters(wavelet, x, taps)
    (ll, hl), (lh, hh) = (_analyse(half, filters, dim=3) for half in _analyse(x, filters, dim=2))
    return ll, lh, hl, hh


def idwt2(
    ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, wavelet: str = "haar", taps: torch.dtype | None = None
) -> Tensor:
    """Joins four bands of [B, C, H, W] to [B, C, 2H, 2W]: the inverse of `dwt2`, which describes wavelet and taps."""
    check_wavelet(wavelet)
    if wavelet in HAAR:
        low, high = _interleave(ll + hl, ll - hl, 3), _interleave(lh + hh, lh - hh, 3)
        return 0.5 * _interleave(low + high, low - high, 2)
    filters = _filters(wavelet, ll, taps)
    low, high = _synthesise(ll, hl, filters, dim=3), _synthesise(lh, hh, filters, dim=3)
    return _synthesise(low, high, filters, dim=2)


def _haar_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = x[:, :, :, 0::2], x[:, :, :, 1::2]
    return left + right, left - right


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """Alternates two tensors' rows (dim 2) or columns (dim 3); stacking them would need a fifth dimension."""
    batch, channels, height, width = even.shape
    if dim == 2:
        return torch.cat([even, odd], dim=3).reshape(batch, channels, 2 * height, width)
    pair = [half.reshape(batch, channels * height, width, 1) for half in (even, odd)]
    return torch.cat(pair, dim=3).reshape(batch, channels, height, 2 * width)


def _analyse(x: Tensor, filters: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Low- and high-pass halves along one dimension: y[k] = sum_j h[j] x[2k + L/2 - j], L taps."""
    channels, reach = x.shape[1], filters.shape[1] // 2 - 1
    # One group for each channel, whose two outputs are its low and its high half.
    kernel = _along(filters.flip(1), dim).repeat(channels, 1, 1, 1)
    halves = F.conv2d(_continue(x, reach, reach, dim), kernel, stride=(2, 1) if dim == 2 else (1, 2), groups=channels)
    return halves[:, 0::2], halves[:, 1::2]


def _synthesise(low: Tensor, high: Tensor, filters: Tensor, dim: int) -> Tensor:
    """The inverse of `_analyse`, which is its transpose: sample 2i + p is sum_r h[2r + s] y[i + r + c].

    Here s = (L/2 + p) mod 2 and c = (p + s - L/2) / 2: even and odd samples are two convolutions of the coefficients.
    """
    half, channels = filters.shape[1] // 2, low.shape[1]
    phases = [((half + p) % 2, (p + (half + p) % 2 - half) // 2) for p in (0, 1)]
    first = min(c for _, c in phases)
    last = max(c for _, c in phases) + half - 1
    samples = []
    for coefficients, taps in zip((low, high), filters, strict=True):
        kernel = torch.stack([F.pad(taps[s::2], (c - first, last - c - half + 1)) for s, c in phases])
        continued = _continue(coefficients, -first, last, dim)
        samples.append(F.conv2d(continued, _along(kernel, dim).repeat(channels, 1, 1, 1), groups=channels))
    both = samples[0] + samples[1]
    return _interleave(both[:, 0::2], both[:, 1::2], dim)


def _filters(wavelet: str, like: Tensor, taps: torch.dtype | None) -> Tensor:
    """The low- and the high-pass filter of the analysis, [2, taps]."""
    return torch.tensor(_taps(wavelet), dtype=taps or like.dtype, device=like.device).to(like.dtype)


@lru_cache(maxsize=8)
def _taps(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    with needing("export", f"the wavelet {wavelet}"):
        import pywt
    bank = pywt.Wavelet(wavelet)
    return tuple(bank.dec_lo), tuple(bank.dec_hi)


def _continue(x: Tensor, before: int, after: int, dim: int) -> Tensor:
    """Continues a signal periodically."""
    size = x.shape[dim]
    parts = [x]
    while before > 0:
        parts.insert(0, x.narrow(dim, size - min(before, size), min(before, size)))
        before -= size
    while after > 0:
        parts.append(x.narrow(dim, 0, min(after, size)))
        after -= size
    return torch.cat(parts, dim=dim) if len(parts) > 1 else x


def _along(filters: Tensor, dim: int) -> Tensor:
    """[2, taps] as a kernel [2, 1, taps, 1] or [2, 1, 1, taps]."""
    return filters[:, None, :, None] if dim == 2 else filters[:, None, None, :]
