"""``edgediff evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff.cli.app import (
    BundleArgument,
    GuidanceOption,
    JsonOption,
    StepsOption,
    app,
    out,
    print_json,
    progress,
    toolchain,
)


@app.command(
    epilog="Examples:  edgediff evaluate bundle --images photographs   |   edgediff evaluate bundle "
    "--images photographs --clock 1 --clock 2 --clock 1,0,0,1,0,0,0,1 --num-images 500 --json"
)
def evaluate(
    bundle: BundleArgument,
    images: Annotated[Path, typer.Option(help="Photographs: a folder with a subfolder for each class.")],
    clock: Annotated[
        list[str] | None,
        typer.Option(help="Period or mask; may be given more than once. Left out: 1 and the bundle's own."),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each set, as far as the folder has twice as many.")] = 1000,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the choice of photographs.")] = 0,
    batch: Annotated[int, typer.Option(help="Images generated at once; the images do not depend on it.")] = 50,
    backend: Annotated[str | None, typer.Option(help="As for run.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of a classifier; left out, the built-in model's own.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a bundle's images with photographs: distances of features, power by frequency; a line for each clock."""
    report = toolchain("edgediff.evaluate.report", "evaluate")
    with progress() as say:
        found = report.evaluate_bundle(
            bundle,
            images,
            clocks=clock,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch=batch,
            backend=backend,
            features=features,
            progress=say,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        from edgediff.tables import evaluation_table

        out.print(evaluation_table(found))
