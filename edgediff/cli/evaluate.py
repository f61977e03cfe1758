"""``edgediff evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff import outputs
from edgediff.cli.app import (
    GuidanceOption,
    JsonOption,
    SchedulerOption,
    StepsOption,
    app,
    err,
    out,
    print_json,
    progress,
    read_only,
    toolchain,
)
from edgediff.zoo import check_source

evaluate = typer.Typer(help="Compare a model's images with photographs.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")

ImagesOption = Annotated[
    Path,
    typer.Option(help="Photographs: a folder with a subfolder for each class; or images alone, where there are none."),
]
ClocksOption = Annotated[
    list[str] | None,
    typer.Option(help="Of a bundle: period or mask; may be given more than once. Default: 1 and its own."),
]
BatchOption = Annotated[int, typer.Option(help="Images in one generation; the images do not depend on it.")]
BackendOption = Annotated[str | None, typer.Option(help="Of a bundle, as for run.")]


@evaluate.command(
    epilog="Examples:  edgediff evaluate distance bundle --images photographs   |   edgediff evaluate distance model "
    "--images test --train train --grid nearest.png   |   edgediff evaluate distance bundle --images photographs "
    "--clock 1 --clock 1,0,0,1,0,0,0,1 --json   |   accelerate launch -m edgediff evaluate distance model --images "
    "test --train train --num-images 50000 --batch 500"
)
def distance(
    source: Annotated[
        str, typer.Argument(help="A bundle, a diffusers directory, or a built-in name.", metavar="BUNDLE|MODEL")
    ],
    images: ImagesOption,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Photographs that the model was trained on: finds the nearest of them to each image; the reference is "
            "then all of --images, which the model must not have seen."
        ),
    ] = None,
    clock: ClocksOption = None,
    num_images: Annotated[
        int,
        typer.Option(help="Images to generate; without --train at most half as many as the folder has."),
    ] = 1000,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    scheduler: SchedulerOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the choice of photographs.")] = 0,
    batch: BatchOption = 50,
    backend: BackendOption = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of a classifier. Default: the built-in one of the classes.")
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(help="A .png to write, with --train: the images nearest to training photographs, above those."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how far images are from photographs: distances of features, power by frequency; a line for each clock.

    accelerate launch spreads the images over processes.
    """
    check_source(source)
    module = toolchain("edgediff.evaluate.distance", "evaluate distance")
    with progress() as say:
        found = module.evaluate_distance(
            source,
            images,
            train=train,
            clocks=clock,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            batch=batch,
            backend=backend,
            features=features,
            grid=grid,
            progress=say,
        )
    if found is None:  # not the main process
        return
    if found.skipped:
        err.print(found.skipped)
    if as_json:
        print_json(found.to_dict())
        return
    from edgediff.cli.render.evaluate_tables import distance_tables

    for table in distance_tables(found):
        out.print(table)
    if grid is not None:
        out.print(f"the nearest of them: {grid}")


@evaluate.command(
    epilog="Examples:  edgediff evaluate retrieval bundle --images drawings --clock 1 --clock 2 --num-prompts 500   "
    "|   edgediff evaluate retrieval pipeline --images drawings --only name=things.txt --features classifier --steps 8 "
    "--guidance-scale 3 --grid pictures.png"
)
def retrieval(
    source: Annotated[
        str,
        typer.Argument(help="A bundle, or the directory of a diffusers pipeline; of text.", metavar="BUNDLE|PIPELINE"),
    ],
    images: Annotated[
        Path, typer.Option(help="Captioned drawings: images with metadata.jsonl, whose column text has the prompts.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=FILE", help="Take only drawings whose column has a value of the file's."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train or test: the drawings that were learnt from, or held out. Default: both.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts of each split at most, a seeded choice; 0: all.")] = 0,
    label: Annotated[str, typer.Option(help="Column of the thing that a drawing shows.")] = "name",
    style: Annotated[str, typer.Option(help="Column of its style.")] = "style",
    clock: ClocksOption = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    scheduler: SchedulerOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the choice of prompts.")] = 0,
    batch: BatchOption = 50,
    backend: BackendOption = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of a classifier. Default: the built-in one that knows the things.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="A .png to write: pictures with their prompts, for a person to check.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure whether pictures are the things asked for, by a classifier; a line for each split and clock."""
    check_source(source)
    module = toolchain("edgediff.evaluate.retrieval", "evaluate retrieval")
    with progress() as say:
        found = module.evaluate_retrieval(
            source,
            images,
            only=read_only(only),
            split=split,
            num_prompts=num_prompts,
            label=label,
            style=style,
            clocks=clock,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            batch=batch,
            backend=backend,
            features=features,
            grid=grid,
            progress=say,
        )
    if found.skipped:
        err.print(found.skipped)
    if as_json:
        print_json(found.to_dict())
        return
    from edgediff.cli.render.evaluate_tables import retrieval_tables

    for table in retrieval_tables(found):
        out.print(table)
    if grid is not None:
        out.print(f"pictures with their prompts: {grid}")


@evaluate.command(
    epilog="Examples:  edgediff evaluate spectrum grocery-32 --images photographs   |   edgediff evaluate spectrum "
    "student --teacher teacher --images photographs -o out/student --steps 20"
)
def spectrum(
    model: Annotated[str, typer.Argument(help="A diffusers directory, or a built-in name; of pixels.")],
    images: ImagesOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for spectrum.json and the picture.")] = Path(
        "out/spectrum"
    ),
    teacher: Annotated[
        str | None, typer.Option(help="A model of the same samples, prediction and schedule: the gap to it.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images to generate, and photographs to noise at most.")] = 256,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    scheduler: SchedulerOption = None,
    seed: Annotated[int, typer.Option(help="Seed of all noise and of the order of photographs.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in one generation; results do not depend on it.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Measure a model by frequency: power of its images, error and response of its denoising, gates."""
    check_source(model)
    module = toolchain("edgediff.evaluate.spectrum", "evaluate spectrum")
    outputs.check_drawing("drawing spectra")
    outputs.check_folder(output)
    with progress() as say:
        found = module.evaluate_spectrum(
            model,
            images,
            teacher=teacher,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            batch=batch,
            progress=say,
        )
        say("drawing the overview")
        written = found.write(output)
    if found.report.skipped:
        err.print(found.report.skipped)
    if as_json:
        print_json(found.report.to_dict() | {"files": {name: str(path) for name, path in written.items()}})
        return
    from edgediff.cli.render.evaluate_tables import spectrum_tables

    for table in spectrum_tables(found.report):
        out.print(table)
    out.print(f"numbers: {written['numbers']}; picture: {written['overview']}")
