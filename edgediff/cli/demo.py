"""``edgediff doctor`` and ``edgediff demo``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff.cli.app import JsonOption, app, out, print_json, progress, toolchain
from edgediff.errors import VerificationError


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


@app.command(epilog="Examples:  edgediff demo -o demo   |   edgediff demo grocery-32")
def demo(
    model: Annotated[
        str, typer.Argument(help="grocery-32-student, a spectral student, or its teacher grocery-32.")
    ] = "grocery-32-student",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle and the pictures.")] = Path(
        "out/demo"
    ),
) -> None:
    """Do the main job on a built-in model: export, verify, generate at clock 1 and clock 2, compare."""
    toolchain("edgediff.export.export_bundle", "demo")
    from edgediff.cli.render.tables import demo_tables
    from edgediff.demo import run_demo

    with progress() as say:
        shown = run_demo(output, say, model)
    for table in demo_tables(shown):
        out.print(table)
    if not shown.report.ok:
        raise VerificationError(f"{shown.bundle} does not hold")
