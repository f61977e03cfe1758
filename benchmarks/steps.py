"""Ways to run a bundle's recorded steps, each in a process of its own and in turns: so memory is its own, too."""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from time import perf_counter

import numpy as np
from measure import spread

from edgediff.bench.machine import peak_memory
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import Recorded, Reference

SAME_DB = 90.0

Run = Callable[[Recorded], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """One process's figures: seconds, milliseconds of each full and cached step, MiB before, when loaded, at most."""

    load_s: float
    full_ms: list[float]
    cached_ms: list[float]
    before_mib: float
    loaded_mib: float
    peak_mib: float


def measured(opened: Callable[[], Run], reference: Reference, count: int) -> Measured:
    """Opens a way to run a step, then times both kinds of step; each result is held to what was recorded."""
    before = peak_memory() or 0.0
    start = perf_counter()
    run = opened()
    load = perf_counter() - start
    loaded = peak_memory() or 0.0
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(count + 1):
        for step in reference.steps[:2]:
            start = perf_counter()
            made = run(step)
            if turn:  # the first run finds nothing in memory
                taken[step.full].append(1e3 * (perf_counter() - start))
            assert psnr_db(step.tensors["out_sample"], made) > SAME_DB
    return Measured(load, taken[True], taken[False], before, loaded, peak_memory() or 0.0)


def in_turns(names: Iterable[str], rounds: int, work: Callable[[str], Measured]) -> dict[str, list[Measured]]:
    """Does the work for each name, a process for each time, round by round."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, runs in found.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                runs.append(process.submit(work, name).result())
    return found


def times(runs: list[Measured]) -> str:
    """What the runs took, in words."""
    full, cached = ([ms for run in runs for ms in getattr(run, kind)] for kind in ("full_ms", "cached_ms"))
    return f"full {spread(full)} ms, cached {spread(cached)} ms, load {median(run.load_s for run in runs):.3f} s"
