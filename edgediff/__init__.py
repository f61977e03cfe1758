"""edgediff takes trained diffusion UNets to edge devices.

>>> import edgediff                                                       # doctest: +SKIP
>>> model = edgediff.load_model("grocery-32")                             # doctest: +SKIP
>>> edgediff.export_bundle(model, "out/", edgediff.ExportConfig(clock=2)) # doctest: +SKIP
>>> edgediff.verify_bundle("out/").ok                                     # doctest: +SKIP

Names are resolved when they are first used: importing edgediff needs no torch, so that the light install can run and
verify bundles.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Cut": "edgediff.config.choices",
    "EdgediffError": "edgediff.errors",
    "ExportConfig": "edgediff.export.export_config",
    "Model": "edgediff.models.load",
    "ParityReport": "edgediff.bundle.rows",
    "SplitUNet": "edgediff.models.clockwork",
    "export_bundle": "edgediff.export.export_bundle",
    "load_config": "edgediff.export.export_config",
    "load_model": "edgediff.models.load",
    "split": "edgediff.models.clockwork",
    "verify_bundle": "edgediff.verify.parity",
}

__all__ = [
    "Cut",
    "EdgediffError",
    "ExportConfig",
    "Model",
    "ParityReport",
    "SplitUNet",
    "export_bundle",
    "load_config",
    "load_model",
    "split",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgediff' has no attribute {name!r}")
    home = _HOME[name]
    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as e:
        from edgediff.errors import MissingExtraError

        if e.name is None or e.name.partition(".")[0] in ("edgediff", "edgediff_runtime"):
            raise
        raise MissingExtraError(f"edgediff.{name}", "export") from e


def __dir__() -> list[str]:
    return sorted(__all__)
