"""How much of a cached step is spent outside of the graphs? grocery-32, batch 1, ONNX Runtime.

The bar: scheduler, hand-off and clock together take at most 3 % of a cached step. What times them is a process of its
own, without torch, as on a device.
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
from measure import machine, spread

import edgediff
from edgediff_runtime import EdgePipeline
from edgediff_runtime.loop import OUTSIDE

GENERATIONS = 40
BAR = 0.03


def main() -> None:
    """Exports the built-in model, checks that repeated generations agree, and times cached steps."""
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        config = msgspec.structs.replace(edgediff.load_config("grocery-32-onnx"), adaptor="identity")
        edgediff.export_bundle(edgediff.load_model("grocery-32"), bundle, config)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            whole, outside = process.submit(cached_steps, bundle).result()
    shares = [part / step for part, step in zip(outside, whole, strict=True)]
    print(f"cached step, ms (median [p10, p90], {len(whole)} steps): {spread(whole)}")
    print(f"outside of the graphs, ms: {spread(outside)}")
    share = float(np.median(shares))
    print(f"share: {share:.2%} (bar: {BAR:.0%}) {'ok' if share <= BAR else 'MISSED'}")


def cached_steps(bundle: Path) -> tuple[list[float], list[float]]:
    """Milliseconds of each cached step, and of what of it is outside of the graphs."""
    assert "torch" not in sys.modules
    pipe = EdgePipeline.from_pretrained(bundle)
    asked = {"num_images": 1, "guidance_scale": 1.0, "seed": 0}
    want = pipe(**asked).latents
    whole, outside = [], []
    for _ in range(GENERATIONS):
        result = pipe(**asked)
        assert np.array_equal(result.latents, want), "a generation is not what it was"
        for step in result.ledger:
            if not step.full:
                whole.append(sum(step.ms.values()))
                outside.append(sum(step.ms.get(part, 0.0) for part in OUTSIDE))
    return whole, outside


if __name__ == "__main__":
    main()
