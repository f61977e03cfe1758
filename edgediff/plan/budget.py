"""What a clock costs, as a share of clock 1: in operations counted, or in milliseconds measured on this machine.

Every full step costs the same and so does every cached one, so a share follows from the number of cached steps alone.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgediff.errors import ConfigError
from edgediff.inspect.survey import survey_bundle
from edgediff.plan.trajectory import Mask, Trajectories, spell
from edgediff_runtime import EdgePipeline, OperatingPointWarning

UNITS = ("flops", "latency")
# A budget of 70 is a percentage by mistake; one a little above 1 asks for clock 1 and gets it.
MAX_BUDGET = 2.0
# Interleaved generations of each clock, and steps of each kind that a median is taken over, at least.
ROUNDS, SAMPLES = 3, 24


@dataclass(frozen=True)
class StepCost:
    """What a step costs.

    Attributes:
        unit: ``flops``: GFLOPs of one sample, attention matmuls included. ``latency``: milliseconds of one image,
            hand-off and scheduler included.
        full: A full step.
        cached: A cached step.
    """

    unit: str
    full: float
    cached: float

    def share(self, mask: Mask) -> float:
        """What a mask costs of clock 1.

        Args:
            mask: One entry for each step, True = full.

        Returns:
            A share; 1 is clock 1's cost.

        >>> StepCost("flops", 10.0, 4.0).share((True, False))
        0.7
        """
        return sum(self.full if full else self.cached for full in mask) / (len(mask) * self.full)

    def fits(self, mask: Mask, budget: float) -> bool:
        """Whether a mask meets a budget; a budget copied from a table, with its last digit rounded, does."""
        return self.share(mask) <= budget + 1e-9

    def check(self, budget: float, steps: int) -> None:
        """Refuses a budget that no mask meets.

        Args:
            budget: Share of clock 1's cost.
            steps: Denoising steps.

        Raises:
            ConfigError: With the cheapest mask, what it costs, and the nearest budget.
        """
        full, cheapest = (True,) * steps, (True, *(False,) * (steps - 1))
        if self.fits(full, budget):
            return
        if self.cached >= self.full and steps > 1:
            raise ConfigError(
                f"no clock saves {self.unit} with this bundle: a cached step costs {self.spelt(self.cached)}, a full "
                f"one {self.spelt(self.full)}; the nearest budget is 1"
            )
        if not self.fits(cheapest, budget):
            share = self.share(cheapest)
            raise ConfigError(
                f"no clock of {steps} step{'s' * (steps > 1)} meets the budget of {budget:g} in {self.unit}: the "
                f"cheapest, {spell(cheapest)}, costs {share:.1%} of clock 1; the nearest budget is "
                f"{math.ceil(share * 1000) / 1000:g}"
            )

    def spelt(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{cost:.3g} {'GFLOPs' if self.unit == 'flops' else 'ms'}"


def check_budget(budget: float, unit: str) -> None:
    """Refuses a budget that is none.

    Args:
        budget: Share of clock 1's cost.
        unit: ``flops`` or ``latency``.

    Raises:
        ConfigError: It is not a number above 0 and up to 2, or the unit is unknown.
    """
    if unit not in UNITS:
        raise ConfigError(f"a budget in {unit!r}; choices: {', '.join(UNITS)}")
    if not 0 < budget <= MAX_BUDGET:  # NaN is neither
        raise ConfigError(
            f"budget is {budget:g}; expected a share of clock 1's cost above 0, such as 0.7, {MAX_BUDGET:g} at most"
        )


def count_cost(bundle: Path) -> StepCost:
    """Reads the cost of a step out of a bundle's manifest.

    Args:
        bundle: The bundle.

    Returns:
        GFLOPs of one sample, attention matmuls included.
    """
    found = survey_bundle(bundle, clock="1", steps=1, batch=1)
    full, cached = (1e3 * found.tflops((kind,), attention=True) for kind in (True, False))
    return StepCost("flops", full, cached)


def time_cost(images: Trajectories) -> StepCost:
    """Measures the cost of a step: medians over interleaved generations of one image at clock 1 and at clock 2.

    Args:
        images: The planning images, whose first is made again and again.

    Returns:
        Milliseconds of one image. Where there is no second step, a cached one costs what a full one does.
    """
    pipe = EdgePipeline(images.manifest, images.session)
    times: dict[bool, list[float]] = {True: [], False: []}
    rounds = max(ROUNDS, math.ceil(SAMPLES / max(images.steps // 2, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OperatingPointWarning)
        for n in range(rounds + 1):
            images.say(f"planning: timing steps, round {n + 1} of {rounds + 1}")
            for clock in (1, 2):
                for step in pipe(**images.request(0), clock=clock).ledger:
                    if n:  # the first generations of a session are not the loop's time
                        times[step.full].append(sum(step.ms.values()))
    return StepCost("latency", median(times[True]), median(times[False] or times[True]))


def uniform_masks(steps: int) -> dict[int, Mask]:
    """The clocks that are a period.

    Args:
        steps: Denoising steps.

    Returns:
        Masks by their period, 1 among them, each mask once.

    >>> [spell(mask) for mask in uniform_masks(4).values()]
    ['1,1,1,1', '1,0,1,0', '1,0,0,1', '1,0,0,0']
    """
    return {period: tuple(i % period == 0 for i in range(steps)) for period in range(1, steps + 1)}


def cached_steps(mask: Sequence[bool]) -> int:
    """How many steps of a mask are cached."""
    return sum(not full for full in mask)
