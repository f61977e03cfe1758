"""A ledger's figures as people read them: the same words on the screen and on the page."""

from collections.abc import Iterable

from edgediff.bench.ledger import Contender, Ledger, Machine, Row
from edgediff_runtime.clock import letters
from edgediff_runtime.loop import OUTSIDE

# The graphs of a step come after these.
BEFORE = ("load", "first_call", "loop", "loop_clock1", "undivided_loop", "full", "cached", "undivided")


def machine_line(machine: Machine) -> str:
    """Processor, cores, system and versions on one line."""
    tools = ", ".join(f"{tool} {version}" for tool, version in machine.versions.items())
    flags = f" ({' '.join(machine.flags)})" if machine.flags else ""
    python = f", Python {machine.python}" if machine.python else ""  # a browser's has none
    return f"{machine.processor}{flags}, {machine.cores} cores, {machine.system}{python}; {tools}"


def peak_words(ledger: Ledger) -> str:
    """The machine's peak, with its unit."""
    return "not measured" if ledger.peak_gflops is None else f"{ledger.peak_gflops:,.0f} GFLOP/s"


def figure_cells(known: Contender) -> tuple[str, ...]:
    """The figures that lead, of a contender that was measured.

    Returns:
        Clock, time saved, FLOPs saved, their ratio and on a second line its spread, a full and a cached step's share of
        the peak, PSNR, MiB.
    """
    own = "*" if known.undivided == "own" else ""
    return (
        letters(known.mask),
        "-" if known.time_saved is None else f"{known.time_saved:.1%}{own}",
        "-" if known.flops_saved is None else f"{known.flops_saved:.1%}",
        "\n".join(ratio_words(known)).rstrip(),
        *(f"{known.share_of_peak[name]:.2f}" if name in known.share_of_peak else "-" for name in ("full", "cached")),
        "-" if known.psnr_db is None else f"{known.psnr_db:.1f}",
        "-" if known.peak_mib is None else f"{known.peak_mib:,.0f}",
    )


def ratio_words(known: Contender) -> tuple[str, str]:
    """Time saved over FLOPs saved, and its spread over the rounds, empty where there is none."""
    spread = "" if known.ratio_spread is None else "[{:.2f}, {:.2f}]".format(*known.ratio_spread)
    return "-" if known.ratio is None else f"{known.ratio:.2f}", spread


def part_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The parts of some rows in the order in which they are shown."""
    there = dict.fromkeys(row.part for row in rows)
    graphs = [part for part in there if part not in (*BEFORE, *OUTSIDE)]
    return tuple(part for part in (*BEFORE, *graphs, *OUTSIDE) if part in there)


def milliseconds(row: Row | None) -> tuple[str, str]:
    """A row's median and its spread, empty of one sample; a dash where a backend has no such part."""
    if row is None:
        return "-", ""
    spread = "" if len(row.samples_ms) == 1 else f"[{number(row.p10_ms)}, {number(row.p90_ms)}]"
    return number(row.median_ms), spread


def number(value: float, digits: int = 4) -> str:
    """A number with that many significant digits, and no exponent where it is large.

    >>> number(3.14159), number(0.0813), number(41467.8), number(123.4, 3)
    ('3.142', '0.0813', '41,468', '123')
    """
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
