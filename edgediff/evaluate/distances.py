"""Distances between two sets of images, from the features of a network.

The kernel distance (Binkowski et al. 2018, 'Demystifying MMD GANs') does not depend on the number of images but for
its noise, and may come out below zero where the sets are alike. The Frechet distance (Heusel et al. 2017) grows as sets
get smaller: compare it only between sets of one size, and with care where there are fewer images than features.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError
from edgediff.train.data import shuffled

GROUPS = 10
# Two groups of two: below that there is no spread.
MIN_IMAGES = 4
_DEGREE = 3

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
    _check(x, y)
    count = min(GROUPS, len(x) // 2, len(y) // 2)
    without = [
        _mmd2(np.delete(x, of_x, axis=0), np.delete(y, of_y, axis=0))
        for of_x, of_y in zip(_groups(len(x), count, seed), _groups(len(y), count, seed), strict=True)
    ]
    return KernelDistance(_mmd2(x, y), math.sqrt(count - 1) * float(np.std(without)))


def _groups(size: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    return np.array_split(shuffled(size, seed), count)


def _mmd2(x: Features, y: Features) -> float:
    """Mean of k(x, x') over pairs of different x, likewise of y, less twice the mean of k(x, y)."""
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * float(_kernel(x, y).mean())


def _mean_of_pairs(x: Features) -> float:
    k = _kernel(x, x)
    return float(k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))


def _kernel(x: Features, y: Features) -> Features:
    k: Features = (x @ y.T / x.shape[1] + 1) ** _DEGREE
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
    _check(x, y)
    c_x, c_y = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y))
    values, vectors = np.linalg.eigh(c_x)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ c_y @ root
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    apart = x.mean(axis=0) - y.mean(axis=0)
    # Rounding may leave a set that is compared with itself a little below zero.
    return max(float(apart @ apart + np.trace(c_x) + np.trace(c_y) - 2 * roots.sum()), 0.0)


def _check(x: Features, y: Features) -> None:
    for features in (x, y):
        if features.ndim != 2 or len(features) < MIN_IMAGES:
            raise DataError(f"features of shape {list(features.shape)}; expected {MIN_IMAGES} images or more, [N, F]")
        if not np.isfinite(features).all():
            raise DataError("features hold NaN or infinity")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of width {x.shape[1]} and {y.shape[1]}; expected one network's")
