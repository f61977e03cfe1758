"""What is a student worth? The built-in student and its teacher; name a plain small UNet ('Lite') between them.

Lite is trained by the recipe `grocery-32-lite`. With `--images`, distances of 1,000 generated images from held-out
photographs: 20 steps of DPM-Solver++ 2M, guidance 2, the same noise and classes for all. The bars: the student's kernel
distance at least 20 % below Lite's, its spectrum error in the top two octaves at least 30 % below, at most an eighth of
its teacher's multiply-adds, and a step in ONNX Runtime at least six times as fast as its teacher's. `--train FOLDER`
also finds the nearest training photographs.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from measure import machine, spread

import edgediff
from edgediff.config.choices import Cut
from edgediff.config.floors import VerifyConfig
from edgediff.evaluate.distance import evaluate_distance
from edgediff.models.macs import tally
from edgediff_runtime import EdgePipeline
from edgediff_runtime.manifest import Cost

TEACHER, STUDENT = "grocery-32", "grocery-32-student"
ROUNDS = 40
STEPS = 20


def main() -> None:
    """Counts operations, times steps and, with photographs, measures distances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[TEACHER, STUDENT], help="teacher, Lite, student")
    parser.add_argument("--images", type=Path, help="held-out photographs, a subfolder for each class")
    parser.add_argument("--train", type=Path, help="training photographs")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(machine())
    costs = {name: cost(name) for name in asked.models}
    teacher = costs[asked.models[0]]
    for name, found in costs.items():
        print(
            f"{Path(name).name}: {found.parameters:,} parameters, {found.macs:,} multiply-adds, "
            f"{found.macs_attention:,} of attention: 1/{teacher.macs / found.macs:.1f}"
        )
    latency(asked.models)
    if asked.images is not None:
        distances(asked.models, asked)


def cost(name: str) -> Cost:
    """The cost of a full step of a model, one sample."""
    model = edgediff.load_model(name)
    return tally(edgediff.split(model.unet, Cut()), model.sample_shape, model.conditioning.tensors).parts["full"]


def latency(names: list[str]) -> None:
    """Times a full step of each model in turns: one image with guidance (two rows), then one without."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for name in names:
            path = Path(folder) / Path(name).name
            config = edgediff.ExportConfig(adaptor="identity", verify=VerifyConfig(mode="graphs"))
            edgediff.export_bundle(edgediff.load_model(name), path, config)
            pipes[name] = EdgePipeline.from_pretrained(path)
        for guidance, rows in ((2.0, 2), (1.0, 1)):
            steps: dict[str, list[float]] = {name: [] for name in names}
            want = {}
            for _ in range(ROUNDS):
                for name, pipe in pipes.items():
                    result = pipe(num_images=1, clock=1, guidance_scale=guidance, seed=0)
                    assert np.array_equal(result.latents, want.setdefault(name, result.latents)), name
                    steps[name].append(median(sum(step.ms.values()) for step in result.ledger))
            for name, found in steps.items():
                ratio = median(steps[names[0]]) / median(found)
                print(f"{Path(name).name}, a step of {rows} row(s), ms: {spread(found)}: {ratio:.2f} times as fast")


def distances(names: list[str], asked: argparse.Namespace) -> None:
    """Prints the distances of each model, and the student's against Lite's."""
    kernels, tops = {}, {}
    for name in names:
        found = evaluate_distance(
            name, asked.images, train=asked.train, num_images=asked.num_images, steps=STEPS, seed=asked.seed
        )  # fmt: skip
        assert found is not None
        row = found.rows[0]
        far = row.distances
        kernels[name], tops[name] = far.kernel_distance, far.spectrum_error_top
        print(
            f"{Path(name).name}: kernel x1000 {1e3 * far.kernel_distance:.1f} +- {1e3 * far.kernel_spread:.1f}, "
            f"Frechet {far.frechet_distance:.1f}, precision {far.precision:.3f}, recall {far.recall:.3f}, spectrum "
            f"{far.spectrum_error:.3f}, top two octaves {far.spectrum_error_top:.3f}, {row.closeness}"
        )
    if len(names) > 2:
        lite, student = names[1], names[-1]
        for what, values, bar in (("kernel distance", kernels, 0.8), ("top two octaves", tops, 0.7)):
            ratio = values[student] / values[lite]
            print(f"{what}, {Path(student).name} over {Path(lite).name}: {ratio:.3f} (bar: {bar}) "
                  f"{'ok' if ratio <= bar else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
