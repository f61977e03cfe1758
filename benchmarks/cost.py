"""Does the cost grow with steps, and with images at once, as they do? Built-in models, or any bundle; clock 2.

The bar: linear within 5 %.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from measure import exported, in_turns, machine, verdict

from edgediff.bench.turns import Call, Said
from edgediff.bundle.reference import REFERENCE, load_reference, reference_request
from edgediff_runtime import EdgePipeline

MODELS = ("grocery-32", "grocery-32-student")
BAR = 0.05


def generations(bundle: str, steps: list[int], images: list[int]) -> Iterator[Said]:
    """A turn is one generation for each number of steps, and for each number of images."""
    pipe = EdgePipeline.from_pretrained(bundle)
    asked = reference_request(pipe.manifest, load_reference(Path(bundle) / REFERENCE).conditioning)
    asked |= {"clock": 2, "seed": 0, "num_images": 1, "num_inference_steps": steps[0]}
    ways = {f"steps {n}": asked | {"num_inference_steps": n} for n in steps}
    ways |= {f"images {n}": asked | {"num_images": n} for n in images}
    if not all(np.isfinite(pipe(**way).latents).all() for way in ways.values()):
        yield Said(says="latents are not finite", wrong=True)
    yield Said()
    while True:
        yield Said(parts={name: [sum(sum(s.ms.values()) for s in pipe(**way).ledger)] for name, way in ways.items()})


def main() -> None:
    """Times everything in turns, and prints what each costs and how far that is from the same for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="time this one instead of the built-in models")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        bundles = (
            {given.bundle.name: str(given.bundle)}
            if given.bundle is not None
            else {name: exported(name, Path(scratch) / name) for name in MODELS}
        )
        calls = {
            name: Call.of(generations, bundle=path, steps=given.steps, images=given.images)
            for name, path in bundles.items()
        }
        found = in_turns(calls, given.rounds)
    for name, runner in found.items():
        for what, numbers in (("steps", given.steps), ("images", given.images)):
            each = {n: median(runner.parts[f"{what} {n}"]) / n for n in numbers}
            off = max(abs(ms / median(each.values()) - 1) for ms in each.values())
            shown = ", ".join(f"{n}: {n * ms:.1f} ms ({ms:.2f} each)" for n, ms in each.items())
            print(f"{name}, {what} {shown}; off by {off:.1%} (bar: {BAR:.0%}) {verdict(off <= BAR)}")


if __name__ == "__main__":
    main()
