"""What libraries written in C++ print, kept off the screen."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Sends what the process writes to standard error nowhere while the block runs: what fails is raised."""
    with contextlib.ExitStack() as undone:
        nowhere = undone.enter_context(open(os.devnull, "w"))
        with contextlib.suppress(OSError):  # a process may have closed its standard error
            kept = os.dup(2)
            undone.callback(os.close, kept)
            undone.callback(os.dup2, kept, 2)
            os.dup2(nowhere.fileno(), 2)
        yield
