"""The main job on a built-in model: export, verify, generate with two clocks, compare."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediff.bundle.rows import ParityReport
from edgediff.config.recipes import find_recipe
from edgediff.errors import ConfigError
from edgediff.export.export_bundle import export_bundle
from edgediff.export.export_config import load_config
from edgediff.inspect.survey import survey_bundle
from edgediff.models.load import load_model
from edgediff.verify.parity import verify_bundle
from edgediff_runtime import EdgePipeline, Result
from edgediff_runtime.image import grid, write_png

# Built-in models with weights and a recipe of their name; the first is shown unless another is named.
MODELS = ("grocery-32-student", "grocery-32")
IMAGES = 16
ROUNDS = 2
SCALE = 4


@dataclass(frozen=True)
class Shown:
    """What the demo did.

    Attributes:
        name: Of the model.
        bundle: Where the bundle is.
        report: Its verification.
        result: The generation at the recipe's clock.
        clock: That clock.
        steps: Denoising steps.
        images: Images of each generation.
        gflops: For one image at clock 1 and at the recipe's clock, attention matmuls left out.
        gflops_attention: The same with them.
        loop_ms: Milliseconds of the UNet loop for all images, likewise.
        pictures: Where the grids are.
    """

    name: str
    bundle: Path
    report: ParityReport
    result: Result
    clock: int | str
    steps: int
    images: int
    gflops: tuple[float, float]
    gflops_attention: tuple[float, float]
    loop_ms: tuple[float, float]
    pictures: dict[str, Path]


def run_demo(folder: Path, say: Callable[[str], None], model: str = MODELS[0]) -> Shown:
    """Exports a built-in model, verifies it, and generates the same images with clock 1 and the recipe's clock.

    Args:
        folder: For the bundle and the pictures; a valid bundle in it is used again.
        say: Told what is being done.
        model: One of ``MODELS``.

    Returns:
        What was done.

    Raises:
        EdgediffError: The model is another, something is in the way, or a number does not hold.
    """
    if model not in MODELS:
        raise ConfigError(f"the demo does not show {model!r}; choices: {', '.join(MODELS)}")
    config = load_config(find_recipe(model))
    say(f"loading {model}")
    loaded = load_model(model)
    bundle = folder / "bundle"
    # A bundle of another version is the demo's own to replace; files that are not its own stop it.
    done = export_bundle(loaded, bundle, config, force=True, progress=say)
    report = done.report
    if report is None:
        report = verify_bundle(bundle, loaded, progress=lambda what: say(f"verifying: {what}"))
    pipe = EdgePipeline.from_pretrained(bundle)
    pipe(num_images=1, num_inference_steps=1, clock=1)  # the first call of a session is not the loop's time
    runs = []
    for again in range(ROUNDS):
        say(f"generating with clock 1 and clock {config.clock}, round {again + 1} of {ROUNDS}")
        runs.append((pipe(num_images=IMAGES, clock=1), pipe(num_images=IMAGES)))
    # Of each the faster run: what else the machine does only ever adds time.
    always, clocked = (min(results, key=_loop_ms) for results in zip(*runs, strict=True))
    pictures = {
        "clock 1": folder / "clock-1.png",
        f"clock {config.clock}": folder / f"clock-{config.clock}.png",
        "both": folder / "both.png",
    }
    left, right = grid(always.images), grid(clocked.images)
    gap = np.full((left.shape[0], 4, left.shape[2]), 255, dtype=np.uint8)
    for path, image in zip(pictures.values(), (left, right, np.hstack([left, gap, right])), strict=True):
        write_png(path, image, SCALE)
    survey = survey_bundle(bundle, None, None, None)
    every = (True,) * config.steps
    return Shown(
        name=loaded.name,
        bundle=bundle,
        report=report,
        result=clocked,
        clock=config.clock,
        steps=config.steps,
        images=IMAGES,
        gflops=(1e3 * survey.tflops(every, False), 1e3 * survey.tflops(survey.mask, False)),
        gflops_attention=(1e3 * survey.tflops(every, True), 1e3 * survey.tflops(survey.mask, True)),
        loop_ms=(_loop_ms(always), _loop_ms(clocked)),
        pictures=pictures,
    )


def _loop_ms(result: Result) -> float:
    return sum(sum(step.ms.values()) for step in result.ledger)
