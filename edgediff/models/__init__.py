"""Models and how they are divided; README.md maps the papers' sections to files.

Names are resolved when they are first used: not every module here needs torch.
"""

from typing import Any

__all__ = ["efficient"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgediff.models' has no attribute {name!r}")
    from edgediff.models.families import efficient

    return efficient


def __dir__() -> list[str]:
    return sorted(__all__)
