"""What every benchmark prints beside its figures: the machine, the versions, medians with their spread."""

from collections.abc import Sequence
from statistics import median

from edgediff.bench import ledger
from edgediff.bench.machine import describe_machine
from edgediff.bench.wording import machine_line, number


def machine() -> str:
    """Names the processor, the cores and the versions that the figures belong to."""
    return machine_line(describe_machine())


def spread(samples: Sequence[float]) -> str:
    """Spells samples as their median and, in brackets, their 10th and 90th percentile; one sample as it is."""
    if len(samples) == 1:
        return number(samples[0])
    low, high = ledger.spread(tuple(samples))
    return f"{number(median(samples))} [{number(low)}, {number(high)}]"
