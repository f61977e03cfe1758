"""The ledger as one self-contained HTML page, and its pictures as files too."""

from base64 import b64encode
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgediff.bench.figures import figures
from edgediff.bench.ledger import Contender, Ledger, Settings
from edgediff.bench.wording import figure_cells, machine_line, milliseconds, part_names, peak_words, ratio_words
from edgediff.errors import MissingExtraError
from edgediff.outputs import check_drawing, check_file, write_whole

WHAT, EXTRA = "the page of a benchmark", "bench"
CAPTIONS = MappingProxyType(
    {
        "latency": "One full and one cached step in each backend, by part.",
        "saved": "Time against operations: on the dashed line nothing is lost; bars: 10th to 90th percentile.",
        "quality": "PSNR of each backend against its time: up and to the left is better.",
    }
)


def check_page(path: Path) -> None:
    """Refuses before the run what could not be written after it.

    Raises:
        MissingExtraError: What draws or writes it is not installed.
        TargetError: It cannot be written there.
    """
    check_drawing(WHAT, EXTRA)
    try:
        import jinja2  # noqa: F401  only whether it is there
    except ImportError as e:
        raise MissingExtraError(WHAT, EXTRA) from e
    check_file(path)
    for name in CAPTIONS:
        check_file(beside(path, name))


def write_page(ledger: Ledger, path: Path) -> list[Path]:
    """Writes the page and, beside it, this machine's pictures; returns the files."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgediff.bench", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ledgers = list(_all(ledger))
    drawn = [figures(each) for each in ledgers]
    bundles = list(dict.fromkeys(known.bundle for known in ledger.contenders))
    sections = [_section(each, made) for each, made in zip(ledgers, drawn, strict=True)]
    text = environment.get_template("page.html").render(bundles=bundles, ledgers=sections)
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    written = [path]
    for name in CAPTIONS:
        picture, png = beside(path, name), drawn[0].get(name)
        if png is None:  # of an earlier run
            picture.unlink(missing_ok=True)
        else:
            write_whole(picture, partial(Path.write_bytes, data=png))
            written.append(picture)
    return written


def _all(ledger: Ledger) -> Iterator[Ledger]:
    """A ledger, and what was imported into it, and into that."""
    yield ledger
    for other in ledger.imported:
        yield from _all(other)


def beside(path: Path, name: str) -> Path:
    """Where a picture of a page lies.

    >>> beside(Path("out/page.html"), "latency").as_posix()
    'out/page-latency.png'
    """
    return path.with_name(f"{path.stem}-{name}.png")


def _section(ledger: Ledger, drawn: Mapping[str, bytes]) -> dict[str, Any]:
    """What the template shows of one machine."""
    cards = [_card(known) for known in ledger.contenders if known.ratio is not None]
    return {
        "machine": machine_line(ledger.machine),
        "settings": _settings(ledger.settings),
        "cards": cards,
        "any_own": any(card["own"] for card in cards),
        "peak": f"The peak is a large fp32 matmul in the same run: {peak_words(ledger)}.",
        "pictures": [
            {"says": CAPTIONS[name], "data": b64encode(png).decode("ascii")} for name, png in drawn.items()
        ],
        "contenders": [
            {"bundle": known.bundle, "backend": known.backend, "status": known.status, "says": known.says,
             "cells": figure_cells(known) if known.status == "measured" else ()}
            for known in ledger.contenders
        ],
        "tables": list(_tables(ledger)),
    }  # fmt: skip


def _card(known: Contender) -> dict[str, str]:
    _, time_saved, flops_saved, _, full, cached, *_ = figure_cells(known)
    ratio, spread = ratio_words(known)
    return {
        "name": f"{known.bundle} in {known.backend}",
        "ratio": ratio,
        "spread": spread,
        "own": "*" if known.undivided == "own" else "",
        "saved": f"{time_saved.rstrip('*')} of the time for {flops_saved} of the operations",
        "full": full,
        "cached": cached,
    }


def _settings(settings: Settings) -> str:
    own = "each bundle's own"
    steps = own if settings.steps is None else str(settings.steps)
    clock = own if settings.clock is None else settings.clock
    guidance = own if settings.guidance_scale is None else f"{settings.guidance_scale:g}"
    threads = "each backend's choice" if settings.threads is None else str(settings.threads)
    return (
        f"Steps: {steps}; clock: {clock}; guidance: {guidance}; images at once: {settings.num_images}; "
        f"rounds: {settings.rounds}; threads: {threads}"
    )


def _tables(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Milliseconds by part, a table for each bundle."""
    for bundle in dict.fromkeys(row.bundle for row in ledger.rows):
        rows = [row for row in ledger.rows if row.bundle == bundle]
        backends = list(dict.fromkeys(row.backend for row in rows))
        found = {(row.backend, row.part): row for row in rows}
        yield {
            "bundle": bundle,
            "backends": backends,
            "rows": [
                {"part": part, "cells": [milliseconds(found.get((backend, part))) for backend in backends]}
                for part in part_names(rows)
            ],
        }
