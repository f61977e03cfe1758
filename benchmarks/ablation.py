"""What does each part of a student do? Gating, the spatial term, the frequency term, and its alpha, each left out.

Trains every variant of the built-in student's recipe, alpha at the paper's -1 but in one, with a budget of its own
(`--updates`) and three seeds, and compares the images of each with held-out photographs, as students.py does. A
training that was stopped goes on; what is in `--output` already is only compared.
"""

import argparse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from measure import machine

from edgediff.evaluate.distance import evaluate_distance
from edgediff.train.settings import StudentTraining, load_training, training_from
from edgediff.train.student import train_student

RECIPE = "grocery-32-student"
STEPS = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "lite": {"gating": False, "spatial": 0.0, "frequency": 0.0},
    "gating": {"spatial": 0.0, "frequency": 0.0},
    "distilled": {"gating": False},
    "both": {},
    "both-without-spatial": {"spatial": 0.0},
    "both-without-frequency": {"frequency": 0.0},
    "both-alpha-0": {"alpha": 0.0},
}


def main() -> None:
    """Trains what is not there yet, and prints a line for each variant: mean and range over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="training photographs, a subfolder for each class")
    parser.add_argument("--images", type=Path, required=True, help="held-out photographs")
    parser.add_argument("--output", type=Path, default=Path("out/ablation"))
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="these alone")
    parser.add_argument("--num-images", type=int, default=1000)
    asked = parser.parse_args()
    print(machine())
    base = msgspec.to_builtins(load_training(RECIPE, StudentTraining))
    base |= {"data": str(asked.data), "held_out": str(asked.images), "sample_every": None}
    base |= {"alpha": -1.0, "updates": asked.updates}
    # Seed by seed: what has run so far compares all variants.
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(asked.seeds):
        for name in asked.variant or VARIANTS:
            path = asked.output / f"{name}-{seed}"
            train_student(path, training_from(base | VARIANTS[name] | {"seed": seed}, StudentTraining))
            found.setdefault(name, []).append(measure(path, asked))
            print(f"{name}, seed {seed}: {spell([found[name][-1]])}", flush=True)
    for name, rows in found.items():
        print(f"{name}, {len(rows)} seed(s): {spell(rows)}")


def measure(path: Path, asked: argparse.Namespace) -> tuple[float, float, float]:
    """Kernel distance (x1000), spectrum error, and that of the top two octaves."""
    found = evaluate_distance(path, asked.images, train=asked.data, num_images=asked.num_images, steps=STEPS)
    assert found is not None
    far = found.rows[0].distances
    return 1e3 * far.kernel_distance, far.spectrum_error, far.spectrum_error_top


def spell(rows: list[tuple[float, float, float]]) -> str:
    """Means and, in brackets, the range."""
    names = ("kernel x1000", "spectrum", "top two octaves")
    values = np.array(rows)
    return ", ".join(
        f"{name} {mean:.4g} [{low:.4g}, {high:.4g}]"
        for name, mean, low, high in zip(names, values.mean(0), values.min(0), values.max(0), strict=True)
    )


if __name__ == "__main__":
    main()
