"""What does a step cost while two cores have a cache in common, and while they have none? Graphs of bundles in turns.

A virtual machine's host moves its cores, and within seconds. Before and after each step two processes, on a core each,
hand a number to and fro; a step during which the answer changed is left out. Give one bundle to compare its cached step
with its full one, or several of one model to compare them.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Array, c_longlong
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
from measure import machine, spread

from edgediff.bundle.feed import guided, handed_over
from edgediff.bundle.reference import REFERENCE, load_reference, step_inputs
from edgediff_runtime import open_bundle
from edgediff_runtime.bundle import Bundle
from edgediff_runtime.manifest import Graph
from edgediff_runtime.ort_options import session_options
from edgediff_runtime.ort_session import load_graphs

TURNS = 2000
# Python's own loop takes 150 to 250 ns of a round trip.
APART_NS = 400.0
WORDS = {True: "the cores have a cache in common", False: "they have none"}


class Cores:
    """Two cores, and how long a number takes from the first to the second and back.

    Attributes:
        round_trips: What each answer was told by, nanoseconds.
    """

    def __init__(self, cell: "Array[c_longlong]", other: Connection | None, apart_ns: float) -> None:
        """Takes what the process on the second core is spoken to through.

        Args:
            cell: The number.
            other: Tells the other process to begin; None where processes cannot be kept on a core, or there is but one.
            apart_ns: From how long a round trip on the cores have no cache in common.
        """
        self.round_trips: dict[bool, list[float]] = defaultdict(list)
        self._cell = memoryview(cell).cast("B").cast("q")
        self._other = other
        self._apart_ns = apart_ns

    def share(self) -> bool:
        """Whether the cores have a cache in common now; yes, where nothing can tell."""
        if self._other is None:
            return True
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            self._other.send(TURNS)
            self._other.recv()
            taken = []
            for turn in range(1, TURNS + 1):
                start = perf_counter_ns()
                self._cell[0] = turn
                while self._cell[0] != -turn:
                    pass
                taken.append(perf_counter_ns() - start)
        finally:
            os.sched_setaffinity(0, cores)
        round_trip = sorted(taken)[TURNS // 10]  # most of the others met other work
        shared = round_trip < self._apart_ns
        self.round_trips[shared].append(round_trip)
        return shared


@contextmanager
def two_cores(apart_ns: float = APART_NS) -> Iterator[Cores]:
    """Keeps a process on the second core that answers; `apart_ns` is from how long a round trip on they are apart."""
    context = get_context("spawn")
    cell = context.RawArray(c_longlong, 1)
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        yield Cores(cell, None, apart_ns)
        return
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(cell, theirs), daemon=True)
    process.start()
    try:
        yield Cores(cell, ours, apart_ns)
    finally:
        process.kill()
        process.join()


def _answer(shared: "Array[c_longlong]", asked: Connection) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cell = memoryview(shared).cast("B").cast("q")
    while True:
        turns = asked.recv()
        asked.send("ready")
        for turn in range(1, turns + 1):
            while cell[0] != turn:
                pass
            cell[0] = -turn


def recorded(bundle: Bundle, graph: Graph, two_rows: bool) -> dict[str, np.ndarray]:
    """What a graph was recorded with, or the same with two rows for each image."""
    steps = load_reference(bundle.file(REFERENCE)).steps
    step = next(step for step in steps if all(tensor.name in step.tensors for tensor in graph.inputs))
    return handed_over((graph,), step_inputs(guided(step) if two_rows else step, graph))


def opened(path: Path, two_rows: bool) -> Iterator[tuple[str, Any, dict[str, np.ndarray]]]:
    """A bundle's full and cached graph, and what each was recorded with."""
    bundle = open_bundle(path)
    target = bundle.manifest.target("onnx")
    sessions = load_graphs(bundle, target.graphs, session_options(target.settings))
    for graph in target.graphs:
        yield graph.name, sessions[graph.name], recorded(bundle, graph, two_rows)


def main() -> None:
    """Times the steps in turns, and prints them by whether the cores had a cache in common."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="+", help="of layout pair, with ONNX graphs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--guided", action="store_true", help="two rows for each image that was recorded with one")
    parser.add_argument("--apart-ns", type=float, default=APART_NS, help="the shortest round trip without a cache")
    given = parser.parse_args()
    print(machine())
    ways = {(path, name): way for path in given.bundle for name, *way in opened(path, given.guided)}
    taken: dict[bool, dict[tuple[Path, str], list[float]]] = {kind: defaultdict(list) for kind in WORDS}
    with two_cores(given.apart_ns) as cores:
        for turn in range(given.rounds + 1):
            for key, (session, feeds) in ways.items():
                before = cores.share()
                start = perf_counter()
                session.run(None, feeds)
                ms = 1e3 * (perf_counter() - start)
                if cores.share() == before and turn:  # the first one meets memory that is not yet there
                    taken[before][key].append(ms)
    for kind, steps in taken.items():
        trips = cores.round_trips[kind]
        print(f"{WORDS[kind]}: " + (f"round trip {spread(trips)} ns" if trips else "never"))
        for path in given.bundle:
            for name in ("full", "cached"):
                ms = steps[path, name]
                print(f"  {path} {name:6} " + (f"{spread(ms)} ms, {len(ms)} steps" if ms else "no step"))
            if steps[path, "full"] and steps[path, "cached"]:
                print(f"  {path} cached over full {median(steps[path, 'cached']) / median(steps[path, 'full']):.3f}")


if __name__ == "__main__":
    main()
