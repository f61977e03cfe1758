"""The masks with the least expected error, for each number of cached steps.

Up to `EXACT` steps all masks are looked at. Above, a beam goes through the steps in order. It keeps the best few of all
beginnings that have the same number of cached steps and the same last few steps, as many as the model reaches back:
what comes later is added to each of these alike, so nothing is dropped that could still have come out ahead.
"""

from itertools import product

import numpy as np

from edgediff.plan.budget import cached_steps
from edgediff.plan.estimate import Estimate
from edgediff.plan.trajectory import Mask

EXACT = 12


def best_masks(estimate: Estimate, keep: int) -> dict[int, list[Mask]]:
    """Finds the best masks of each cost.

    Args:
        estimate: What masks are expected to do.
        keep: How many for each number of cached steps.

    Returns:
        By the number of cached steps, from 0 up: masks whose first step is full, the best first.
    """
    steps = len(estimate.alone)
    found = _all_masks(steps) if steps <= EXACT else _beam(estimate, keep)
    ranked: dict[int, list[Mask]] = {}
    for k in np.argsort(estimate.errors(found), kind="stable"):
        ranked.setdefault(cached_steps(found[k]), []).append(found[k])
    return {count: ranked[count][:keep] for count in sorted(ranked)}


def _all_masks(steps: int) -> list[Mask]:
    return [(True, *rest) for rest in product((True, False), repeat=steps - 1)]


def _beam(estimate: Estimate, keep: int) -> list[Mask]:
    """The best few masks of each number of cached steps, step by step."""
    steps, reach = len(estimate.alone), estimate.reach
    beams: list[tuple[float, Mask]] = [(0.0, (True,))]
    for i in range(1, steps):
        grouped: dict[tuple[int, Mask], list[tuple[float, Mask]]] = {}
        for error, mask in beams:
            for full, more in ((True, 0.0), (False, estimate.added(mask, i))):
                longer = (*mask, full)
                grouped.setdefault((cached_steps(longer), longer[-reach:]), []).append((error + more, longer))
        beams = [beam for group in grouped.values() for beam in sorted(group)[:keep]]
    return [mask for _, mask in beams]
