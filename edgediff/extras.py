"""Packages of extras, imported where they are needed."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from edgediff.errors import MissingExtraError
from edgediff_runtime.stderr import silent


def import_extra(module: str, what: str, package: str) -> Any:
    """Imports a module that only an extra brings, which has the name of its package; `what` needs it.

    Raises:
        MissingExtraError: Its package is not installed. What that package itself lacks is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(what, package) from e


@contextlib.contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Turns a failed import of what is not edgediff's own into a MissingExtraError: `what` needs the extra."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "edgediff":
            raise
        raise MissingExtraError(what, extra) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress, log lines, warnings and what C++ writes off the screen; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with silent(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
