"""How far a mask moves the image, expected from what its steps do alone and in pairs: a model of second order.

Caching a step moves the final image a little, and small displacements add up: the squared error of their sum is the sum
of their squared errors and, for each pair, a cross term. With e_i the error of caching step i alone and e_ij that of
caching i and j, the model is

    E(mask) = sum_i e_i + sum_{i<j} (e_ij - e_i - e_j)

over the cached steps: exact for one and for two, and for any number where displacements just add up. A cached step that
follows a cached one reuses an older feature; between neighbours that is in the cross term too.

A cross term may be negative, and is kept so: two displacements can point against each other, and clipping half of the
terms would favour pairs for nothing but their sign. What must not be is that a search over thousands of masks finds
one where many such terms, none of them measured together, add up to nothing. So a mask of three and more cached steps
is not expected to do better than the best pair in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.plan.trajectory import Mask

# As many pairs as 12 steps have; above that, neighbours come first.
MAX_PAIRS = 55


def near(steps: int) -> int:
    """How far apart two steps may be for their pair to be measured.

    Args:
        steps: Denoising steps.

    Returns:
        The largest distance for which there are at most `MAX_PAIRS` pairs, never below 1: neighbours are measured at
        any number of steps.

    >>> near(8), near(12), near(20), near(50)
    (6, 10, 3, 1)
    """
    distance = max(steps - 2, 1)
    while distance > 1 and len(_pairs(steps, distance)) > MAX_PAIRS:
        distance -= 1
    return distance


def probes(steps: int) -> list[Mask]:
    """The masks that the model is made of: each step cached alone, and each pair that is near enough.

    Args:
        steps: Denoising steps.

    Returns:
        Masks, True = full; the first step is full in all.

    >>> len(probes(8))
    28
    """
    return [_with(steps, *cached) for cached in [*((i,) for i in range(1, steps)), *_pairs(steps, near(steps))]]


@dataclass(frozen=True)
class Estimate:
    """The model, measured.

    Attributes:
        alone: e_i, float64 [steps]; 0 for the first step, which is never cached.
        cross: e_ij - e_i - e_j, float64 [steps, steps], symmetric; 0 where the pair is further apart than `near`.
        near: Largest distance of a pair that was measured.
    """

    alone: NDArray[np.float64]
    cross: NDArray[np.float64]
    near: int

    @classmethod
    def of(cls, errors: Mapping[Mask, float], steps: int) -> "Estimate":
        """Makes the model of what was measured.

        Args:
            errors: The error of each of `probes`.
            steps: Denoising steps.

        Returns:
            The model.
        """
        alone, cross = np.zeros(steps), np.zeros((steps, steps))
        for i in range(1, steps):
            alone[i] = errors[_with(steps, i)]
        for i, j in _pairs(steps, near(steps)):
            cross[i, j] = cross[j, i] = errors[_with(steps, i, j)] - alone[i] - alone[j]
        return cls(alone, cross, near(steps))

    def errors(self, masks: Sequence[Mask]) -> NDArray[np.float64]:
        """The expected error of masks.

        Args:
            masks: One entry for each step, True = full.

        Returns:
            float64 [masks], none below 0.
        """
        cached = ~np.array(masks, dtype=bool)
        total = cached @ self.alone + 0.5 * np.einsum("mi,ij,mj->m", cached, self.cross, cached)
        pairs = self.alone[:, None] + self.alone[None, :] + self.cross
        np.fill_diagonal(pairs, np.inf)
        least = [pairs[np.ix_(steps, steps)].min() if steps.sum() > 2 else 0.0 for steps in cached]
        floored: NDArray[np.float64] = np.maximum(total, np.maximum(least, 0.0))
        return floored


def _pairs(steps: int, distance: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(1, steps) for j in range(i + 1, min(i + distance, steps - 1) + 1)]


def _with(steps: int, *cached: int) -> Mask:
    """The mask that caches these steps and no others."""
    return tuple(i not in cached for i in range(steps))
