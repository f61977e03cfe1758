"""How long does exporting SD v1.5's geometry take, and how much memory? Random weights, only graphs verified.

The bars, on 2 cores: to ONNX (split, fp32) at most 4 minutes and 3 times the fp32 weights in memory; to Core ML (pair,
fp16) at most 12 minutes and 5 times. Needs 8 GB of disk. Name recipes of export_configs/ to run those alone.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from measure import in_turns, machine, verdict

import edgediff
from edgediff.bench.turns import Call, Said
from edgediff_runtime import open_bundle

BARS = {"sd15-onnx": (4.0, 3.0), "sd15-coreml": (12.0, 5.0)}


def exporting(recipe: str, bundle: str) -> Iterator[Said]:
    """The only turn exports; what does not verify raises."""
    yield Said()
    start = perf_counter()
    config = edgediff.load_config(recipe)
    assert config.model is not None
    edgediff.export_bundle(edgediff.load_model(config.model), bundle, config)
    yield Said(parts={"export": [1e3 * (perf_counter() - start)]})


def main() -> None:
    """Exports each recipe in a process of its own."""
    print(machine())
    for recipe in sys.argv[1:] or BARS:
        most_minutes, most_weights = BARS.get(recipe, (float("inf"), float("inf")))
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            runner = in_turns({recipe: Call.of(exporting, recipe=recipe, bundle=str(bundle))}, 1)[recipe]
            weights = 4 * open_bundle(bundle).manifest.cost["full"].parameters
            size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        seconds = 1e-3 * runner.parts["export"][0]
        peak = 2**20 * (runner.heard[-1].peak_mib or 0.0)
        print(f"{recipe}: {seconds:.0f} s (bar: {60 * most_minutes:.0f} s) {verdict(seconds <= 60 * most_minutes)}; "
              f"peak memory {peak / 1e9:.2f} GB, {peak / weights:.2f} times the {weights / 1e9:.2f} GB of fp32 "
              f"weights (bar: {most_weights}) {verdict(peak <= most_weights * weights)}; "
              f"bundle {size / 1e9:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
