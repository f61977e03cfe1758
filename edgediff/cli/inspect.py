"""``edgediff inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgediff.cli.app import (
    ClockOption,
    JsonOption,
    LevelOption,
    PointOption,
    StepsOption,
    app,
    err,
    out,
    print_json,
    toolchain,
)
from edgediff.errors import ConfigError, EdgediffError
from edgediff_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edgediff.placement import Note


@app.command(epilog="Examples:  edgediff inspect sd15   |   edgediff inspect bundle --clock 4 --steps 20 --json")
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model (directory or built-in name) or a bundle.", metavar="MODEL|BUNDLE")
    ],
    level: LevelOption = None,
    point: PointOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    batch: Annotated[int | None, typer.Option(help="UNet rows in a step; left out, 2 where there is guidance.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show parts, parameters, operations and cache of a model or a bundle, and what a clock saves.

    Of a bundle also what is known to fall off the Neural Engine or ONNX Runtime's mobile accelerators, with a source
    for each line.
    """
    from edgediff.survey import survey_bundle

    if (Path(model) / "manifest.json").is_file():
        if level is not None or point is not None:
            raise ConfigError("--level and --point belong to a model; this is a bundle, its cut is made")
        found = survey_bundle(Path(model), clock, steps, batch)
        notes = _placement(Path(model))
    else:
        notes = None
        survey = toolchain("edgediff.models.survey", "inspect MODEL")
        found = survey.survey_model(model, level, point, clock, steps, batch)
    if as_json:
        print_json(found.to_dict() | ({} if notes is None else {"placement": [note.to_dict() for note in notes]}))
    else:
        from edgediff.tables import placement_table, survey_tables

        for table in survey_tables(found):
            out.print(table)
        if notes is not None:
            out.print(placement_table(notes))


def _placement(bundle: Path) -> "tuple[Note, ...] | None":
    """What is known to fall off accelerators; None on the light install, which cannot read graphs."""
    from edgediff.placement import lint_bundle

    try:
        return lint_bundle(bundle)
    except (EdgediffError, EdgeRuntimeError) as e:
        err.print(f"no placement: {e}", markup=False)
        return None
