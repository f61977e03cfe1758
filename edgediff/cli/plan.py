"""``edgediff plan``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgediff.cli.app import BundleArgument, GuidanceOption, JsonOption, StepsOption, app, out, print_json, progress


@app.command(
    epilog="Examples:  edgediff plan bundle --budget 0.7   |   edgediff plan bundle --steps 20 --budget 0.6 "
    "--in latency -o plans/phone"
)
def plan(
    bundle: BundleArgument,
    steps: StepsOption = None,
    budget: Annotated[float, typer.Option(help="Share of clock 1's cost that the clock may have.")] = 0.7,
    unit: Annotated[
        str, typer.Option("--in", help="flops (counted, attention matmuls included) or latency (measured here).")
    ] = "flops",
    num_images: Annotated[int, typer.Option(help="Planning images.")] = 16,
    guidance_scale: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the first planning image; image i has seed + i.")] = 0,
    backend: Annotated[str | None, typer.Option(help="As for run.")] = None,
    conditioning: Annotated[
        Path | None,
        typer.Option(
            help="For a model of text: prompts, one a line (.txt), or embeddings (.safetensors, .npz); taken in turn."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Plan for edits of pictures at this strength, as of `edgediff run --strength`.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that is edited, may be given more than once; left out, the bundle draws them."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture, the plan and the recipe.")] = (
        Path("out/plan")
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a plan of other settings.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the clock: the full and cached steps that move the images least, for a budget."""
    from edgediff.data.arrays import PROMPTS, load_arrays, prompt_arguments, read_prompts
    from edgediff.plan.plan_files import write_plan
    from edgediff.plan.planner import make_plan
    from edgediff_runtime.pictures import open_picture

    given: Any = None
    if conditioning is not None:
        is_text = conditioning.suffix == PROMPTS
        given = read_prompts(conditioning) if is_text else prompt_arguments(load_arrays(conditioning))
    with progress() as say:
        found = make_plan(
            bundle,
            budget,
            unit,
            steps=steps,
            num_images=num_images,
            guidance_scale=guidance_scale,
            seed=seed,
            backend=backend,
            conditioning=given,
            strength=strength,
            pictures=None if image is None else [open_picture(path, "--image") for path in image],
            output=output,
            force=force,
            progress=say,
        )
        say("planning: drawing the frontier")
        files = write_plan(found, output)
    if as_json:
        print_json(found.to_dict() | {"files": {name: str(path) for name, path in files.items()}})
        return
    from edgediff.cli.render.plan_tables import plan_tables

    for table in plan_tables(found):
        out.print(table)
    out.print(f"recipe: {files['recipe']}; picture: {files['figure']}")
    out.print(f"next: edgediff export --config {files['recipe']}")
