"""Models and how they are divided; README.md maps the papers' sections to files."""

from typing import Any

__all__ = ["efficient"]


def __getattr__(name: str) -> Any:
    # Resolved when first used: not every module here needs torch.
    if name not in __all__:
        raise AttributeError(f"module 'edgediff.models' has no attribute {name!r}")
    from edgediff.models.families import efficient

    return efficient
