"""The plan as a recipe: the bundle's own, with steps and clock replaced.

Written without a YAML library, which the light install does not have: each key on a line of its own, its value as JSON,
which YAML reads alike.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from edgediff.errors import ConfigError
from edgediff.export.export_config import ExportConfig, check_config, config_from
from edgediff.plan.trajectory import Mask, spell
from edgediff_runtime import Manifest


def plan_recipe(manifest: Manifest, mask: Mask, guidance_scale: float | None) -> ExportConfig:
    """Puts a mask into the recipe that a bundle was made by.

    Args:
        manifest: The bundle's manifest.
        mask: The plan, True = full.
        guidance_scale: Where another than the bundle's was planned for, or None.

    Returns:
        The recipe, checked.

    Raises:
        ConfigError: The bundle's recipe is not one that this version reads.
    """
    source, adaptor = manifest.source, manifest.adaptor
    data: dict[str, Any] = json.loads(json.dumps(manifest.config))
    data |= {
        "model": source.name if source.path is None else source.path,
        "random_weights": None if source.random_weights is None else int(source.random_weights),
        "seed": int(data.get("seed", 0)),
        # By name: a recipe that leaves it open takes another for another clock, and this one was measured.
        "adaptor": "identity" if adaptor.kind == "identity" else adaptor.path or adaptor.name,
        "steps": len(mask),
        "clock": spell(mask),
    }
    if guidance_scale is not None:
        data["guidance_scale"] = guidance_scale
    if all(mask):
        # There is no cached step by which the cached graph of a pair could be verified, and none that would run.
        data["layout"] = "split"
        for target in ("onnx", "coreml", "executorch", "openvino"):
            data[target] = {**data.get(target, {}), "layout": None}
    try:
        return check_config(config_from(data))
    except ConfigError as e:
        raise ConfigError(f"the recipe in the bundle's manifest cannot be used again: {e}") from e


def render_recipe(config: ExportConfig, comments: Sequence[str]) -> str:
    """Writes a recipe as `edgediff.export.export_config.load_config` reads it.

    Args:
        config: The recipe.
        comments: Lines before it.

    Returns:
        YAML; what is None is left out.
    """
    data = _present(msgspec.to_builtins(config))
    return "".join(
        [*(f"# {line}\n" for line in comments), *(f"{key}: {_spelt(value)}\n" for key, value in data.items())]
    )


def _present(data: dict[str, Any]) -> dict[str, Any]:
    present = {key: _present(value) if isinstance(value, dict) else value for key, value in data.items()}
    return {key: value for key, value in present.items() if value is not None and value != {}}


def _spelt(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spelt(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_spelt(inner) for inner in value) + "]"
    if isinstance(value, float):
        # YAML 1.1 takes 1e-05 for text: its numbers have a point.
        digits, e, power = repr(value).partition("e")
        return f"{digits}{'' if '.' in digits else '.0'}{e}{power}"
    return json.dumps(value)
