"""What is a learned adaptor worth? Built-in models, 8 steps of DPM-Solver++ 2M, guidance 2, at clock 2 and clock 4.

The same seeds and labels at clock 1, with the identity and with the built-in adaptor trained for that clock, in ONNX
Runtime. PSNR of 8-bit images against clock 1, a mean over 64 seeds with labels one after the other. The bar: 3 dB above
the identity. With `--images FOLDER` (photographs, a subfolder for each class) also the distances of image sets.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from measure import machine

import edgediff
from edgediff.config.floors import VerifyConfig
from edgediff.evaluate.distance import evaluate_distance
from edgediff_runtime import EdgePipeline

SEEDS = 64
FIRST_SEED = 10_000
BAR_DB = 3.0
CLOCKS = (2, 4)
MODELS = ("grocery-32", "grocery-32-student")


def main() -> None:
    """Exports a bundle for each adaptor, then compares images, and sets of images where photographs are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="photographs, a subfolder for each class")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--model", action="append", choices=MODELS, help="left out, all")
    asked = parser.parse_args()
    print(machine())
    for model, clock in itertools.product(asked.model or MODELS, CLOCKS):
        print(model)
        with tempfile.TemporaryDirectory() as folder:
            bundles = {name: export(model, Path(folder) / name, name, clock) for name in ("identity", "resnet")}
            compare(clock, bundles)
            if asked.images is not None:
                distances(clock, bundles, asked.images, asked.num_images)


def export(model: str, path: Path, adaptor: str, clock: int) -> Path:
    """Exports a model with an adaptor for a clock; only its graphs are verified here."""
    config = edgediff.ExportConfig(adaptor=adaptor, clock=clock, verify=VerifyConfig(mode="graphs"))
    edgediff.export_bundle(edgediff.load_model(model), path, config)
    return path


def compare(clock: int, bundles: dict[str, Path]) -> None:
    """Prints the PSNR of each adaptor's images against clock 1."""
    found = {}
    for name, bundle in bundles.items():
        pipe = EdgePipeline.from_pretrained(bundle)
        labels = len(pipe.manifest.conditioning.labels)
        found[name] = np.array([
            psnr(pipe(seed=FIRST_SEED + i, label=i % labels, clock=1).images,
                 pipe(seed=FIRST_SEED + i, label=i % labels).images)
            for i in range(SEEDS)
        ])  # fmt: skip
        low, high = np.quantile(found[name], (0.1, 0.9))
        print(f"clock {clock}, {name}: {found[name].mean():.2f} dB [{low:.2f}, {high:.2f}] over {SEEDS} seeds, "
              f"the worst {found[name].min():.2f}")  # fmt: skip
    gain = found["resnet"] - found["identity"]
    low, high = np.quantile(gain, (0.1, 0.9))
    verdict = "ok" if gain.mean() >= BAR_DB else "MISSED"
    print(f"clock {clock}: the learned adaptor is {gain.mean():.2f} dB [{low:.2f}, {high:.2f}] above the identity "
          f"(bar: {BAR_DB:.0f}) {verdict}; better on {np.mean(gain > 0):.0%} of the seeds")  # fmt: skip


def psnr(reference: np.ndarray, images: np.ndarray) -> float:
    """PSNR of 8-bit images in dB."""
    error = np.mean((reference.astype(np.float64) - images) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def distances(clock: int, bundles: dict[str, Path], images: Path, num_images: int) -> None:
    """Prints how far the sets are from photographs, and holds the learned adaptor's to the identity's and clock 1's."""
    kernel = {}
    for name, bundle in bundles.items():
        clocks = ("1", str(clock)) if name == "identity" else (str(clock),)
        found = evaluate_distance(bundle, images, clocks=clocks, num_images=num_images)
        assert found is not None  # on one process
        if name == "identity":
            floor = found.floor
            print(f"photographs against photographs: kernel {1e3 * floor.kernel_distance:.2f}e-3 "
                  f"+- {1e3 * floor.kernel_spread:.2f}e-3, spectrum {floor.spectrum_error:.4f}")  # fmt: skip
        for row in found.rows:
            key = "clock 1" if row.clock == "1" else name
            kernel[key] = row.distances
            made = row.distances
            print(f"{key} (clock {row.clock}), {found.num_images} images: "
                  f"kernel {1e3 * made.kernel_distance:.2f}e-3 +- {1e3 * made.kernel_spread:.2f}e-3, "
                  f"Frechet {made.frechet_distance:.2f}, spectrum {made.spectrum_error:.4f}")  # fmt: skip
    for measure in ("kernel_distance", "spectrum_error"):
        first, kept, learned = (getattr(kernel[key], measure) for key in ("clock 1", "identity", "resnet"))
        verdict = "ok" if learned < kept and learned <= 1.05 * first else "MISSED"
        print(f"clock {clock}, {measure}: learned {learned / first:.3f} of clock 1's, identity {kept / first:.3f} "
              f"(bar: below the identity, at most 1.05) {verdict}")  # fmt: skip


if __name__ == "__main__":
    main()
