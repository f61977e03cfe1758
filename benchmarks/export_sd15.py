"""How long does exporting SD v1.5's geometry take, and how much memory? Random weights, ``--verify graphs``.

The bars, on 2 cores: to ONNX (split, fp32) at most 4 minutes and 3 times the fp32 weights in memory; to Core ML (pair,
fp16) at most 12 minutes and 5 times. Needs 8 GB of disk. Name a recipe to run that one alone.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
from measure import machine

from edgediff_runtime import open_bundle

BARS = {"sd15-onnx": (4.0, 3.0), "sd15-coreml": (12.0, 5.0)}


def main() -> None:
    """Exports each recipe in a process of its own."""
    print(machine())
    for recipe in sys.argv[1:] or BARS:
        measure(recipe)


def measure(recipe: str) -> None:
    """Exports in a process of its own and reads its peak memory back."""
    most_minutes, most_weights = BARS[recipe]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "sd15"
        command = [sys.executable, "-m", "edgediff", "export", "--config", recipe, "-o", str(bundle), "--json"]
        start = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            said = running.stdout.read()
            # Of this child alone: what the ones before it took is no part of the figure.
            _, status, usage = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
        seconds = perf_counter() - start
        assert running.returncode == 0, "the export failed"
        peak = usage.ru_maxrss * 1024
        report = msgspec.json.decode(said)
        assert report["ok"], "the bundle does not hold"
        weights = 4 * open_bundle(bundle).manifest.cost["full"].parameters
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    print(recipe)
    for row in report["rows"]:
        if row["status"] == "measured":
            print(f"  {row['check']} {row['part']}: {row['psnr_db']} dB ({row['output']})")
    minutes, ratio = seconds / 60, peak / weights
    print(f"  time: {seconds:.0f} s (bar: {60 * most_minutes:.0f} s) {'ok' if minutes <= most_minutes else 'MISSED'}")
    print(
        f"  peak memory: {peak / 1e9:.2f} GB, {ratio:.2f} x the {weights / 1e9:.2f} GB of fp32 weights "
        f"(bar: {most_weights}) {'ok' if ratio <= most_weights else 'MISSED'}"
    )
    print(f"  bundle: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
