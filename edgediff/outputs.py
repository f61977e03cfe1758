"""Files that a command leaves: may it write there, does another process, is each file whole; and figures as PNG."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgediff.errors import MissingExtraError, TargetError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_drawing(what: str, extra: str = "train") -> None:
    """Refuses to begin what could not be drawn at its end; `what` is for the message.

    Raises:
        MissingExtraError: matplotlib, which `extra` installs, is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(what, extra)


def make_figure(width: float, height: float, dpi: int) -> Any:
    """An empty matplotlib figure, in inches, that needs no display and changes no global setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG; the same figure gives the same bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})


def mark_limit(axes: Any, x: float, words: str) -> None:
    """Draws a limit as a dashed upright line with words beside it."""
    axes.axvline(x, color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        words, (x, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90,
        ha="right", va="top", fontsize=8, color="#8a8a8a",
    )  # fmt: skip


def open_frame(axes: Any) -> None:
    """Removes the lines above and to the right of axes."""
    axes.spines[["top", "right"]].set_visible(False)


def check_folder(folder: Path, *, replaced: bool = False) -> None:
    """Refuses a folder that could not be written, before anything else is done; it need not be there.

    Args:
        folder: Where files are to be.
        replaced: Whether a new folder is put in its place, so that the one around it is what must be writable.

    Raises:
        TargetError: It is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise TargetError(f"{folder} is not a directory; choose another output")
    here = folder.absolute() if replaced else folder.resolve()
    there = next(place for place in (here, *here.parents)[replaced:] if place.exists())
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


def lock(folder: Path) -> int | None:
    """Locks a folder until `unlock`, or until the process ends, however it ends.

    Returns:
        What `unlock` takes; None where the file system has no locks.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Ends a lock."""
    if descriptor is not None:
        os.close(descriptor)


def as_text(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed and written: bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, data: object) -> None:
    """Writes a configuration as diffusers does: indented, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
