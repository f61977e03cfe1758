"""Files that a command writes: whether it can is checked before it begins, and each is complete or as it was."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from edgediff.errors import MissingExtraError, TargetError


def check_drawing(what: str, extra: str = "train") -> None:
    """Refuses to begin what could not be drawn at its end; `what` and `extra` are for the message.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(what, extra)


def check_folder(folder: Path) -> None:
    """Refuses a folder that could not be written; it need not exist.

    Raises:
        TargetError: It is no folder, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise TargetError(f"{folder} exists and is no directory; choose another output")
    here = folder.resolve()
    there = next(parent for parent in (here, *here.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise TargetError(f"cannot write {folder}: {there} is not a folder that can be written; choose another output")


def check_file(file: Path) -> None:
    """Refuses a file that could not be written; it need not exist, its folder must.

    Raises:
        TargetError: It is a folder, or its folder does not exist or cannot be written.
    """
    if file.is_dir():
        raise TargetError(f"cannot write {file}: it is a directory; expected a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise TargetError(
            f"cannot write {file}: {file.parent} is not a folder that can be written; choose another output"
        )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a path beside it, then renames: a full disk or an interrupt leaves what was there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
