"""coremltools, imported where it is needed and kept quiet.

On anything but a Mac its import logs eight warnings about missing frameworks, and converting draws progress bars: both
belong to its own command line, not to ours. Real errors are still raised.
"""

import contextlib
import importlib
import io
from collections.abc import Iterator
from typing import Any

from edgediff.extras import needing
from edgediff_runtime import coreml_session


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps coremltools' log lines, warnings and progress bars off the screen while the block runs."""
    # tqdm writes to standard error, and looks it up when a bar is made.
    with coreml_session.quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def without_validation() -> Iterator[None]:
    """Skips coremltools' check of the program after each of its passes, a third of the time of a conversion.

    It looks for faults of those passes and changes nothing: what is saved is read back and evaluated anyway.
    """
    from coremltools.converters.mil.mil import Program

    validate = Program.validate
    Program.validate = lambda *_, **__: None
    try:
        yield
    finally:
        Program.validate = validate


def import_coremltools(what: str) -> Any:
    """Imports coremltools, which `what` needs; a MissingExtraError where it is not installed."""
    with needing("export", what), quiet():
        return importlib.import_module("coremltools")
