"""A model's diagnosis on disk: spectrum.json and pictures in one folder, each whole or as it was."""

from functools import partial
from pathlib import Path

import msgspec

from edgediff.evaluate.overview import draw_overview
from edgediff.evaluate.spectrum import Diagnosis
from edgediff.outputs import write_whole

NUMBERS, OVERVIEW = "spectrum.json", "spectrum.png"


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
