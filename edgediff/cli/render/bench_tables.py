"""What ``edgediff bench`` shows, as rich tables."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from edgediff.bench.wording import figure_cells, machine_line, milliseconds, part_names, peak_words

if TYPE_CHECKING:
    from edgediff.bench.ledger import Change, Ledger, Row


def bench_tables(ledger: "Ledger") -> list[Table]:
    """The leading figures, what is missing and why, milliseconds by part; then the same of each imported ledger."""
    tables = [
        _figures(ledger),
        *([_missing(ledger)] if any(known.says for known in ledger.contenders) else []),
        *(_parts(ledger, bundle) for bundle in dict.fromkeys(row.bundle for row in ledger.rows)),
    ]
    return [*tables, *(table for other in ledger.imported for table in bench_tables(other))]


def _figures(ledger: "Ledger") -> Table:
    table = Table(
        title=f"time saved by the clock, and how near the machine's peak ({peak_words(ledger)} in fp32) its steps come",
        caption=f"{machine_line(ledger.machine)}; *: against its own graphs at clock 1",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("bundle\nbackend", overflow="fold")
    for name in (
        "clock",
        "time\nsaved",
        "FLOPs\nsaved",
        "ratio",
        "of peak:\nfull,\ncached",
        "PSNR\ndB",
        "MiB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for known in ledger.contenders:
        cells: tuple[str, ...] = (known.status,)
        if known.status == "measured":
            *before, full, cached, psnr, mib = figure_cells(known)
            cells = (*before, f"{full}\n{cached}", psnr, mib)
        table.add_row(Text(f"{known.bundle}\n{known.backend}"), *cells)
    return table


def _missing(ledger: "Ledger") -> Table:
    table = Table(title="not measured, or not against the undivided UNet", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("bundle", "backend", "why"):
        table.add_column(name, overflow="fold")
    for known in ledger.contenders:
        if known.says:
            style = "yellow" if known.status in ("absent", "measured") else "bold red"
            table.add_row(Text(known.bundle), known.backend, Text(known.says, style))
    return table


def _parts(ledger: "Ledger", bundle: str) -> Table:
    rows = [row for row in ledger.rows if row.bundle == bundle]
    backends = list(dict.fromkeys(row.backend for row in rows))
    table = Table(
        title=Text(f"{bundle}: milliseconds, median [10th, 90th percentile]"),
        caption="loop: all steps at the clock; loop_clock1: all of them full; undivided: the UNet before it was cut",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("part", no_wrap=True)
    for backend in backends:
        table.add_column(backend, justify="right")
    found = {(row.backend, row.part): row for row in rows}
    for part in part_names(rows):
        table.add_row(part, *(_spell(found.get((backend, part))) for backend in backends))
    return table


def _spell(row: "Row | None") -> str:
    return " ".join(milliseconds(row)).rstrip()


def compare_table(changes: Iterable["Change"]) -> Table:
    """One line for each part that two ledgers have in common; what is beyond the noise of both stands out."""
    table = Table(title="against the earlier run", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("bundle", "backend", "part"):
        table.add_column(name, overflow="fold")
    for name in ("before, ms", "now, ms", "ratio", ""):
        table.add_column(name, justify="right")
    for change in changes:
        said = ("slower" if change.ratio > 1 else "faster") if change.is_beyond_noise else ""
        style = {"slower": "bold red", "faster": "bold green", "": "dim"}[said]
        row = change.new
        cells = (Text(row.bundle), row.backend, row.part, _spell(change.old), _spell(row), f"{change.ratio:.3f}", said)
        table.add_row(*cells, style=style)
    return table
