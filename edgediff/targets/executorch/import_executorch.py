"""ExecuTorch, imported where it is needed: it is no part of any usual extra.

Its import tries parts of torchao that were built for other machines, and its runtime reads files of Linux on ARM about
the processor; both print to standard error, the second from C++.
"""

from typing import Any

from edgediff.extras import import_extra, quiet


def import_executorch(module: str, what: str) -> Any:
    """Imports a module of ExecuTorch, which `what` needs; a MissingExtraError where it is not installed."""
    with quiet():
        return import_extra(module, what, "executorch")
