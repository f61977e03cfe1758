"""Text encoders and autoencoders from their configuration and weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgediff.errors import ModelError
from edgediff.extras import needing
from edgediff.models.model_files import BAD_SETTINGS, fill
from edgediff_runtime.errors import one_line


def text_encoder(config: dict[str, Any], state: dict[str, torch.Tensor], where: Path) -> nn.Module:
    """Transformers' text encoder with weights, float32, in evaluation mode; weights of other modules are left out.

    Raises:
        ModelError: The weights do not fit the configuration, or are not finite.
    """
    encoder = empty_text_encoder(config)
    if not hasattr(encoder, "text_model"):  # transformers has taken a level away; files still name it
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    wanted = encoder.state_dict()
    fill(encoder, {name: state[name].float() for name in wanted if name in state}, where, "config.json")
    for module in encoder.modules():
        if "position_ids" in module._buffers:  # a constant, which no file has
            module.position_ids = torch.arange(config["max_position_embeddings"])[None]
    return encoder.eval().requires_grad_(False)


def empty_text_encoder(config: dict[str, Any]) -> nn.Module:
    """The text encoder on the meta device, without weights."""
    kind = _text_class(config)
    try:
        with torch.device("meta"):
            encoder: nn.Module = kind(kind.config_class.from_dict(config))
    except BAD_SETTINGS as e:
        raise ModelError(f"a text encoder's configuration describes no {kind.__name__}: {one_line(e)[:300]}") from e
    return encoder


def _text_class(config: dict[str, Any]) -> Any:
    with needing("export", "a text encoder"):
        import transformers
    return getattr(transformers, config["architectures"][0])


def autoencoder(config: dict[str, Any], state: dict[str, torch.Tensor], where: Path) -> nn.Module:
    """Diffusers' autoencoder with weights, float32, in evaluation mode.

    Raises:
        ModelError: The weights do not fit the configuration, or are not finite.
    """
    vae = empty_autoencoder(config, where)
    fill(vae, {name: tensor.float() for name, tensor in state.items()}, where, "config.json")
    return vae.eval().requires_grad_(False)


def empty_autoencoder(config: dict[str, Any], where: Path) -> nn.Module:
    """The autoencoder on the meta device, without weights."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    try:
        with torch.device("meta"):
            vae: nn.Module = kind.from_config(config)
    except BAD_SETTINGS as e:
        raise ModelError(f"{where}: its configuration describes no {kind.__name__}: {one_line(e)[:300]}") from e
    return vae
