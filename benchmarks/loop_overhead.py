"""How much of a cached step is spent outside of the graphs? grocery-32, batch 1, ONNX Runtime, without torch.

The bar: scheduler, hand-off and clock together take at most 3 % of a cached step.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from measure import exported, in_turns, machine, ratios, spread, verdict

from edgediff.bench.turns import Call, Said
from edgediff_runtime import EdgePipeline
from edgediff_runtime.loop import OUTSIDE

ROUNDS = 40
BAR = 0.03


def cached_steps(bundle: str) -> Iterator[Said]:
    """A turn is a generation: milliseconds of each cached step, and of what of it is outside of the graphs."""
    assert "torch" not in sys.modules
    pipe = EdgePipeline.from_pretrained(bundle)
    asked = {"num_images": 1, "guidance_scale": 1.0, "seed": 0}
    want = pipe(**asked).latents
    yield Said()
    while True:
        result = pipe(**asked)
        if not np.array_equal(result.latents, want):
            yield Said(says="a generation is not what it was", wrong=True)
        steps = [step.ms for step in result.ledger if not step.full]
        outside = [sum(ms.get(part, 0.0) for part in OUTSIDE) for ms in steps]
        yield Said(parts={"cached": [sum(ms.values()) for ms in steps], "outside": outside})


def main() -> None:
    """Exports the built-in model and times cached steps."""
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bundle = exported("grocery-32", Path(folder) / "bundle")
        parts = in_turns({"loop": Call.of(cached_steps, bundle=bundle)}, int(*sys.argv[1:] or [ROUNDS]))["loop"].parts
    share = ratios(parts["outside"], parts["cached"])
    print(f"cached step, ms: {spread(parts['cached'])}; outside of the graphs, ms: {spread(parts['outside'])}")
    print(f"share: {median(share):.2%} (bar: {BAR:.0%}) {verdict(median(share) <= BAR)}")


if __name__ == "__main__":
    main()
