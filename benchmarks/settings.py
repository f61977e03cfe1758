"""How is ONNX Runtime to be set? Each setting for itself against what bundles recommend, in turns.

All run the recorded steps of a bundle (both rows of a guided image) and are held to them, each in a process of its
own, so that memory is its own. What a bundle recommends is in its manifest (`SessionSettings`); what it does not know
is here too, to show that nothing is lost.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from measure import machine
from steps import Measured, Run, in_turns, measured, times

from edgediff.bundle.feed import run_step
from edgediff.bundle.reference import REFERENCE, load_reference
from edgediff_runtime import Bundle, open_bundle, ort_bound_session, ort_session
from edgediff_runtime.ort_bound_session import OrtBoundSession
from edgediff_runtime.ort_options import session_options

# Inputs and outputs bound to memory, which only a session whose threads share a graph does: "rows together" is
# what it is to be compared with, where the session takes rows apart.
BOUND = "rows together, tensors bound"
TOGETHER = "rows together"
# What is changed of the recommended settings, and entries of ONNX Runtime's own.
VARIANTS: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "recommended": ({}, {}),
    TOGETHER: ({}, {}),
    "no arena": ({"memory_arena": False}, {}),
    "no memory pattern": ({"memory_pattern": False}, {}),
    "neither": ({"memory_arena": False, "memory_pattern": False}, {}),
    "threads wait awake": ({"stop_spinning": False}, {}),
    "denormals are zero": ({}, {"session.set_denormal_as_zero": "1"}),
    "weights not laid out": ({}, {"session.disable_prepacking": "1"}),
    BOUND: ({}, {}),
}


def main() -> None:
    """Measures every variant in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of either kind, in each process")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    print(machine())
    found = in_turns(given.only, given.rounds, partial(measure, given.bundle, given.steps))
    for name, runs in found.items():
        loaded, peak = (
            median(getattr(run, kind) - run.before_mib for run in runs) for kind in ("loaded_mib", "peak_mib")
        )
        print(f"{name}: {times(runs)}, memory {loaded:.0f} MiB loaded, {peak:.0f} MiB at most")


def measure(path: Path, count: int, name: str) -> Measured:
    """The bundle with a variant's settings."""
    bundle = open_bundle(path)
    reference = load_reference(bundle.file(REFERENCE))
    return measured(lambda: opened(bundle, name), reference, count)


def opened(bundle: Bundle, name: str) -> Run:
    """The bundle in ONNX Runtime with other settings than it recommends."""
    changes, entries = VARIANTS[name]
    if name == TOGETHER:
        ort_session.APART_BYTES = 0

    def options(*args: Any) -> Any:
        made = session_options(*args)
        for entry, value in entries.items():
            made.add_session_config_entry(entry, value)
        return made

    ort_session.session_options = ort_bound_session.session_options = options
    target = bundle.manifest.target("onnx")
    assert target.session is not None
    target = msgspec.structs.replace(target, session=msgspec.structs.replace(target.session, **changes))
    bundle = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, targets=(target,)))
    session = OrtBoundSession(bundle, "cpu") if name == BOUND else ort_session.OrtSession(bundle)
    return lambda step: run_step(session, step, session.graphs, ("out_sample",))["out_sample"]


if __name__ == "__main__":
    main()
