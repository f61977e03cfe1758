"""Files that a command leaves: what drawing takes is asked for before it begins, and each is whole or as it was."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from edgediff.errors import MissingExtraError


def check_drawing(what: str) -> None:
    """Refuses to begin what could not be drawn at its end.

    Args:
        what: What would be drawn, for the message.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(what, "train")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside a file's place, then renames: a full disk or an interrupt leaves what was there.

    Args:
        path: The file.
        write: Writes to the path that it is given.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
