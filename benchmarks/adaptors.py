"""What is a learned adaptor worth? Built-in models, 8 steps of DPM-Solver++ 2M, their guidance, at clock 2 and clock 4.

The same seeds and labels or prompts at clock 1, with the identity and with the built-in adaptor trained for that clock,
in ONNX Runtime. PSNR of 8-bit images against clock 1, a mean over 64 seeds, labels or prompts one after the other. The
bar: 3 dB above the identity. With `--images FOLDER` (photographs, a subfolder for each class) also the distances of
image sets, of the models of classes.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from drawings import taught_prompts
from measure import exported, machine, verdict

from edgediff.evaluate.distance import evaluate_distance
from edgediff_runtime import EdgePipeline, open_bundle

FIRST_SEED = 10_000
BAR_DB = 3.0
CLOCKS = (2, 4)
MODELS = ("drawings-64", "drawings-64-student", "grocery-32", "grocery-32-student")


def main() -> None:
    """Exports a bundle for each adaptor, then compares images, and sets of images where photographs are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="photographs, a subfolder for each class")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--model", action="append", choices=MODELS, help="left out, all")
    given = parser.parse_args()
    print(machine())
    for model, clock in itertools.product(given.model or MODELS, CLOCKS):
        print(f"{model}, clock {clock}")
        with tempfile.TemporaryDirectory() as folder:
            bundles = {
                name: exported(model, Path(folder) / name, adaptor=name, clock=clock) for name in ("identity", "resnet")
            }
            compare(bundles, given.seeds)
            of_classes = open_bundle(bundles["identity"]).manifest.conditioning.kind == "class"
            if given.images is not None and of_classes:
                distances(clock, bundles, given.images, given.num_images)


def compare(bundles: dict[str, str], seeds: int) -> None:
    """Prints the PSNR of each adaptor's images against clock 1."""
    found = {}
    for name, bundle in bundles.items():
        pipe = EdgePipeline.from_pretrained(bundle)
        asked = [{"seed": FIRST_SEED + i} | condition(pipe, i) for i in range(seeds)]
        found[name] = np.array([psnr(pipe(**each, clock=1).images, pipe(**each).images) for each in asked])
        print(f"  {name}: {decibels(found[name])}, the worst {found[name].min():.2f}")
    gain = found["resnet"] - found["identity"]
    print(f"  learned above identity: {decibels(gain)} (bar: {BAR_DB:.0f}) {verdict(gain.mean() >= BAR_DB)}; "
          f"better on {np.mean(gain > 0):.0%} of {seeds} seeds")  # fmt: skip


def condition(pipe: EdgePipeline, i: int) -> dict[str, Any]:
    """The label or the prompt of an image."""
    if pipe.can_encode:
        prompts = taught_prompts()
        return {"prompt": prompts[7 * i % len(prompts)]}
    return {"label": i % len(pipe.manifest.conditioning.labels)}


def decibels(values: np.ndarray) -> str:
    """The mean and, in brackets, the 10th and 90th percentile."""
    low, high = np.quantile(values, (0.1, 0.9))
    return f"{values.mean():.2f} dB [{low:.2f}, {high:.2f}]"


def psnr(reference: np.ndarray, images: np.ndarray) -> float:
    """PSNR of 8-bit images in dB."""
    error = np.mean((reference.astype(np.float64) - images) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def distances(clock: int, bundles: dict[str, str], images: Path, num_images: int) -> None:
    """Prints how far the sets are from photographs; the bar: below the identity, at most 1.05 of clock 1."""
    sets = {}
    for name, bundle in bundles.items():
        clocks = ("1", str(clock)) if name == "identity" else (str(clock),)
        found = evaluate_distance(bundle, images, clocks=clocks, num_images=num_images)
        assert found is not None  # on one process
        if name == "identity":
            sets["photographs"] = found.floor
        sets |= {"clock 1" if row.clock == "1" else name: row.distances for row in found.rows}
    for name, far in sets.items():
        print(f"  {name}: kernel distance x1000 {1e3 * far.kernel_distance:.2f} +- {1e3 * far.kernel_spread:.2f}, "
              f"Frechet {far.frechet_distance:.2f}, spectrum {far.spectrum_error:.4f}")  # fmt: skip
    for measure in ("kernel_distance", "spectrum_error"):
        first, kept, learned = (getattr(sets[key], measure) for key in ("clock 1", "identity", "resnet"))
        print(f"  {measure}: learned {learned / first:.3f} of clock 1's, identity {kept / first:.3f} "
              f"(bar: 1.05) {verdict(learned < kept and learned <= 1.05 * first)}")  # fmt: skip


if __name__ == "__main__":
    main()
