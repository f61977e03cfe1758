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
    progress,
    toolchain,
)
from edgediff.errors import ConfigError, EdgediffError
from edgediff_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edgediff.inspect.placement import Note


@app.command(
    epilog="Examples:  edgediff inspect sd15   |   edgediff inspect bundle --clock 4 --steps 20 --json   |   "
    "edgediff inspect --compare clockwork   |   edgediff inspect --compare spectral"
)
def inspect(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="A model (directory or built-in name) or a bundle; with --ladder, bundles.", metavar="MODEL|BUNDLE"
        ),
    ] = None,
    level: LevelOption = None,
    point: PointOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    batch: Annotated[int | None, typer.Option(help="UNet rows in a step; left out, 2 where there is guidance.")] = None,
    adaptor: Annotated[
        str | None, typer.Option(help="Kind of adaptor to count in cached steps; left out, identity.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Instead of a model: count a paper's table; clockwork or spectral.")
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Compare bundles of one model: what they are stored in, size, PSNR, time, picture by picture.",
        ),
    ] = False,
    picture: Annotated[Path, typer.Option(help="Where --ladder draws the pictures side by side.")] = (
        Path("ladder.png")
    ),
    as_json: JsonOption = False,
) -> None:
    """Show parts, parameters, operations and cache of a model or a bundle, and what a clock saves.

    Of a bundle also what is known to fall off the Neural Engine or ONNX Runtime's or LiteRT's accelerators, with
    a source for each line.
    """
    from edgediff.inspect.survey import check_batch, check_comparison, survey_bundle
    from edgediff.zoo import check_source
    from edgediff_runtime import clock_mask

    model = models[0] if models else None
    if ladder:
        _climb(models or [], picture, as_json)
        return
    if models is not None and len(models) > 1:
        raise ConfigError(f"expected one MODEL or BUNDLE, got {len(models)}; --ladder compares bundles")
    if compare is not None:
        options = {"--level": level, "--point": point, "--clock": clock, "--steps": steps, "--batch": batch,
                   "--adaptor": adaptor}  # fmt: skip
        given = [name for name, value in {"MODEL|BUNDLE": model, **options}.items() if value is not None]
        if given:
            raise ConfigError(f"--compare counts a paper's own table and takes no {', '.join(given)}; leave that out")
        check_comparison(compare)  # before torch is imported
        rows = toolchain("edgediff.inspect.comparison", "inspect --compare").compare(compare)
        if as_json:
            print_json({"rows": [row.to_dict() for row in rows]})
        else:
            from edgediff.cli.render.tables import comparison_table, spectral_table

            out.print(comparison_table(rows) if compare == "clockwork" else spectral_table(rows))
        return
    if model is None:
        raise ConfigError("nothing to inspect; expected a MODEL or a BUNDLE, or --compare clockwork or spectral")
    if (Path(model) / "manifest.json").is_file():
        if level is not None or point is not None or adaptor is not None:
            raise ConfigError("--level, --point and --adaptor belong to a model; this is a bundle, its cut is made")
        found = survey_bundle(Path(model), clock, steps, batch)
        notes = _placement(Path(model))
    else:
        notes = None
        check_source(model)
        check_batch(1 if batch is None else batch)
        clock_mask(2 if clock is None else clock, 8 if steps is None else steps)
        survey = toolchain("edgediff.inspect.model_survey", "inspect MODEL")
        found = survey.survey_model(model, level, point, clock, steps, batch, adaptor)
    if as_json:
        print_json(found.to_dict() | ({} if notes is None else {"placement": [note.to_dict() for note in notes]}))
    else:
        from edgediff.cli.render.tables import placement_table, survey_tables

        for table in survey_tables(found):
            out.print(table)
        if notes is not None:
            out.print(placement_table(notes))


def _climb(bundles: list[str], picture: Path, as_json: bool) -> None:
    """Shows a ladder and draws its pictures."""
    from edgediff.inspect.ladder import climb, draw_ladder
    from edgediff.outputs import check_drawing, check_file

    if not bundles:
        raise ConfigError("nothing to compare; expected one BUNDLE or more")
    check_drawing("the ladder")
    check_file(picture)
    with progress() as say:
        rungs = climb(bundles, say)
    draw_ladder(rungs, picture)
    if as_json:
        print_json({"rungs": [rung.to_dict() for rung in rungs], "picture": str(picture)})
        return
    from edgediff.cli.render.ladder_table import ladder_table

    out.print(ladder_table(rungs))
    out.print(f"picture: {picture}")


def _placement(bundle: Path) -> "tuple[Note, ...] | None":
    """What is known to fall off accelerators; None on the light install, which cannot read graphs."""
    from edgediff.inspect.placement import lint_bundle

    try:
        return lint_bundle(bundle)
    except (EdgediffError, EdgeRuntimeError) as e:
        err.print(f"no placement: {e}")
        return None
