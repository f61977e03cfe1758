"""What can go wrong, one class for each thing that a user can do about it.

Every message is one line: ``<subject>: <fact>; <what to do>``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgediff.bundle.rows import ParityReport


class EdgediffError(Exception):
    """Anything that a user of the toolchain can correct."""


class ModelError(EdgediffError):
    """The model cannot be read: name another directory, or repair its files."""


class ConfigError(EdgediffError):
    """A recipe or an option is wrong: change it as the message says."""


class UnsupportedError(EdgediffError):
    """edgediff does not support the model or a setting of it: take one of the choices named."""


class DataError(EdgediffError):
    """Images cannot be read, or are too few: repair the folder that the message names, or name another."""


class TargetError(EdgediffError):
    """The output path cannot be written as asked: choose another, or pass ``--force``."""


class SiteError(EdgediffError):
    """The browser page cannot be served as asked: build it, or choose another port or network, as the message says."""


class VerificationError(EdgediffError):
    """A number is below its floor: the bundle does not compute what the model does, and was not put in place.

    Attributes:
        report: The verification, or None where it ended before there was one.
    """

    def __init__(self, message: str, report: "ParityReport | None" = None) -> None:
        super().__init__(message)
        self.report = report


class ProgramError(EdgediffError):
    """An ML Program that cannot be read or evaluated: name another file, or install a newer tool."""


class TrainingError(EdgediffError):
    """A training cannot go on: change a setting as the message says, and resume from the checkpoint that it names."""


class MissingExtraError(EdgediffError):
    """A command needs an optional part of edgediff: install the extra that the message names."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs the {extra!r} extra: pip install "edgediff[{extra}]"')
