"""``edgediff plan-weights``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff.cli.app import (
    ClockOption,
    GuidanceOption,
    JsonOption,
    SchedulerOption,
    StepsOption,
    app,
    out,
    print_json,
    progress,
    toolchain,
)
from edgediff.cli.recipe import AdaptorOption, ConfigOption, check_recipe, load_recipe_model, recipe_with
from edgediff.targets import TARGETS


def _able() -> str:
    """The targets that have formats of fewer bits."""
    return ", ".join(name for name, form in TARGETS.items() if form.weight_formats)


@app.command(
    "plan-weights",
    epilog="Examples:  edgediff plan-weights drawings-64-student --psnr-floor 40 --conditioning prompts.txt   |   "
    "edgediff plan-weights path/to/diffusers/dir --size-mb 300 --conditioning prompts.txt -o small",
)
def plan_weights(
    model: Annotated[str | None, typer.Argument(help="A diffusers directory or a built-in name.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan, what was measured, a picture.")
    ] = (Path("out/weights")),
    psnr_floor: Annotated[
        float | None, typer.Option(help="The least PSNR, dB, that final latents and pictures are to keep.")
    ] = None,
    size_mb: Annotated[
        float | None, typer.Option(help="Or: the MB (10^6 bytes) that all weights of the pipeline may take.")
    ] = None,
    target: Annotated[str, typer.Option(help=f"Whose formats are searched: {_able()}.")] = "onnx",
    conditioning: Annotated[
        Path | None, typer.Option(help="For a model of text: prompts to draw, one a line (.txt).")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Pictures of a model without text; left out, 4.")] = None,
    config: ConfigOption = None,
    adaptor: AdaptorOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    guidance_scale: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a search of other settings.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose what each weight is stored in: the fewest bytes at a floor of PSNR, or the least error at a size.

    Every weight is rounded alone and the pictures are drawn with it; an interrupted search goes on where it was. The
    plan is for `edgediff export MODEL --weights out/weights/weights.json`.
    """
    from edgediff.data.arrays import read_prompts
    from edgediff.outputs import check_drawing, check_folder

    given = {"model": model, "adaptor": adaptor, "clock": clock, "steps": steps, "scheduler": scheduler,
             "guidance_scale": guidance_scale, "targets": [target]}  # fmt: skip
    checked = check_recipe(recipe_with(config, given))
    prompts = None if conditioning is None else read_prompts(conditioning)
    check_drawing("the frontier")
    check_folder(output)
    searching = toolchain("edgediff.plan.weight_search", "plan-weights")
    searching.check_search(target, psnr_floor, size_mb)
    preparing = toolchain("edgediff.export.prepare", "plan-weights")
    with progress() as say:
        say(f"loading {checked.model}")
        loaded = load_recipe_model(checked, "plan-weights")
        prepared = preparing.prepare(loaded, checked, say)
        found = searching.search_weights(
            prepared, target, floor_db=psnr_floor, size_mb=size_mb, prompts=prompts, num_images=num_images, seed=seed,
            folder=output, force=force, say=say,
        )  # fmt: skip
        from edgediff.plan.weight_files import write_search

        say("drawing the frontier")
        files = write_search(found, output)
    if as_json:
        print_json(found.to_dict() | {"files": {name: str(path) for name, path in files.items()}})
        return
    from edgediff.cli.render.weight_tables import search_tables

    for table in search_tables(found):
        out.print(table)
    out.print(f"plan: {files['plan']}; picture: {files['figure']}")
    out.print(f"next: edgediff export {checked.model} --target {target} --weights {files['plan']}")
