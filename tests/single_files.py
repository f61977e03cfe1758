"""Single-file checkpoints of small pipelines: diffusers' own conversion, inverted."""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file

from edgediff.models.model_files import DIFFUSERS, TRANSFORMERS, read_json, read_state

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def _unet_name(name: str, layers: int, added: bool) -> str:
    outside = dict(DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"])
    if added:
        outside |= DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    if name in outside:
        return outside[name]
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, index, *tail = rest
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        level, kind, index, *tail = rest
        if part == "down_blocks":
            first = 1 + int(level) * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.op.{tail[-1]}"
            block = f"input_blocks.{first + int(index)}.{0 if kind == 'resnets' else 1}"
        else:
            first = int(level) * (layers + 1)
            if kind == "upsamplers":
                return f"output_blocks.{first + layers}.UP.conv.{tail[-1]}"
            block = f"output_blocks.{first + int(index)}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        return f"{block}.{RESNET[tail[0]]}.{tail[1]}"
    return ".".join((block, *tail))


def sgm_name(module: str, config: dict[str, Any]) -> str:
    """The original name of a module of the UNet, without the weight's."""
    return _unet_name(f"{module}.weight", config["layers_per_block"], True).removesuffix(".weight")


def _vae_name(name: str, levels: int) -> str:
    outside = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if name in outside:
        return outside[name]
    side, part, *rest = name.split(".")
    if part == "mid_block":
        kind, index, *tail = rest
        if kind == "attentions":
            layer = ".".join(tail[:-1])
            return f"{side}.mid.attn_1.{ATTENTION[layer]}.{tail[-1]}"
        block = f"{side}.mid.block_{int(index) + 1}"
    else:
        level, kind, index, *tail = rest
        number = int(level) if part == "down_blocks" else levels - 1 - int(level)
        way = part.removesuffix("_blocks")
        if kind != "resnets":
            return f"{side}.{way}.{number}.{way}sample.{'.'.join(tail)}"
        block = f"{side}.{way}.{number}.block.{index}"
    return f"{block}.{'.'.join(tail).replace('conv_shortcut', 'nin_shortcut')}"


def unet_tensors(config: dict[str, Any], state: Tensors) -> Tensors:
    """A UNet's weights by the original names."""
    layers = config["layers_per_block"]
    added = config.get("addition_embed_type") is not None
    named = {_unet_name(name, layers, added): tensor for name, tensor in state.items()}
    made = {}
    for name, tensor in named.items():
        if ".UP." in name:  # after the attention, where the level has one
            block = name.partition(".UP.")[0]
            name = name.replace(".UP.", ".2." if any(each.startswith(f"{block}.1.") for each in named) else ".1.")
        made[f"model.diffusion_model.{name}"] = tensor
    back = convert_ldm_unet_checkpoint(dict(made), config)
    assert back.keys() == state.keys()
    return made


def vae_tensors(config: dict[str, Any], state: Tensors, prefix: str = "first_stage_model.") -> Tensors:
    """An autoencoder's weights by the original names."""
    levels = len(config["block_out_channels"])
    made = {prefix + _vae_name(name, levels): tensor for name, tensor in state.items()}
    made = {name: t[..., None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in made.items()}
    back = convert_ldm_vae_checkpoint(dict(made), config)
    assert back.keys() == state.keys()
    return made


def _clip(state: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}


def _open_clip(state: Tensors, prefix: str) -> Tensors:
    """OpenCLIP's names: query, key and value in one matrix, the projection transposed."""
    made: Tensors = {}
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    words = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn": "attn", "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final",
             "embeddings.token_embedding": "token_embedding"}  # fmt: skip
    for name, tensor in plain.items():
        new = name
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        if name == "embeddings.position_embedding.weight":
            made["positional_embedding"] = tensor
        elif name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif "q_proj" in name:
            three = [plain[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            made[new.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
        elif "k_proj" not in name and "v_proj" not in name:
            made[new] = tensor
    return {prefix + name: tensor for name, tensor in made.items()}


def checkpoint(configs: dict[str, dict[str, Any]], states: dict[str, Tensors], kind: str) -> Tensors:
    """A pipeline's weights by the original names, from those of its folders; `kind` is ``sd1``, ``sd2`` or ``xl``."""
    text = states["text_encoder"]
    made = unet_tensors(configs["unet"], states["unet"]) | vae_tensors(configs["vae"], states["vae"])
    if kind == "sd1":
        return made | _clip(text, "cond_stage_model.")
    if kind == "sd2":
        width = text["embeddings.position_embedding.weight"].shape[1]
        # As in the published files: OpenCLIP's projection, which 2.x does not use.
        unused = {"cond_stage_model.model.text_projection": torch.zeros(width, width)}
        return made | _open_clip(text, "cond_stage_model.model.") | unused
    text_2 = states["text_encoder_2"]
    return made | _clip(text, "conditioner.embedders.0.") | _open_clip(text_2, "conditioner.embedders.1.model.")


def save_single(folder: Path, kind: str, file: Path) -> Path:
    """Writes a pipeline of diffusers' folders as a single file."""
    names = ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "xl" else []))
    configs = {name: read_json(folder / name / "config.json") for name in names}
    states = {name: read_state(folder / name, TRANSFORMERS if "text" in name else DIFFUSERS) for name in names}
    found: Any = {name: tensor.contiguous() for name, tensor in checkpoint(configs, states, kind).items()}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": found, "global_step": 7}, file)
    else:
        save_file(found, file)
    return file
