"""How far two sets of images are apart, by the features of a network.

- Kernel distance (Binkowski et al. 2018, 'Demystifying MMD GANs'): unbiased, so it does not depend on the number of
  images but for its noise, and may come out below zero where the sets are alike.
- Frechet distance (Heusel et al. 2017): grows as sets get smaller; says little with fewer images than features.
- Precision and recall (Kynkaanniemi et al. 2019): each set is the union of balls around its images, each ball reaching
  to the third nearest image of the same set. Precision is the share of the generated images within the photographs'
  balls, recall the share of the photographs within the generated ones'.

Compare the last two only between sets of one size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgediff.data.image_folder import shuffled
from edgediff.errors import DataError

# Groups of images for the jackknife.
GROUPS = 10
# Two groups of two: below that there is no spread.
MIN_IMAGES = 4
# The paper's number of neighbours.
NEIGHBOURS = 3
# Images of either set whose pairs are in memory together.
_TILE = 2048

Features = NDArray[np.float64]


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy of two sets.

    The value is unbiased, 0 is expected of sets of one distribution. The spread is the standard error by the jackknife
    over ten groups: about right where the sets differ, and up to half too large where they are alike.
    """

    value: float
    spread: float


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1, of the generated images among the photographs and of the photographs among the generated."""

    precision: float
    recall: float


def kernel_distance(x: Features, y: Features, seed: int = 0) -> KernelDistance:
    """The kernel distance of features [N, F] and [M, F] with the kernel (x.y / F + 1)^3; `seed` is the spread's.

    DataError: a set has fewer than four images, the widths differ, or a feature is not finite.
    """
    _check_features(x, y)
    count = min(GROUPS, len(x) // 2, len(y) // 2)
    parts_x, parts_y = (np.array_split(features[shuffled(len(features), seed)], count) for features in (x, y))
    within_x, within_y = _sums_within(parts_x), _sums_within(parts_y)
    between = np.array([[_kernel_sum(a, b) for b in parts_y] for a in parts_x])
    # The sums by pairs of groups give the distance without each group at no further cost.
    without = [
        _mmd2(
            within_x.sum() - 2 * within_x[i].sum() + within_x[i, i],
            within_y.sum() - 2 * within_y[i].sum() + within_y[i, i],
            between.sum() - between[i].sum() - between[:, i].sum() + between[i, i],
            len(x) - len(parts_x[i]),
            len(y) - len(parts_y[i]),
        )
        for i in range(count)
    ]
    value = _mmd2(within_x.sum(), within_y.sum(), between.sum(), len(x), len(y))
    return KernelDistance(value, math.sqrt(count - 1) * float(np.std(without)))


def _mmd2(within_x: float, within_y: float, between: float, count_x: int, count_y: int) -> float:
    """Mean of k(x, x') over pairs of different x, likewise of y, less twice the mean of k(x, y); from their sums."""
    of_x, of_y = within_x / (count_x * (count_x - 1)), within_y / (count_y * (count_y - 1))
    return float(of_x + of_y - 2 * between / (count_x * count_y))


def _sums_within(parts: list[Features]) -> NDArray[np.float64]:
    """[G, G]: the sum of k over the pairs of two groups, without the pairs of an image with itself."""
    sums = np.zeros((len(parts), len(parts)))
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[:i]):
            sums[i, j] = sums[j, i] = _kernel_sum(a, b)
        sums[i, i] = _kernel_sum(a, a) - float(_kernel((a**2).sum(axis=1), a.shape[1]).sum())
    return sums


def _kernel_sum(x: Features, y: Features) -> float:
    """The sum of k over all pairs."""
    return sum(float(_kernel(x[rows] @ y[columns].T, x.shape[1]).sum()) for rows, columns in _tiles(x, y))


def _kernel(dots: Features, width: int) -> Features:
    base = dots / width + 1
    return base * base * base


def frechet_distance(x: Features, y: Features) -> float:
    """The squared Frechet distance of Gaussians fitted to features [N, F] and [M, F].

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)); the trace of the root is the sum of the roots of the eigenvalues
    of C_x^(1/2) C_y C_x^(1/2), which is symmetric. DataError: as for `kernel_distance`.
    """
    _check_features(x, y)
    c_x, c_y = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y))
    values, vectors = np.linalg.eigh(c_x)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    symmetric = root @ c_y @ root
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((symmetric + symmetric.T) / 2), 0, None))
    apart = x.mean(axis=0) - y.mean(axis=0)
    # Rounding may leave a set compared with itself a little below zero.
    return max(float(apart @ apart + np.trace(c_x) + np.trace(c_y) - 2 * roots.sum()), 0.0)


def precision_recall(generated: Features, real: Features) -> PrecisionRecall:
    """How much of each set, both [N, F], lies within the other; a DataError also where their sizes differ."""
    _check_features(generated, real)
    if len(generated) != len(real):
        raise DataError(f"sets of {len(generated)} and {len(real)} images; expected sets of one size")
    return PrecisionRecall(
        precision=float(_covered(generated, real, _radii(real)).mean()),
        recall=float(_covered(real, generated, _radii(generated)).mean()),
    )


def _radii(x: Features) -> Features:
    """[N], the squared distance from each image to its third nearest other one."""
    # The nearest of all is the image itself.
    nearest = np.full((len(x), NEIGHBOURS + 1), np.inf)
    for rows, columns in _tiles(x, x):
        squares = _squares(x[rows], x[columns])
        if rows == columns:
            np.fill_diagonal(squares, 0.0)
        both = np.concatenate([nearest[rows], squares], axis=1)
        nearest[rows] = np.partition(both, NEIGHBOURS, axis=1)[:, : NEIGHBOURS + 1]
    radii: Features = nearest.max(axis=1)
    return radii


def _covered(x: Features, y: Features, radii: Features) -> NDArray[np.bool_]:
    """[N], whether each image of `x` lies within the ball of some image of `y`."""
    covered = np.zeros(len(x), dtype=bool)
    for rows, columns in _tiles(x, y):
        covered[rows] |= (_squares(x[rows], y[columns]) <= radii[columns]).any(axis=1)
    return covered


def _squares(x: Features, y: Features) -> Features:
    """Squared distances of all pairs; rounding may leave one a little below zero."""
    squares: Features = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x @ y.T
    return squares


def _tiles(x: Features, y: Features) -> Iterator[tuple[slice, slice]]:
    """All pairs of two sets, in pieces small enough for memory."""
    for i in range(0, len(x), _TILE):
        for j in range(0, len(y), _TILE):
            yield slice(i, i + _TILE), slice(j, j + _TILE)


def _check_features(x: Features, y: Features) -> None:
    for features in (x, y):
        if features.ndim != 2 or len(features) < MIN_IMAGES:
            raise DataError(f"features of shape {list(features.shape)}; expected {MIN_IMAGES} images or more, [N, F]")
        if not np.isfinite(features).all():
            raise DataError("features contain NaN or infinity; use another classifier")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features of width {x.shape[1]} and {y.shape[1]}; expected one network's")
