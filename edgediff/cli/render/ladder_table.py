"""What ``edgediff inspect --ladder`` shows, as a rich table; nothing here prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from edgediff.inspect.ladder import Rung


def ladder_table(rungs: "Sequence[Rung]") -> Table:
    """A row for each bundle."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="the ladder",
        caption="MB: files that running it needs; dB against torch in fp32, as verified; ms: the median generation",
    )
    table.add_column("bundle", overflow="fold")
    table.add_column("backend", no_wrap=True)
    table.add_column("stored in", overflow="fold")
    for name in ("MB", "latents dB", "picture dB", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for rung in rungs:
        numbers = ("-" if value is None else f"{value:.1f}" for value in (rung.trajectory_db, rung.picture_db))
        table.add_row(
            Path(rung.bundle).name, rung.backend, rung.stored, f"{rung.nbytes / 1e6:.2f}", *numbers, f"{rung.ms:.0f}"
        )
    return table
