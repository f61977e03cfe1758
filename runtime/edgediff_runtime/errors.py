"""Errors that a user of the runtime can correct.

Programs show these messages as they are, so each is one line that says what was given and what was expected. All are
a ``ValueError``. Errors of the program itself keep their own types.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


class EdgeRuntimeError(ValueError):
    """Something that a user of the runtime can correct; the message is one line."""


class BundleError(EdgeRuntimeError):
    """The bundle is damaged, unsafe to open, or of another version."""


class NotFiniteError(BundleError):
    """A bundle's model gave NaN or infinity: its weights or its precision are wrong."""


class RequestError(EdgeRuntimeError):
    """A request does not fit the bundle: a label, a clock, a number of steps, a guidance scale."""


class OperatingPointWarning(UserWarning):
    """A generation is not what the bundle's adaptor was trained for: other steps, clock, guidance or sampler."""


def one_line(error: object, limit: int | None = 400) -> str:
    """What an error says, on one line of `limit` characters at the most; its class's name where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def warnings_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Gives each `OperatingPointWarning` to `tell` as one line while the block runs; for command lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OperatingPointWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, OperatingPointWarning):
                tell(one_line(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
