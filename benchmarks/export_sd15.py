"""How long does exporting SD v1.5's geometry take, and how much memory? Random weights, ``--verify graphs``.

The bars: at most 4 minutes on 2 cores, and at most 3 times the fp32 weights in memory. Needs 8 GB of disk.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
from measure import machine

from edgediff_runtime import open_bundle

MINUTES = 4.0
WEIGHTS = 3.0


def main() -> None:
    """Exports in a process of its own and reads its peak memory back."""
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "sd15"
        command = ["-m", "edgediff", "export", "--config", "sd15-onnx", "-o", str(bundle), "--json"]
        start = perf_counter()
        done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE)
        seconds = perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = msgspec.json.decode(done.stdout)
        assert report["ok"], "the bundle does not hold"
        weights = 4 * open_bundle(bundle).manifest.cost["full"].parameters
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    for row in report["rows"]:
        if row["status"] == "measured":
            print(f"{row['check']} {row['part']}: {row['psnr_db']} dB ({row['output']})")
    minutes = seconds / 60
    print(f"time: {seconds:.0f} s (bar: {60 * MINUTES:.0f} s) {'ok' if minutes <= MINUTES else 'MISSED'}")
    ratio = peak / weights
    print(
        f"peak memory: {peak / 1e9:.2f} GB, {ratio:.2f} x the {weights / 1e9:.2f} GB of fp32 weights "
        f"(bar: {WEIGHTS}) {'ok' if ratio <= WEIGHTS else 'MISSED'}"
    )
    print(f"bundle: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
