"""Precision and recall of a set of images (Kynkaanniemi et al. 2019, 'Improved Precision and Recall Metric').

Each set is taken for the union of balls around its images' features, each as large as the distance to the third nearest
image of the same set. Precision is the share of the generated images within the photographs' balls (how many look
real), recall the share of the photographs within the generated ones' (how much of what is real is made). Both depend on
the number of images: compare them only between sets of one size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError
from edgediff.evaluate.distances import Features, check_features

# The paper's number of neighbours.
NEIGHBOURS = 3
# Images of either set whose distances are in memory at once.
_TILE = 2048


@dataclass(frozen=True)
class PrecisionRecall:
    """How two sets of images cover each other.

    Attributes:
        precision: Share of the generated images that lie among the photographs, 0 to 1.
        recall: Share of the photographs that lie among the generated images, 0 to 1.
    """

    precision: float
    recall: float


def precision_recall(generated: Features, real: Features, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """How much of each set lies within the other.

    Args:
        generated: [N, F].
        real: [N, F], as many.
        neighbours: Which nearest image of its own set a ball reaches to.

    Returns:
        Precision and recall.

    Raises:
        DataError: A set has fewer than four images or no more than `neighbours`, the sets differ in size or width, or
            a feature is not finite.
    """
    check_features(generated, real)
    if len(generated) != len(real):
        raise DataError(f"sets of {len(generated)} and {len(real)} images; expected sets of one size")
    if len(real) <= neighbours:
        raise DataError(f"{len(real)} images; expected more than {neighbours}")
    return PrecisionRecall(
        precision=float(_covered(generated, real, _radii(real, neighbours)).mean()),
        recall=float(_covered(real, generated, _radii(generated, neighbours)).mean()),
    )


def _radii(x: Features, neighbours: int) -> Features:
    """[N], the squared distance from each image to its `neighbours`-th nearest other one."""
    # The nearest of all is the image itself.
    nearest = np.full((len(x), neighbours + 1), np.inf)
    for rows, columns, squares in _squares(x, x):
        if rows == columns:
            np.fill_diagonal(squares, 0.0)
        both = np.concatenate([nearest[rows], squares], axis=1)
        nearest[rows] = np.partition(both, neighbours, axis=1)[:, : neighbours + 1]
    radii: Features = nearest.max(axis=1)
    return radii


def _covered(x: Features, y: Features, radii: Features) -> NDArray[np.bool_]:
    """[N], whether each image of `x` lies within the ball of some image of `y`."""
    covered = np.zeros(len(x), dtype=bool)
    for rows, columns, squares in _squares(x, y):
        covered[rows] |= (squares <= radii[columns]).any(axis=1)
    return covered


def _squares(x: Features, y: Features) -> Iterator[tuple[slice, slice, Features]]:
    """Squared distances of all pairs, tile by tile; rounding may leave one a little below zero."""
    of_x, of_y = (x**2).sum(axis=1), (y**2).sum(axis=1)
    for i in range(0, len(x), _TILE):
        rows = slice(i, i + _TILE)
        for j in range(0, len(y), _TILE):
            columns = slice(j, j + _TILE)
            yield rows, columns, of_x[rows, None] + of_y[columns] - 2 * x[rows] @ y[columns].T
