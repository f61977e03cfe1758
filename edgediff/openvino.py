"""OpenVINO, imported where it is needed."""

import importlib
from typing import Any

from edgediff.errors import MissingExtraError


def import_openvino(what: str) -> Any:
    """Imports OpenVINO.

    Args:
        what: What needs it, for the message.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != "openvino":
            raise
        raise MissingExtraError(what, "openvino") from e
