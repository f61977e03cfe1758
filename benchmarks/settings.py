"""How is ONNX Runtime to be set? Each setting for itself against what bundles recommend, in turns.

All run the recorded steps of a bundle (both rows of a guided image) and are held to them, each in a process of its
own, so that memory is its own. What a bundle recommends is in its manifest (`SessionSettings`); two settings that it
does not know are here too, to show that nothing is lost.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
from measure import machine, spread

from edgediff.bench.machine import peak_memory
from edgediff.verify.feed import run_step
from edgediff.verify.psnr import psnr_db
from edgediff.verify.reference import REFERENCE, load_reference
from edgediff_runtime import Bundle, open_bundle, ort_session
from edgediff_runtime.ort_options import session_options

SAME_DB = 90.0
# What is changed of the recommended settings, and entries of ONNX Runtime's own.
VARIANTS: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "recommended": ({}, {}),
    "rows apart, or not": ({"rows_apart": False}, {}),
    "no arena": ({"memory_arena": False}, {}),
    "no memory pattern": ({"memory_pattern": False}, {}),
    "neither": ({"memory_arena": False, "memory_pattern": False}, {}),
    "threads wait awake": ({"stop_spinning": False}, {}),
    "denormals are zero": ({}, {"session.set_denormal_as_zero": "1"}),
    "weights not laid out": ({}, {"session.disable_prepacking": "1"}),
}


@dataclass(frozen=True)
class Measured:
    """One process's figures: seconds, milliseconds of each full and cached step, MiB."""

    load_s: float
    full_ms: list[float]
    cached_ms: list[float]
    loaded_mib: float
    peak_mib: float


def main() -> None:
    """Measures every variant in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of either kind, in each process")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    print(machine())
    found: dict[str, list[Measured]] = {name: [] for name in given.only}
    for _ in range(given.rounds):
        for name in given.only:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found[name].append(process.submit(measure, given.bundle, name, given.steps).result())
    for name, runs in found.items():
        full, cached = ([ms for run in runs for ms in getattr(run, kind)] for kind in ("full_ms", "cached_ms"))
        print(
            f"{name}: full {spread(full)} ms, cached {spread(cached)} ms, "
            f"load {median(run.load_s for run in runs):.3f} s, memory {median(run.loaded_mib for run in runs):.0f} MiB "
            f"loaded, {median(run.peak_mib for run in runs):.0f} MiB at most"
        )


def measure(path: Path, name: str, count: int) -> Measured:
    """Opens the bundle so, holds it to the recorded steps, and times both kinds of step."""
    bundle = open_bundle(path)
    reference = load_reference(bundle.file(REFERENCE))
    before = peak_memory() or 0.0
    start = perf_counter()
    session = opened(bundle, *VARIANTS[name])
    load = perf_counter() - start
    loaded = peak_memory() or 0.0
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(count + 1):
        for step in reference.steps[:2]:
            start = perf_counter()
            made = run_step(session, step, session.graphs, ("out_sample",))["out_sample"]
            if turn:  # the first run finds nothing in memory
                taken[step.full].append(1e3 * (perf_counter() - start))
            assert psnr_db(step.tensors["out_sample"], made) > SAME_DB
    return Measured(load, taken[True], taken[False], loaded - before, (peak_memory() or 0.0) - before)


def opened(bundle: Bundle, changes: dict[str, bool], entries: dict[str, str]) -> ort_session.OrtSession:
    """The bundle in ONNX Runtime with other settings than it recommends."""

    def options(*args: Any) -> Any:
        made = session_options(*args)
        for entry, value in entries.items():
            made.add_session_config_entry(entry, value)
        return made

    ort_session.session_options = options
    target = bundle.manifest.target("onnx")
    assert target.session is not None
    if "rows_apart" in changes:
        changes = {"rows_apart": not target.session.rows_apart}
    target = msgspec.structs.replace(target, session=msgspec.structs.replace(target.session, **changes))
    return ort_session.OrtSession(Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, targets=(target,))))


if __name__ == "__main__":
    main()
