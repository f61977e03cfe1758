"""Text encoders and autoencoders from their configuration and weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgediff.errors import ModelError
from edgediff.extras import needing
from edgediff.models.model_files import BAD_SETTINGS, check_finite, fill
from edgediff_runtime.errors import one_line


def text_encoder(config: dict[str, Any], state: dict[str, torch.Tensor], where: Path) -> nn.Module:
    """Transformers' text encoder with weights, float32, in evaluation mode.

    Raises:
        ModelError: The weights do not fit the configuration, or are not finite.
    """
    kind = _text_class(config)
    try:
        found, told = kind.from_pretrained(
            None, config=kind.config_class.from_dict(config), state_dict=state, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, *BAD_SETTINGS) as e:
        raise ModelError(f"{where} cannot be loaded as a {kind.__name__}: {one_line(e)[:300]}") from e
    misfits = [f"{each} is missing" for each in sorted(told["missing_keys"])]
    misfits += [f"{each} has another shape" for each in sorted(map(str, told["mismatched_keys"]))]
    if misfits:
        raise ModelError(f"{where}: the weights do not fit its configuration: {', '.join(misfits[:3])}")
    check_finite(found.state_dict(), where)
    return found.eval().requires_grad_(False)  # type: ignore[no-any-return]


def empty_text_encoder(config: dict[str, Any]) -> nn.Module:
    """The text encoder on the meta device, to compare names and shapes with."""
    kind = _text_class(config)
    with torch.device("meta"):
        found: nn.Module = kind(kind.config_class.from_dict(config))
    return found


def _text_class(config: dict[str, Any]) -> Any:
    with needing("export", "a text encoder"):
        import transformers
    return getattr(transformers, config["architectures"][0])


def autoencoder(config: dict[str, Any], state: dict[str, torch.Tensor], where: Path) -> nn.Module:
    """Diffusers' autoencoder with weights, float32, in evaluation mode.

    Raises:
        ModelError: The weights do not fit the configuration, or are not finite.
    """
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    try:
        with torch.device("meta"):
            vae: nn.Module = kind.from_config(config)
    except BAD_SETTINGS as e:
        raise ModelError(f"{where}: its configuration describes no {kind.__name__}: {one_line(e)[:300]}") from e
    fill(vae, {name: tensor.float() for name, tensor in state.items()}, where, "config.json")
    return vae.eval().requires_grad_(False)
