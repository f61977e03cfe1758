"""How does the cost grow with steps, with images at once and with resolution? grocery-32 and its student, clock 2.

The bar: linear in steps and in images within 5 %. Resolutions are the same UNet exported for another size of sample,
where attention's share grows. Writes cost.png into the folder that it is given. With ``--bundle`` it is that bundle's
cost, whatever its size, at the one resolution that it has, on the screen alone.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from measure import machine

import edgediff
from edgediff.bundle.reference import REFERENCE, load_reference, reference_request
from edgediff.config.floors import VerifyConfig
from edgediff_runtime import EdgePipeline

MODELS = ("grocery-32", "grocery-32-student")
STEPS, IMAGES, SIZES = (4, 8, 16, 32), (1, 2, 4, 8), (16, 32, 48, 64)
BAR = 0.05
ROUNDS = 15
LARGE_STEPS, LARGE_IMAGES, LARGE_ROUNDS = (2, 4, 8), (1, 2, 4), 5
COLOURS = {"grocery-32": "#1f5fa8", "grocery-32-student": "#c2571a"}

Figures = Mapping[str, Mapping[int, float]]


def main() -> None:
    """Exports, times everything in turns, judges and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out"), help="where cost.png is to be")
    parser.add_argument("--bundle", type=Path, help="time this one, which may be large, in the built-in models' place")
    given = parser.parse_args()
    print(machine())
    if given.bundle is not None:
        large(given.bundle)
        return
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pipes = {(name, size): opened(name, size, Path(scratch)) for name in MODELS for size in SIZES}
        native = {name: pipes[name, 32] for name in MODELS}
        steps = timed({(name, n): loop(native[name], steps=n) for name in MODELS for n in STEPS})
        images = timed({(name, n): loop(native[name], images=n) for name in MODELS for n in IMAGES})
        sizes = timed({(name, size): loop(pipes[name, size]) for name in MODELS for size in SIZES})
        gflops = {key: gflop(pipe) for key, pipe in pipes.items()}
    judge("steps", steps)
    judge("images at once", images)
    for name, found in sizes.items():
        for size, ms in found.items():
            print(f"{name}, {size}x{size}: {ms:.1f} ms, {1e3 * gflops[name, size] / ms:.0f} GFLOP/s")
    draw(folder / "cost.png", {"denoising steps": steps, "images at once": images, "height and width": sizes})
    print(f"picture: {folder / 'cost.png'}")


def large(path: Path) -> None:
    """Times a bundle whose steps take seconds: few of them, and few rounds."""
    pipe = EdgePipeline.from_pretrained(path)
    given = reference_request(pipe.manifest, load_reference(path / REFERENCE).conditioning)
    embeds = {name: value for name, value in given.items() if name not in ("num_images", "seed", "clock")}
    steps = {(path.name, n): loop(pipe, steps=n, **embeds) for n in LARGE_STEPS}
    images = {(path.name, n): loop(pipe, steps=LARGE_STEPS[0], images=n, **embeds) for n in LARGE_IMAGES}
    judge("steps", timed(steps, LARGE_ROUNDS))
    judge(f"images at once, {LARGE_STEPS[0]} steps", timed(images, LARGE_ROUNDS))


def opened(name: str, size: int, scratch: Path) -> EdgePipeline:
    """A bundle of a model for another size of sample."""
    model = edgediff.load_model(name)
    model.unet.register_to_config(sample_size=size)
    path = scratch / f"{name}-{size}"
    config = edgediff.ExportConfig(adaptor="identity", verify=VerifyConfig(mode="graphs"))
    edgediff.export_bundle(model, path, config)
    return EdgePipeline.from_pretrained(path)


def gflop(pipe: EdgePipeline) -> float:
    """Operations of the loop at clock 2, attention matmuls included, in GFLOP."""
    cost = pipe.manifest.cost
    half = sum(2e-9 * (cost[part].macs + cost[part].macs_attention) for part in ("full", "cached"))
    return 2 * 4 * half  # two rows, and four steps of each kind


def loop(pipe: EdgePipeline, steps: int = 8, images: int = 1, **embeds: Any) -> Callable[[], float]:
    """One generation: milliseconds of its steps."""

    def run() -> float:
        asked: dict[str, Any] = {"num_inference_steps": steps, "num_images": images, "clock": 2, "seed": 0}
        result = pipe(**asked, **embeds)
        assert np.isfinite(result.latents).all()
        return sum(sum(step.ms.values()) for step in result.ledger)

    return run


def timed(ways: Mapping[tuple[str, int], Callable[[], float]], rounds: int = ROUNDS) -> dict[str, dict[int, float]]:
    """Medians of every way, in turns, by model and number."""
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for key, way in ways.items():
            samples[key].append(way())
    found: dict[str, dict[int, float]] = {}
    for (name, number), taken in samples.items():
        found.setdefault(name, {})[number] = median(taken)
    return found


def judge(what: str, figures: Figures) -> None:
    """Prints what each of them costs, and how far that is from the same for all."""
    for name, found in figures.items():
        each = {number: ms / number for number, ms in found.items()}
        off = max(abs(ms / median(each.values()) - 1) for ms in each.values())
        shown = ", ".join(f"{number}: {found[number]:.1f} ms ({ms:.2f} each)" for number, ms in each.items())
        print(f"{name}, {what}: {shown}; off by {off:.1%} (bar: {BAR:.0%}) {'ok' if off <= BAR else 'MISSED'}")


def draw(path: Path, panels: Mapping[str, Figures]) -> None:
    """Draws one panel for each question; a straight line is what a first point would foretell."""
    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, figures) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, found in figures.items():
            numbers: Sequence[int] = list(found)
            axes.plot(numbers, list(found.values()), "o-", color=COLOURS[name], markersize=5, label=name)
            power = 2 if what == "height and width" else 1
            first = found[numbers[0]] / numbers[0] ** power
            axes.plot(numbers, [first * n**power for n in numbers], ":", color=COLOURS[name], linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.set_xlabel(what)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("milliseconds of the loop")
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle("clock 2, guidance, ONNX Runtime; dotted: in proportion to the first point", fontsize=10)
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
