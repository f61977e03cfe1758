"""LoRA files of random weights for small pipelines: as diffusers' training scripts save them, and as kohya's do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from single_files import sgm_name
from torch import nn

from edgediff.models.model_files import read_json

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA_LAYERS = ("attn", "ff.net", "mlp", "conv1")
ENCODERS = ("text_encoder", "text_encoder_2")


def diffusers_lora(pipeline: Path, folder: Path, alpha: int = 8, rank: int = 4) -> Path:
    """As diffusers' training scripts save one, of the UNet and each text encoder, with the settings in the header."""
    torch.manual_seed(5)
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    given: dict[str, Any] = {}
    for name in text_encoders(pipe, "unet"):
        layers = UNET_LAYERS if name == "unet" else TEXT_LAYERS
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(**settings))
        state = get_peft_model_state_dict(module, adapter_name="default")
        given[f"{name}_lora_layers"] = {key: torch.randn(tensor.shape) / 8 for key, tensor in state.items()}
        given[f"{name}_lora_adapter_metadata"] = settings
    type(pipe).save_lora_weights(folder, **given)
    return folder / "pytorch_lora_weights.safetensors"


def kohya_lora(pipeline: Path, file: Path, rank: int = 3) -> Path:
    """kohya's names: of diffusers' UNet for 1.x and 2.x, of the original one for XL; alphas beside the layers."""
    torch.manual_seed(6)
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    config = read_json(pipeline / "unet" / "config.json")
    encoders = text_encoders(pipe)
    is_xl = len(encoders) > 1
    prefixes = {name: f"te{i}" if is_xl else "te" for i, name in enumerate(encoders, 1)} | {"unet": "unet"}
    state = {}
    for component, prefix in prefixes.items():
        for name, down, up in _pairs(getattr(pipe, component), rank):
            if component == "unet":
                name = sgm_name(name, config) if is_xl else name
            elif not name.startswith("text_model."):
                name = f"text_model.{name}"
            key = f"lora_{prefix}_{name.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(state, file)
    return file


def text_encoders(pipe: Any, *more: str) -> list[str]:
    """The names of a pipeline's text encoders, after some of other components."""
    return [*more, *(name for name in ENCODERS if getattr(pipe, name, None) is not None)]


def fuse(pipe: Any, file: Path, scale: float) -> None:
    """Adds a file to a pipeline's weights, in diffusers."""
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora(components=text_encoders(pipe, "unet"), lora_scale=scale)
    pipe.unload_lora_weights()


def _pairs(module: nn.Module, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(part in name for part in KOHYA_LAYERS):
            weight = layer.weight
            one = (1,) * (weight.ndim - 2)
            yield name, torch.randn(rank, *weight.shape[1:]) / 8, torch.randn(weight.shape[0], rank, *one) / 8
