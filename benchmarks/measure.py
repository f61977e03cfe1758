"""What every recipe shares: contenders in turns, and figures beside the machine and the versions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import edgediff
from edgediff.bench import ledger
from edgediff.bench.machine import describe_machine
from edgediff.bench.turns import Call, Runner, take_turns
from edgediff.bench.wording import machine_line, number
from edgediff.config.floors import VerifyConfig


def machine() -> str:
    """The processor, the cores and the versions that the figures belong to."""
    return machine_line(describe_machine())


def spread(samples: Sequence[float]) -> str:
    """The median and, in brackets, the 10th and 90th percentile; one sample as it is."""
    if len(samples) == 1:
        return number(samples[0])
    low, high = ledger.spread(tuple(samples))
    return f"{number(median(samples))} [{number(low)}, {number(high)}]"


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Samples over another's, each against the same round's."""
    return [ours / theirs for ours, theirs in zip(samples, base, strict=True)]


def verdict(holds: bool) -> str:
    """Whether a bar is met, in one word."""
    return "ok" if holds else "MISSED"


def exported(model: str, bundle: Path, **recipe: Any) -> str:
    """Exports a model with the identity adaptor unless the recipe says otherwise; only its graphs are verified here."""
    config = edgediff.ExportConfig(**{"adaptor": "identity", "verify": VerifyConfig(mode="graphs")} | recipe)
    edgediff.export_bundle(edgediff.load_model(model), bundle, config)
    return str(bundle)


def in_turns(contenders: Mapping[str, Call | Runner], rounds: int) -> dict[str, Runner]:
    """Times contenders in turns; the recipe ends with the reason where one cannot be measured."""
    runners = {name: Runner(name, each) if isinstance(each, Call) else each for name, each in contenders.items()}
    take_turns(list(runners.values()), rounds)
    for name, runner in runners.items():
        if runner.status != "measured":
            raise SystemExit(f"{name}: {runner.status}: {runner.says}")
    return runners
