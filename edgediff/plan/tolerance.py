"""The auto clock's tolerance for a wanted share of full steps, found by running it.

How far a feature moves depends on the model, the sampler and the number of steps, so no tolerance can be had from a
table. The share of full steps falls as the tolerance grows: it is halved in upon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgediff.plan.trajectory import Errors, Mask, Trajectories
from edgediff_runtime.auto_clock import DEFAULT_BOUND, AutoClock, can_decide

# Relative L2 distances: where the search begins, and farther than anything moves.
FIRST, WIDEST = 0.25, 1e6


@dataclass(frozen=True)
class AutoRun:
    """What an auto clock did to the planning images.

    Attributes:
        clock: The clock.
        share: Mean share of full steps.
        errors: Of each image, float64 [N].
        masks: The steps of each image as they were run.
    """

    clock: AutoClock
    share: float
    errors: Errors
    masks: tuple[Mask, ...]

    @property
    def error(self) -> float:
        """The mean of the errors."""
        return float(np.mean(self.errors))


@dataclass
class AutoClocks:
    """Auto clocks of one bound on the planning images, one by one.

    A run tells for which other tolerances it would have been the same: those between the largest movement that it let
    pass and the smallest that it did not. There it stands for them, which most runs of a search do.

    Attributes:
        images: The planning images.
        bound: Most cached steps in a row.
        runs: How many generations there were.
    """

    images: Trajectories
    bound: int = DEFAULT_BOUND
    runs: int = 0

    def __post_init__(self) -> None:
        self._known: list[list[_Known]] = [[] for _ in range(self.images.num_images)]

    def run(self, tolerance: float) -> AutoRun:
        """Measures an auto clock.

        Args:
            tolerance: Its tolerance.

        Returns:
            What it does to each image.
        """
        self.images.say(f"planning: auto clock, tolerance {tolerance:g}")
        clock = AutoClock(tolerance, self.bound)
        known = [self._one(image, clock) for image in range(self.images.num_images)]
        masks = tuple(run.mask for run in known)
        return AutoRun(clock, float(np.mean(masks)), np.array([run.error for run in known]), masks)

    def find(self, share: float) -> AutoRun:
        """Finds the smallest tolerance whose mean share of full steps is not above the wanted one.

        Args:
            share: Of the steps; the first is always full, and so is the one after `bound` cached ones.

        Returns:
            The clock, to three digits, and what it does. Its share is above the wanted one where the bound allows no
            less.
        """
        least, best = 0.0, self.run(FIRST)
        while best.share > share and best.clock.tolerance < WIDEST:
            least, best = best.clock.tolerance, self.run(4 * best.clock.tolerance)
        if best.share > share:
            return best
        while True:
            between = float(f"{(least + best.clock.tolerance) / 2:.3g}")
            if between in (least, best.clock.tolerance):
                return best
            found = self.run(between)
            if found.share > share:
                least = between
            else:
                best = found

    def _one(self, image: int, clock: AutoClock) -> "_Known":
        for known in self._known[image]:
            if known.least <= clock.tolerance < known.below:
                return known
        self.runs += 1
        error, steps = self.images.error(image, clock)
        least, below, row = 0.0, math.inf, 0
        for step in steps:
            moved = math.inf if step.moved is None or math.isnan(step.moved) else step.moved
            if not step.full:
                least = max(least, moved)
            elif row < clock.bound:
                below = min(below, moved)
            row = 0 if step.full else row + 1
        found = _Known(least, below, error, tuple(step.full for step in steps))
        self._known[image].append(found)
        return found


@dataclass(frozen=True)
class _Known:
    """A run, and the tolerances for which it is the same: from `least` up, and below `below`."""

    least: float
    below: float
    error: float
    mask: Mask


def best_auto(images: Trajectories, share: float, most: int = DEFAULT_BOUND) -> AutoRun | None:
    """Finds the auto clock for a wanted share of full steps: of least error, and of the shorter bound where two tie.

    A tolerance alone may put cached steps in a row, which costs more than they save: every bound is tried, and one that
    lets no more pass than the uniform clock is among them where the share is one.

    Args:
        images: The planning images.
        share: Of full steps; none of more is taken.
        most: The largest bound that is tried.

    Returns:
        The clock and what it does; None where no bound allows so few full steps.
    """
    best: AutoRun | None = None
    for bound in range(1, most + 1):
        run = AutoClocks(images, bound).find(share)
        if run.share > share + 1e-9:
            continue
        # A longer bound has more to fit to these images: what it gains must be more than their scatter.
        if best is None or _gain_over(run, best) > 0:
            best = run
    return best


def _gain_over(run: AutoRun, best: AutoRun) -> float:
    """By how much a clock's error is below another's on the same images, less two standard errors."""
    gains = best.errors - run.errors
    scatter = float(np.std(gains, ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(np.mean(gains)) - 2 * scatter


def refusal(images: Trajectories) -> str | None:
    """Why a bundle cannot run an auto clock.

    Args:
        images: Any planning images.

    Returns:
        One line; None where it can.
    """
    if can_decide(images.session.graphs):
        return None
    names = ", ".join(graph.name for graph in images.session.graphs)
    return f"no auto clock: it decides after highres_in, and this bundle's graphs are {names} (layout pair)"


def longest_run(mask: Sequence[bool]) -> int:
    """How many cached steps a mask has in a row, at most.

    Args:
        mask: One entry for each step, True = full.

    Returns:
        Their number.

    >>> longest_run((True, False, False, True, False))
    2
    """
    longest = now = 0
    for full in mask:
        now = 0 if full else now + 1
        longest = max(longest, now)
    return longest
