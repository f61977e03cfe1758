"""``edgediff bench``."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edgediff.cli.app import GuidanceOption, StepsOption, app, out, progress
from edgediff.errors import VerificationError


@app.command(
    epilog="Examples:  edgediff bench bundle   |   edgediff bench bundle --backend onnxruntime --backend openvino "
    "--rounds 20 --json today.json   |   edgediff bench split pair --compare yesterday.json   |   "
    "edgediff bench bundle --import phone.json --html page.html"
)
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles: directories that export wrote.", metavar="BUNDLE...")],
    backend: Annotated[
        list[str] | None, typer.Option(help="May be given more than once; left out, every one but mil-reference.")
    ] = None,
    steps: StepsOption = None,
    clock: Annotated[str | None, typer.Option(help="Period or mask; left out, each bundle's own.")] = None,
    num_images: Annotated[int, typer.Option(help="Images at once.")] = 1,
    guidance_scale: GuidanceOption = None,
    rounds: Annotated[
        int, typer.Option(help="Turns of each contender: a generation at the clock and one at clock 1.")
    ] = 10,
    threads: Annotated[int | None, typer.Option(help="How many a backend may use; left out, its own choice.")] = None,
    undivided: Annotated[bool, typer.Option(help="Also run the undivided UNet.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the ledger, every sample in it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page, and its pictures as PNGs.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier ledger of this machine: says what has changed beyond the noise.")
    ] = None,
    imported: Annotated[
        list[Path] | None, typer.Option("--import", help="A ledger of another machine, shown beside this one.")
    ] = None,
) -> None:
    """Time bundles in every backend, in one run and in turns; each is checked against the reference first."""
    from edgediff.bench.ledger import compare_ledgers, read_ledger, write_ledger
    from edgediff.bench.page import check_page, write_page
    from edgediff.bench.run_bench import run_bench
    from edgediff.cli.render.bench_tables import bench_tables, compare_table
    from edgediff.outputs import check_file, write_whole

    if json_file is not None:
        check_file(json_file)
    if html is not None:
        check_page(html)
    before = None if compare is None else read_ledger(compare)
    others = tuple(read_ledger(path) for path in imported or ())
    with progress() as say:
        ledger = run_bench(
            bundles,
            backend,
            steps=steps,
            clock=clock,
            num_images=num_images,
            guidance_scale=guidance_scale,
            rounds=rounds,
            threads=threads,
            undivided=undivided,
            progress=say,
        )
    ledger = msgspec.structs.replace(ledger, imported=others)
    # Written before anything is compared or shown: neither a ledger that cannot be compared nor a closed pipe loses a
    # long run.
    if json_file is not None:
        write_whole(json_file, lambda path: write_ledger(ledger, path))
    pictures = [] if html is None else write_page(ledger, html)
    for table in bench_tables(ledger):
        out.print(table)
    if before is not None:
        out.print(compare_table(compare_ledgers(before, ledger)))
    if json_file is not None:
        out.print(f"ledger: {json_file}")
    if pictures:
        out.print(f"page: {', '.join(map(str, pictures))}")
    if all(known.status != "measured" for known in ledger.contenders):
        raise VerificationError("no backend could be measured")
