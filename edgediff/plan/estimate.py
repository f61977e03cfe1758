"""The error expected of a mask, from what its cached steps do alone, in pairs and in rows; and the best masks by it.

Caching a step moves the final image a little, and small displacements add up: the squared error of their sum is the sum
of their squared errors and, for each pair, a cross term. With e_i the error of caching step i alone and e_ij that of
caching i and j, the model is

    E(mask) = sum_i e_i + sum_{i<j} (e_ij - e_i - e_j)

over the cached steps: exact for one and for two, and for any number where displacements just add up.

They do not in a row: a cached step that follows cached ones reuses an older feature, which pairs know of neighbours
alone. So rows of three and four cached steps are measured too, and what the pairs leave out is added for each row of a
mask. On grocery-32 at 8 steps, all 128 masks measured, ranks of masks with 4, 5 and 6 cached steps agreed with
what was measured to 0.75, 0.41 and 0.11 (Spearman) without, to 0.99, 0.99 and 0.96 with rows.

A cross term may be negative, where two displacements point against each other; clipping would favour pairs for their
sign. But a search over thousands of masks would find one where many such terms, never measured together, add up to
nothing. So a mask of three and more cached steps is not expected to do better than the best pair in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from edgediff.plan.budget import cached_steps
from edgediff.plan.trajectory import Mask

# As many pairs as 12 steps have; above that, neighbours come first.
MAX_PAIRS = 55
ROWS = (3, 4)


def near(steps: int) -> int:
    """The largest distance at which two steps are measured as a pair: at most `MAX_PAIRS` pairs, neighbours always.

    >>> near(8), near(12), near(20), near(50)
    (6, 10, 3, 1)
    """
    distance = max(steps - 2, 1)
    while distance > 1 and len(_pairs(steps, distance)) > MAX_PAIRS:
        distance -= 1
    return distance


def probes(steps: int) -> list[Mask]:
    """The masks that the model is made of: each step cached alone, each pair that is near enough, rows of 3 and 4.

    >>> len(probes(8))
    37
    """
    cached = [*((i,) for i in range(1, steps)), *_pairs(steps, near(steps)), *_rows(steps)]
    return [_with(steps, *few) for few in cached]


def masks_of(steps: int, cached: int) -> list[Mask]:
    """Every mask with so many cached steps.

    >>> masks_of(3, 1)
    [(True, False, True), (True, True, False)]
    """
    return [_with(steps, *few) for few in combinations(range(1, steps), cached)]


@dataclass(frozen=True)
class Estimate:
    """The model, measured.

    Attributes:
        alone: e_i, float64 [steps]; 0 for the first step, which is never cached.
        cross: e_ij - e_i - e_j, float64 [steps, steps], symmetric; 0 where the pair is further apart than `near`.
        rows: What those leave out of a row of cached steps, by its length and its first step, float64 [5, steps].
        near: Largest distance of a pair that was measured.
    """

    alone: NDArray[np.float64]
    cross: NDArray[np.float64]
    rows: NDArray[np.float64]
    near: int

    @classmethod
    def of(cls, errors: Mapping[Mask, float], steps: int) -> "Estimate":
        """Makes the model of the measured error of each of `probes`."""
        alone, cross = np.zeros(steps), np.zeros((steps, steps))
        for i in range(1, steps):
            alone[i] = errors[_with(steps, i)]
        for i, j in _pairs(steps, near(steps)):
            cross[i, j] = cross[j, i] = errors[_with(steps, i, j)] - alone[i] - alone[j]
        estimate = cls(alone, cross, np.zeros((max(ROWS) + 1, steps)), near(steps))
        for row in _rows(steps):
            mask = _with(steps, *row)
            estimate.rows[len(row), row[0]] = errors[mask] - estimate._sums([mask])[0]
        return estimate

    def errors(self, masks: Sequence[Mask]) -> NDArray[np.float64]:
        """The expected error of each mask, float64 [masks], none below 0."""
        pairs = self.alone[:, None] + self.alone[None, :] + self.cross
        np.fill_diagonal(pairs, np.inf)
        cached = ~np.array(masks, dtype=bool)
        least = [pairs[np.ix_(steps, steps)].min() if steps.sum() > 2 else 0.0 for steps in cached]
        floored: NDArray[np.float64] = np.maximum(self._sums(masks), np.maximum(least, 0.0))
        return floored

    def best_masks(self, keep: int) -> dict[int, list[Mask]]:
        """The masks of least expected error, the best first, for each number of cached steps from 0 up.

        A beam goes through the steps in order. Of all beginnings that have the same number of cached steps and the same
        last few steps, as many as the model reaches back, it keeps the best few: what comes later is added to each of
        these alike, so nothing is dropped that could still have come out ahead.
        """
        beams: list[tuple[float, Mask]] = [(0.0, (True,))]
        for i in range(1, len(self.alone)):
            grouped: dict[tuple[int, Mask], list[tuple[float, Mask]]] = {}
            for error, mask in beams:
                for full, more in ((True, 0.0), (False, self._added(mask, i))):
                    longer = (*mask, full)
                    alike = cached_steps(longer), longer[-max(self.near, max(ROWS) - 1) :]
                    grouped.setdefault(alike, []).append((error + more, longer))
            beams = [beam for group in grouped.values() for beam in sorted(group)[:keep]]
        masks = [mask for _, mask in beams]
        ranked: dict[int, list[Mask]] = {count: [] for count in range(len(self.alone))}
        for k in np.argsort(self.errors(masks), kind="stable"):
            ranked[cached_steps(masks[k])].append(masks[k])
        return {count: best[:keep] for count, best in ranked.items()}

    def _added(self, mask: Mask, step: int) -> float:
        """What caching one more step adds to the error of the steps before it."""
        total = float(self.alone[step])
        total += sum(float(self.cross[step, j]) for j in range(step) if not mask[j])
        for length in ROWS:
            first = step - length + 1
            if first > 0 and not any(mask[first:step]):
                total += float(self.rows[length, first])
        return total

    def _sums(self, masks: Sequence[Mask]) -> NDArray[np.float64]:
        cached = ~np.array(masks, dtype=bool)
        total: NDArray[np.float64] = cached @ self.alone + 0.5 * np.einsum("mi,ij,mj->m", cached, self.cross, cached)
        for length in ROWS:
            for first in range(1, cached.shape[1] - length + 1):
                total += cached[:, first : first + length].all(axis=1) * self.rows[length, first]
        return total


def _pairs(steps: int, distance: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(1, steps) for j in range(i + 1, min(i + distance, steps - 1) + 1)]


def _rows(steps: int) -> list[range]:
    """Cached steps in a row, the shorter rows first."""
    return [range(i, i + length) for length in ROWS for i in range(1, steps - length + 1)]


def _with(steps: int, *cached: int) -> Mask:
    """The mask that caches these steps and no others."""
    return tuple(i not in cached for i in range(steps))
