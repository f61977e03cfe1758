"""``edgediff doctor`` and ``edgediff demo``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgediff.cli.app import JsonOption, app, out, print_json, progress, toolchain
from edgediff.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from edgediff.bundle.rows import ParityReport
    from edgediff.inspect.survey import Survey
    from edgediff_runtime import Result

# Built-in models with weights and a recipe of their name; the first is the default.
MODELS = (
    "drawings-64-student", "drawings-64-student-4-steps", "drawings-64", "grocery-32-student", "grocery-32",
)  # fmt: skip
# What models of text are asked for; the others draw their classes one after the other.
PROMPTS = (
    "red apple, fluent 3d", "avocado, fluent 3d", "watermelon, fluent flat", "hamburger, fluent 3d",
    "dog face, fluent 3d", "panda, fluent flat", "frog, twemoji", "butterfly, fluent 3d",
    "soccer ball, noto", "rocket, fluent 3d", "taxi, noto", "sailboat, fluent 3d",
    "mushroom, noto", "sunflower, noto", "cactus, twemoji", "star, fluent 3d",
)  # fmt: skip
IMAGES = len(PROMPTS)
ROUNDS = 2
SCALE = 4


@app.command(epilog="Examples:  edgediff doctor   |   edgediff doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Say which versions are installed, what this machine can and cannot do, and which pairs are known to fail."""
    from edgediff.doctor import examine

    found = examine()
    if as_json:
        print_json(found.to_dict())
    else:
        from edgediff.cli.render.tables import doctor_tables

        for table in doctor_tables(found):
            out.print(table)
    if found.known_bad:
        raise VerificationError(f"{len(found.known_bad)} known-bad pair(s) of versions: {found.known_bad[0]}")


@app.command(epilog="Examples:  edgediff demo -o demo   |   edgediff demo grocery-32-student")
def demo(
    model: Annotated[
        str,
        typer.Argument(help=f"What to show: {', '.join(MODELS)}."),
    ] = MODELS[0],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle and the pictures.")] = Path(
        "out/demo"
    ),
) -> None:
    """Do the main job on a built-in model: export, verify, generate at clock 1 and clock 2, compare."""
    from edgediff.cli.render.tables import demo_tables
    from edgediff.outputs import check_folder
    from edgediff.site.built_page import is_built

    if model not in MODELS:
        raise ConfigError(f"the demo does not show {model!r}; choices: {', '.join(MODELS)}")
    check_folder(output)
    toolchain("edgediff.export.export_bundle", "demo")
    with progress() as say:
        shown = run_demo(output, say, model)
    for table in demo_tables(shown):
        out.print(table)
    if shown.prompts:
        out.print(f"prompts, row by row: {'; '.join(shown.prompts)}")
    out.print(f"in a browser: {'' if is_built() else 'make web, then '}edgediff serve {shown.bundle}")
    if not shown.report.ok:
        raise VerificationError(f"{shown.bundle}: {shown.report.failure}")


@dataclass(frozen=True)
class Shown:
    """What the demo did: the same images at clock 1 and at the recipe's clock, and the grids of both.

    Attributes:
        prompts: Of the images, row by row; empty where they are of classes.
    """

    bundle: Path
    report: "ParityReport"
    survey: "Survey"
    always: "Result"
    clocked: "Result"
    pictures: dict[str, Path]
    prompts: tuple[str, ...] = ()


def run_demo(folder: Path, say: Callable[[str], None], model: str) -> Shown:
    """Exports one of `MODELS`, verifies it, and generates the same images with clock 1 and the recipe's clock.

    A valid bundle that is in the folder already is used again.

    Raises:
        EdgediffError: Something is in the way, or a number does not hold.
    """
    import numpy as np
    import torch

    from edgediff.config.recipes import find_recipe
    from edgediff.export.export_bundle import export_bundle
    from edgediff.export.export_config import load_config
    from edgediff.inspect.survey import survey_bundle
    from edgediff.models.load import load_model
    from edgediff.verify.parity import verify_bundle
    from edgediff_runtime import EdgePipeline
    from edgediff_runtime.image import grid, write_png

    torch.set_num_threads(1)  # threads wait for each other longer than such small models compute
    config = load_config(find_recipe(model))
    say(f"loading {model}")
    loaded = load_model(model)
    bundle = folder / "bundle"
    # A bundle of another version is the demo's to replace; files that are not the bundle's stop it.
    done = export_bundle(loaded, bundle, config, force=True, progress=say)
    report = done.report
    if report is None:
        report = verify_bundle(bundle, loaded, progress=lambda what: say(f"verifying: {what}"))
    pipe = EdgePipeline.from_pretrained(bundle)
    asked: dict[str, Any] = {"prompt": [*PROMPTS]} if pipe.can_encode else {"num_images": IMAGES}
    pipe(**asked, num_inference_steps=1, clock=1)  # a session's first call takes longer
    runs = []
    for again in range(ROUNDS):
        say(f"generating with clock 1 and clock {config.clock}, round {again + 1} of {ROUNDS}")
        runs.append((pipe(**asked, clock=1), pipe(**asked)))
    # The faster run of each: other load on the machine can only add time.
    always, clocked = (min(results, key=lambda result: result.ms) for results in zip(*runs, strict=True))
    left, right = grid(always.images), grid(clocked.images)
    gap = np.full((left.shape[0], 4, left.shape[2]), 255, dtype=np.uint8)
    pictures = {}
    for name, image in (("1", left), (str(config.clock), right), ("both", np.hstack([left, gap, right]))):
        stem, what = (name, name) if name == "both" else (f"clock-{name}", f"clock {name}")
        pictures[what] = folder / f"{stem}.png"
        write_png(pictures[what], image, SCALE)
    return Shown(
        bundle=bundle,
        report=report,
        survey=survey_bundle(bundle, None, None, None),
        always=always,
        clocked=clocked,
        pictures=pictures,
        prompts=PROMPTS if pipe.can_encode else (),
    )
