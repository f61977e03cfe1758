"""Who may change what tests share: only what makes it. A test that does would fail another worker's test at random."""

import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
STORES = ROOT / ".pytest_cache" / "edgediff"

_making = threading.local()


@contextmanager
def making() -> Iterator[None]:
    """This thread may write to the stores."""
    before, _making.now = getattr(_making, "now", False), True
    try:
        yield
    finally:
        _making.now = before


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what lies at a path; the lock ends with the process, however that ends."""
    with open(f"{path}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Of each event of the interpreter that changes files, which of its arguments are paths.
CHANGES = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1)}


def guard_stores(folder: Path = STORES) -> None:
    """From now on, what changes a file under the folder of the stores raises, unless it is `making`."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            flags = args[2]
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
            changed = args[:1]
        elif event in CHANGES:
            changed = tuple(args[place] for place in CHANGES[event])
        else:
            return
        for path in changed:
            kept = isinstance(path, str | Path) and str(path).startswith(f"{folder}{os.sep}")
            if kept and not getattr(_making, "now", False) and not str(path).endswith(".lock"):
                raise PermissionError(f"{path} is kept for all tests; copy it before you change it")

    sys.addaudithook(hook)
