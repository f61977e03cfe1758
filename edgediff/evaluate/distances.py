"""Distances between two sets of images, from the features of a network.

The kernel distance (Binkowski et al. 2018, 'Demystifying MMD GANs') does not depend on the number of images but for
its noise, and may come out below zero where the sets are alike. The Frechet distance (Heusel et al. 2017) grows as sets
get smaller: compare it only between sets of one size, and with care where there are fewer images than features.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.data.image_folder import shuffled
from edgediff.errors import DataError

GROUPS = 10
# Two groups of two: below that there is no spread.
MIN_IMAGES = 4
# Images of either set whose pairs are in memory at once.
_TILE = 2048

Features = NDArray[np.float64]


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy of two sets.

    Attributes:
        value: Unbiased, over the whole sets; 0 is expected of sets of one distribution.
        spread: Standard error, by the jackknife: from the distances of ten subsets, each without another tenth of both
            sets. About right where the sets differ, and up to half as much again where they are alike.
    """

    value: float
    spread: float


def kernel_distance(x: Features, y: Features, seed: int = 0) -> KernelDistance:
    """The kernel distance with the kernel (x.y / F + 1)^3.

    Args:
        x: [N, F].
        y: [M, F].
        seed: Divides the sets into the groups that the spread comes from.

    Returns:
        The distance and its spread.

    Raises:
        DataError: A set has fewer than four images, the widths differ, or a feature is not finite.
    """
    check_features(x, y)
    count = min(GROUPS, len(x) // 2, len(y) // 2)
    parts_x, parts_y = (np.array_split(features[shuffled(len(features), seed)], count) for features in (x, y))
    within_x, within_y = _sums_within(parts_x), _sums_within(parts_y)
    between = np.array([[_kernel_sum(a, b) for b in parts_y] for a in parts_x])
    sizes = [(len(a), len(b)) for a, b in zip(parts_x, parts_y, strict=True)]
    # The sums of pairs by group say what is left without one: ten distances for the price of one.
    without = [
        _mmd2(
            within_x.sum() - 2 * within_x[i].sum() + within_x[i, i],
            within_y.sum() - 2 * within_y[i].sum() + within_y[i, i],
            between.sum() - between[i].sum() - between[:, i].sum() + between[i, i],
            len(x) - of_x,
            len(y) - of_y,
        )
        for i, (of_x, of_y) in enumerate(sizes)
    ]
    value = _mmd2(within_x.sum(), within_y.sum(), between.sum(), len(x), len(y))
    return KernelDistance(value, math.sqrt(count - 1) * float(np.std(without)))


def _mmd2(within_x: float, within_y: float, between: float, count_x: int, count_y: int) -> float:
    """Mean of k(x, x') over pairs of different x, likewise of y, less twice the mean of k(x, y); from their sums."""
    of_x, of_y = within_x / (count_x * (count_x - 1)), within_y / (count_y * (count_y - 1))
    return float(of_x + of_y - 2 * between / (count_x * count_y))


def _sums_within(parts: list[Features]) -> NDArray[np.float64]:
    """[G, G]: the sum of k over the pairs of two groups, an image with itself left out."""
    sums = np.zeros((len(parts), len(parts)))
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[:i]):
            sums[i, j] = sums[j, i] = _kernel_sum(a, b)
        sums[i, i] = _kernel_sum(a, a) - float(_kernel((a**2).sum(axis=1), a.shape[1]).sum())
    return sums


def _kernel_sum(x: Features, y: Features) -> float:
    """The sum of k over all pairs, of which only a tile is in memory at once."""
    total = 0.0
    for a in (x[i : i + _TILE] for i in range(0, len(x), _TILE)):
        for b in (y[j : j + _TILE] for j in range(0, len(y), _TILE)):
            total += float(_kernel(a @ b.T, x.shape[1]).sum())
    return total


def _kernel(dots: Features, width: int) -> Features:
    base = dots / width + 1
    k: Features = base * base * base
    return k


def frechet_distance(x: Features, y: Features) -> float:
    """The squared Frechet distance of two Gaussians with the sets' means and covariances.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)); the trace of the root is the sum of the roots of the eigenvalues
    of C_x^(1/2) C_y C_x^(1/2), which is symmetric.

    Args:
        x: [N, F].
        y: [M, F].

    Returns:
        The distance, in squared units of the features; 0 or more.

    Raises:
        DataError: A set has fewer than four images, the widths differ, or a feature is not finite.
    """
    check_features(x, y)
    c_x, c_y = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y))
    values, vectors = np.linalg.eigh(c_x)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ c_y @ root
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    apart = x.mean(axis=0) - y.mean(axis=0)
    # Rounding may leave a set that is compared with itself a little below zero.
    return max(float(apart @ apart + np.trace(c_x) + np.trace(c_y) - 2 * roots.sum()), 0.0)


def check_features(x: Features, y: Features) -> None:
    """Refuses what cannot be compared.

    Args:
        x: [N, F].
        y: [M, F].

    Raises:
        DataError: A set has fewer than four images, the widths differ, or a feature is not finite.
    """
    for features in (x, y):
        if features.ndim != 2 or len(features) < MIN_IMAGES:
            raise DataError(f"features of shape {list(features.shape)}; expected {MIN_IMAGES} images or more, [N, F]")
        if not np.isfinite(features).all():
            raise DataError("features hold NaN or infinity")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of width {x.shape[1]} and {y.shape[1]}; expected one network's")
