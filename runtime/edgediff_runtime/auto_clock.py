"""The auto clock: a clock that decides as it runs, by how far the high-resolution feature has moved.

highres_in runs first in every step, and what it makes follows the sample and the time. Where that has hardly moved
since the last full step, lowres would make nearly what it made then, and the adaptor stands in for it.

Constraints: every runtime decides alike, so the rule is exact (float64, one number for a whole batch however it is
divided), and a generation's decisions belong to that generation alone.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import HIGHRES_FEATURE, Graph

DEFAULT_BOUND = 3
SPELLING = re.compile(r"auto:([0-9]+(?:\.[0-9]+)?)(?::([0-9]+))?")


@dataclass(frozen=True)
class AutoClock:
    """A step is full where the high-resolution feature has moved by more than a tolerance since the last full one.

    Attributes:
        tolerance: Largest relative L2 distance at which a step may be cached, above 0.
        bound: Most cached steps in a row, 1 or more.

    >>> str(AutoClock(0.25))
    'auto:0.25:3'
    """

    tolerance: float
    bound: int = DEFAULT_BOUND

    def __post_init__(self) -> None:
        tolerance = self.tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
            raise RequestError(f"the auto clock's tolerance is {tolerance!r}; expected a finite number above 0")
        if isinstance(self.bound, bool) or not isinstance(self.bound, int) or self.bound < 1:
            raise RequestError(f"the auto clock's bound is {self.bound!r}; expected a whole number above 0")

    def __str__(self) -> str:
        return f"auto:{Decimal(repr(self.tolerance)):f}:{self.bound}"

    @classmethod
    def parse(cls, text: str) -> "AutoClock":
        """Reads ``auto:TOL`` or ``auto:TOL:BOUND``.

        Args:
            text: As a user writes it.

        Returns:
            The clock.

        Raises:
            RequestError: It is spelt otherwise, TOL is not above 0 and finite, or BOUND is 0.

        >>> AutoClock.parse("auto:0.2:5")
        AutoClock(tolerance=0.2, bound=5)
        """
        spelt = SPELLING.fullmatch(text.strip())
        tolerance = float(spelt[1]) if spelt else 0.0
        # Python converts at most 4300 digits; a bound of more steps than there can be is as good as any other.
        bound = DEFAULT_BOUND if spelt is None or spelt[2] is None else int((spelt[2].lstrip("0") or "0")[:20])
        if not (0 < tolerance < math.inf and bound > 0):
            raise RequestError(
                f"clock is {text!r}; expected auto:TOL or auto:TOL:BOUND, with a decimal TOL above 0 such as 0.2 and a "
                f"whole BOUND above 0 such as {DEFAULT_BOUND}"
            )
        return cls(tolerance, bound)


def is_auto(clock: object) -> bool:
    """Whether a clock is an auto clock, well spelt or not.

    Args:
        clock: Any clock, as a request gives it.

    Returns:
        True for an `AutoClock` and for text that begins like one.

    >>> is_auto("auto:0.2"), is_auto("1,0")
    (True, False)
    """
    return isinstance(clock, AutoClock) or (isinstance(clock, str) and clock.strip().startswith("auto"))


def divide(graphs: Iterable[Graph]) -> tuple[tuple[Graph, ...], tuple[Graph, ...]]:
    """Divides a step before the first graph that a clock is asked for.

    Args:
        graphs: In the order of a step.

    Returns:
        The graphs that run in every step before any other, and the rest.
    """
    graphs = tuple(graphs)
    clocked = [i for i, graph in enumerate(graphs) if graph.frequency in ("full_step", "cached_step")]
    cut = clocked[0] if clocked else len(graphs)
    return graphs[:cut], graphs[cut:]


def can_decide(graphs: Iterable[Graph]) -> bool:
    """Whether there is something to decide by before the first graph that a clock is asked for.

    Args:
        graphs: In the order of a step.

    Returns:
        True where a graph of every step makes ``highres_feature`` by then.
    """
    head, _ = divide(graphs)
    return any(t.name == HIGHRES_FEATURE for graph in head if graph.frequency == "step" for t in graph.outputs)


class AutoDecisions:
    """The decisions of one generation.

    It remembers the feature of the last full step, and how many cached steps there were since.
    """

    def __init__(self, clock: AutoClock) -> None:
        self._clock = clock
        self._cached = 0
        self._feature: npt.NDArray[np.floating] | None = None
        self._norms: list[float] = []

    def decide(self, feature: npt.NDArray[np.floating], forced: bool) -> tuple[bool, float | None]:
        """Decides on a step, for all of its rows at once.

        Args:
            feature: This step's ``highres_feature``, [rows, ...]; kept where the step is full.
            forced: Whether the step is full whatever it moved: the first, and one whose unconditional rows join.

        Returns:
            Whether the step is full, and how far the feature has moved since the last full step; None where `forced`,
            when there is nothing to compare with.
        """
        moved = None if forced else self._moved(feature)
        # What is no number counts as having moved.
        full = moved is None or not moved <= self._clock.tolerance or self._cached >= self._clock.bound
        if full:
            self._cached = 0
            self._feature = feature
            self._norms = [_norm(row.astype(np.float64)) for row in feature]
        else:
            self._cached += 1
        return full, moved

    def keep_rows(self, first: int) -> None:
        """Forgets the rows before one: those that guidance took with it when it ended.

        Args:
            first: The first row that stays.
        """
        assert self._feature is not None
        self._feature = self._feature[first:]
        self._norms = self._norms[first:]

    def _moved(self, feature: npt.NDArray[np.floating]) -> float:
        """The largest relative L2 distance of any row from what it was."""
        assert self._feature is not None
        ratios = []
        with np.errstate(invalid="ignore"):
            for now, then, norm in zip(feature, self._feature, self._norms, strict=True):
                distance = _norm(np.subtract(now, then, dtype=np.float64))
                ratios.append(distance / norm if norm else math.inf if distance else 0.0)
        return float(np.max(ratios))  # unlike Python's own, it lets NaN through


def _norm(x: npt.NDArray[np.float64]) -> float:
    """The square root of the sum of the squares, which are written over `x`."""
    return math.sqrt(np.square(x, out=x).sum())
