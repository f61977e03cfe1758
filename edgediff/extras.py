"""Packages of extras, imported where they are needed."""

import importlib
from typing import Any

from edgediff.errors import MissingExtraError


def import_extra(module: str, what: str, package: str) -> Any:
    """Imports a module that only an extra brings.

    Args:
        module: Its full name.
        what: What needs it, for the message.
        package: Whose it is; the extra has its name.

    Returns:
        The module.

    Raises:
        MissingExtraError: Its package is not installed. What that package itself lacks is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(what, package) from e
