"""Is each of ONNX Runtime's settings that a bundle recommends worth it? One changed at a time, in turns.

What is recommended is in the manifest (`SessionSettings`); each process has its own memory.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from measure import in_turns, machine, spread

from edgediff.bench.contenders import time_bundle
from edgediff.bench.turns import Call, Said
from edgediff_runtime import Bundle, open_bundle

CHANGES: dict[str, dict[str, Any]] = {
    "recommended": {},
    "all threads share every operation": {"rows_apart": False},
    "no arena": {"memory_arena": False},
    "no memory pattern": {"memory_pattern": False},
    "neither": {"memory_arena": False, "memory_pattern": False},
    "threads spin after a run": {"stop_spinning": False},
}


def changed(bundle: str, changes: dict[str, Any]) -> Iterator[Said]:
    """The bundle with other settings than it recommends."""
    opened = open_bundle(Path(bundle))
    target = opened.manifest.target("onnx")
    target = msgspec.structs.replace(target, session=msgspec.structs.replace(target.settings, **changes))
    manifest = msgspec.structs.replace(opened.manifest, targets=(target,))
    yield from time_bundle(Bundle(opened.path, manifest), "onnxruntime")


def main() -> None:
    """Prints a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    print(machine())
    calls = {name: Call.of(changed, bundle=given.bundle, changes=changes) for name, changes in CHANGES.items()}
    for name, runner in in_turns(calls, given.rounds).items():
        shown = ", ".join(f"{part} {spread(runner.parts[part])} ms" for part in ("full", "cached", "load"))
        print(f"{name}: {shown}, peak memory {runner.heard[-1].peak_mib or 0.0:.0f} MiB")


if __name__ == "__main__":
    main()
