"""UNets of every build that the cut handles, tiny and seeded; each entry makes a UNet and the inputs of one step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn


@dataclass(frozen=True)
class Case:
    """A UNet's builder, and what a step of it takes besides sample and time."""

    build: Callable[[], torch.nn.Module]
    cond: Callable[[int], dict[str, Any]] = lambda batch: {}


def _labels(count: int) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {"class_labels": torch.arange(batch) % count}


def _text(width: int, tokens: int = 5, **more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    def cond(batch: int) -> dict[str, Any]:
        return {"encoder_hidden_states": torch.randn(batch, tokens, width)} | {n: f(batch) for n, f in more.items()}

    return cond


def _sdxl(batch: int) -> dict[str, Any]:
    return {"text_embeds": torch.randn(batch, 10), "time_ids": torch.full((batch, 6), 32.0)}


_TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


def unet2d(**overrides: Any) -> UNet2DModel:
    config: dict[str, Any] = _TINY | {
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    torch.manual_seed(0)
    return UNet2DModel(**(config | overrides)).eval()


def unet2d_condition(**overrides: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = _TINY | {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(config | overrides)).eval()


CASES: dict[str, Case] = {
    "2d-class": Case(lambda: unet2d(num_class_embeds=5), _labels(5)),
    "2d-unconditional": Case(lambda: unet2d(in_channels=1, out_channels=1, layers_per_block=1)),
    "2d-no-mid": Case(lambda: unet2d(mid_block_type=None)),
    "2d-fourier": Case(lambda: unet2d(time_embedding_type="fourier", center_input_sample=True)),
    "2d-attention-everywhere-resnet-resampling": Case(
        lambda: unet2d(
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
        )
    ),
    "2d-two-levels": Case(
        lambda: unet2d(
            block_out_channels=(8, 16),
            layers_per_block=3,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            add_attention=False,
        )
    ),
    "sd15-like": Case(unet2d_condition, _text(12)),
    "sd2-like-linear-projection": Case(
        lambda: unet2d_condition(use_linear_projection=True, attention_head_dim=(2, 4, 4), upcast_attention=True),
        _text(12),
    ),
    "sdxl-like": Case(
        lambda: unet2d_condition(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 3),
            attention_head_dim=(2, 4, 8),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
        ),
        _text(12, added_cond_kwargs=_sdxl),
    ),
    "lcm-like": Case(
        lambda: unet2d_condition(time_cond_proj_dim=6),
        _text(12, timestep_cond=lambda batch: torch.randn(batch, 6)),
    ),
    "bk-sdm-like-no-mid": Case(lambda: unet2d_condition(mid_block_type=None, layers_per_block=1), _text(12)),
    "uneven-layers": Case(lambda: unet2d_condition(layers_per_block=(1, 2, 3)), _text(12)),
    "text-and-class": Case(
        lambda: unet2d_condition(num_class_embeds=7, class_embeddings_concat=False),
        _text(12, class_labels=torch.arange),
    ),
    "unclip-like": Case(
        lambda: unet2d_condition(
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=4,
            encoder_hid_dim=6,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=3,
            time_embedding_act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
        ),
        _text(6),
    ),
    "ldm-imagenet-like": Case(
        lambda: unet2d_condition(in_channels=3, out_channels=3, cross_attention_dim=8, attention_head_dim=1),
        _text(8, tokens=1),
    ),
}


def assert_same_unet(one: nn.Module, other: nn.Module) -> None:
    """Two UNets have the same weights, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def as_built(unet: nn.Module) -> nn.Module:
    """A copy of a loaded UNet that rounds as the UNet did that was saved: same weights, same bits, on every processor.

    Loaded weights lie in the file's memory, behind its header, and MKL rounds a product otherwise where an operand does
    not begin at a multiple of 16 bytes; a copy begins at one of 64, as built weights do. And torch multiplies a
    transposed feature by another kernel where the weight takes no gradient, as loaded ones do not.
    """
    return copy.deepcopy(unet).requires_grad_(True)
