"""A package that is not installed, as far as imports by name can tell."""

import importlib
from typing import Any

import pytest


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {hidden!r}", name=hidden)
        return real(name, package)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
