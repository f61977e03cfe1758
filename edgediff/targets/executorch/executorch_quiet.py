"""ExecuTorch, imported where it is needed and kept quiet: it is no part of any usual extra.

Its import tries parts of torchao that were built for other machines, and its runtime reads files of Linux on ARM about
the processor; both print to standard error, the second from C++. Real errors are still raised.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from edgediff.extras import import_extra


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps log lines, warnings and what C++ writes to standard error off the screen while the block runs."""
    with contextlib.ExitStack() as undone:
        nowhere = undone.enter_context(open(os.devnull, "w"))
        with contextlib.suppress(OSError):  # a process may have closed its standard error
            kept = os.dup(2)
            undone.callback(os.close, kept)
            undone.callback(os.dup2, kept, 2)
            os.dup2(nowhere.fileno(), 2)
        undone.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        undone.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def import_executorch(module: str, what: str) -> Any:
    """Imports a module of ExecuTorch, which `what` needs; a MissingExtraError where it is not installed."""
    with quiet():
        return import_extra(module, what, "executorch")
