"""A model's diagnosis on disk: spectrum.json and pictures in one folder, each whole or as it was."""

import os
from functools import partial
from pathlib import Path

import msgspec

from edgediff.errors import TargetError
from edgediff.evaluate.overview import draw_overview
from edgediff.evaluate.spectrum import Diagnosis
from edgediff.outputs import check_drawing, write_whole

NUMBERS, OVERVIEW = "spectrum.json", "spectrum.png"


def check_folder(folder: Path) -> None:
    """Refuses a folder that could not be written, before anything is measured.

    Args:
        folder: Where numbers and pictures are to be.

    Raises:
        MissingExtraError: matplotlib is not installed.
        TargetError: It is no folder, or cannot be written.
    """
    check_drawing("drawing spectra")
    if folder.exists() and not folder.is_dir():
        raise TargetError(f"{folder} exists and is no directory; choose another output")
    here = folder.resolve()
    there = next(parent for parent in (here, *here.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise TargetError(f"cannot write {folder}: {there} is not a folder that can be written")


def write_diagnosis(found: Diagnosis, folder: Path) -> dict[str, Path]:
    """Writes numbers and pictures; other files of the folder stay.

    Args:
        found: What was found.
        folder: Where to; made where it is not there.

    Returns:
        The files by what they are: ``numbers`` and ``overview``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(found.report), indent=1) + b"\n"
    write_whole(folder / NUMBERS, lambda path: path.write_bytes(data))
    draw = partial(draw_overview, found.report, found.generated, found.photographs)
    write_whole(folder / OVERVIEW, draw)
    return {"numbers": folder / NUMBERS, "overview": folder / OVERVIEW}
