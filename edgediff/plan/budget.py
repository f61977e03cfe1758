"""What a clock costs, as a share of clock 1: in operations counted, or in milliseconds measured on this machine.

Every full step costs the same and so does every cached one: a share follows from the number of cached steps alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgediff.errors import ConfigError
from edgediff.inspect.survey import survey_bundle
from edgediff.plan.trajectory import Mask, Trajectories
from edgediff_runtime import EdgePipeline
from edgediff_runtime.clock import format_mask

UNITS = ("flops", "latency")
# A budget of 70 is a percentage by mistake; one a little above 1 asks for clock 1 and gets it.
MAX_BUDGET = 2.0
# Generations of each clock in turns, and steps of each kind that a median is taken over, at least.
ROUNDS, SAMPLES = 3, 24


@dataclass(frozen=True)
class StepCost:
    """What a full and a cached step cost.

    The unit ``flops`` is GFLOPs of one sample, attention matmuls included; ``latency`` is milliseconds of one image,
    hand-off and scheduler included.
    """

    unit: str
    full: float
    cached: float

    def share(self, mask: Mask) -> float:
        """What a mask costs of clock 1.

        >>> StepCost("flops", 10.0, 4.0).share((True, False))
        0.7
        """
        return sum(self.full if full else self.cached for full in mask) / (len(mask) * self.full)

    def fits(self, mask: Mask, budget: float) -> bool:
        """Whether a mask meets a budget; a budget copied from a table, with its last digit rounded, does."""
        return self.share(mask) <= budget + 1e-9

    def fewest_cached(self, budget: float, steps: int) -> int:
        """How many steps must be cached to meet a budget; a ConfigError names the nearest budget where none meets it.

        >>> StepCost("flops", 10.0, 4.0).fewest_cached(0.7, 8)
        4
        """
        for cached in range(steps):
            cheapest = (*(True,) * (steps - cached), *(False,) * cached)
            if self.fits(cheapest, budget):
                return cached
        if self.cached >= self.full and steps > 1:
            raise ConfigError(
                f"no clock saves {self.unit} with this bundle: a cached step costs {self.format(self.cached)}, a full "
                f"one {self.format(self.full)}; the nearest budget is 1"
            )
        share = self.share(cheapest)
        raise ConfigError(
            f"no clock of {steps} step{'s' * (steps > 1)} meets the budget of {budget:g} in {self.unit}: the "
            f"cheapest, {format_mask(cheapest)}, costs {share:.1%} of clock 1; the nearest budget is "
            f"{math.ceil(share * 1000) / 1000:g}"
        )

    def format(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{cost:.3g} {'GFLOPs' if self.unit == 'flops' else 'ms'}"


def check_budget(budget: float, unit: str) -> None:
    """Refuses a budget that is not above 0 and up to 2, and an unknown unit, with a ConfigError."""
    if unit not in UNITS:
        raise ConfigError(f"budget unit is {unit!r}; choices: {', '.join(UNITS)}")
    if not 0 < budget <= MAX_BUDGET:  # NaN is neither
        raise ConfigError(
            f"budget is {budget:g}; expected a share of clock 1's cost above 0, such as 0.7, {MAX_BUDGET:g} at most"
        )


def count_cost(bundle: Path) -> StepCost:
    """Reads the operations of a step out of a bundle's manifest."""
    found = survey_bundle(bundle, clock="1", steps=1, batch=1)
    full, cached = (1e3 * found.tflops((kind,), attention=True) for kind in (True, False))
    return StepCost("flops", full, cached)


def time_cost(images: Trajectories) -> StepCost:
    """Times steps: medians over generations of the first planning image at clock 1 and at clock 2, in turns.

    Without a second step, a cached one costs what a full one does.
    """
    pipe = EdgePipeline(images.manifest, images.session, warn=False)
    times: dict[bool, list[float]] = {True: [], False: []}
    rounds = max(ROUNDS, math.ceil(SAMPLES / max(images.steps // 2, 1)))
    for n in range(rounds + 1):
        images.say(f"planning: timing steps, round {n + 1} of {rounds + 1}")
        for clock in (1, 2):
            for step in pipe(**images.request(0), clock=clock).ledger:
                if n:  # the first generations of a session are not the loop's time
                    times[step.full].append(sum(step.ms.values()))
    return StepCost("latency", median(times[True]), median(times[False] or times[True]))


def cached_steps(mask: Sequence[bool]) -> int:
    """How many steps of a mask are cached."""
    return sum(not full for full in mask)
