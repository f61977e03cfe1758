"""Small Stable Diffusion pipelines of random weights, saved by diffusers itself: 1.x, 2.x, XL and LCM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS, WIDTH, LATENT, SIDE = 77, 32, 4, 16
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# Pairs that are joined, the most frequent first; every other word is spelt in characters.
MERGES = (
    "r e",
    "re d</w>",
    "a p",
    "ap p",
    "l e</w>",
    "app le</w>",
    "d o",
    "do g</w>",
    "p h",
    "o t",
    "ph ot",
    "phot o</w>",
)


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with all bytes and a dozen merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    entries = [*characters, *(f"{c}</w>" for c in characters), *("".join(merge.split()) for merge in MERGES)]
    vocabulary = {entry: i for i, entry in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(merge.split()) for merge in MERGES], pad_token=pad, model_max_length=TOKENS
    )


def text_config(words: CLIPTokenizer, layers: int = 3, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, **more,
    )  # fmt: skip


def unet(**more: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": SIDE, "in_channels": LATENT, "out_channels": LATENT, "block_out_channels": (16, 32),
        "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**settings | more)


def vae(**more: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": LATENT,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 2 * SIDE, "scaling_factor": 0.18215,
    }  # fmt: skip
    return AutoencoderKL(**settings | more)


def save_tiny_vae(folder: Path, latent_channels: int = LATENT) -> None:
    """A small TAESD: an autoencoder of the same latents, of its own scale."""
    torch.manual_seed(9)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=latent_channels,
    ).save_pretrained(folder)  # fmt: skip


def _without_checker(kind: Any, **parts: Any) -> Any:
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


# Half the attention: exporting takes as long as there are operations. Graphs of XL have attention on the way up.
LIGHT = {"up_block_types": ("UpBlock2D", "UpBlock2D")}


def save_sd1(folder: Path, **levels: Any) -> None:
    """Stable Diffusion 1.x: epsilon, one text encoder, the last state."""
    torch.manual_seed(1)
    words = tokenizer()
    _without_checker(
        StableDiffusionPipeline, unet=unet(**LIGHT | levels), vae=vae(), tokenizer=words,
        text_encoder=CLIPTextModel(text_config(words)),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False),
    ).save_pretrained(folder)  # fmt: skip


def save_sd1_up(folder: Path) -> None:
    """The same with attention on the way up too, which injection takes hold of."""
    save_sd1(folder, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def save_sd1_few(folder: Path) -> None:
    """The same with as few operations as injection can be had with."""
    save_sd1(
        folder, mid_block_type=None, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def save_sd1_levels(folder: Path) -> None:
    """The same with attention in all levels but the lowest, which is as wide as the one above it."""
    save_sd1(
        folder,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def save_sd2(folder: Path) -> None:
    """Stable Diffusion 2.x: v-prediction, a GELU text encoder, padding with an exclamation mark, linear projections."""
    torch.manual_seed(2)
    words = tokenizer(pad="!")
    _without_checker(
        StableDiffusionPipeline, unet=unet(use_linear_projection=True, attention_head_dim=(2, 4)), vae=vae(),
        tokenizer=words, text_encoder=CLIPTextModel(text_config(words, hidden_act="gelu")),
        scheduler=DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
    ).save_pretrained(folder)  # fmt: skip


def save_xl(folder: Path, **levels: Any) -> None:
    """SDXL: two text encoders joined, the pooled text and time ids added, zeros without a negative prompt."""
    torch.manual_seed(3)
    words, words_2 = tokenizer(), tokenizer(pad="!")
    StableDiffusionXLPipeline(
        unet=unet(**{
            "cross_attention_dim": 2 * WIDTH, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8, "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), **levels,
        }),
        vae=vae(scaling_factor=0.13025),
        tokenizer=words, tokenizer_2=words_2,
        text_encoder=CLIPTextModel(text_config(words)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(words_2, hidden_act="gelu", projection_dim=WIDTH)),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
    ).save_pretrained(folder)  # fmt: skip


def save_xl_levels(folder: Path) -> None:
    """The same with SDXL's levels: no attention in the highest, and its downsampler before what an adapter adds."""
    save_xl(
        folder,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
    )


def save_lcm(folder: Path) -> None:
    """A latent consistency model: guidance as an embedding, its own scheduler."""
    torch.manual_seed(4)
    words = tokenizer()
    _without_checker(
        LatentConsistencyModelPipeline, unet=unet(time_cond_proj_dim=16, **LIGHT), vae=vae(), tokenizer=words,
        text_encoder=CLIPTextModel(text_config(words)), scheduler=LCMScheduler(**NOISE),
    ).save_pretrained(folder)  # fmt: skip


def _editor(kind: Any, seed: int, beside: int) -> Callable[[Path], None]:
    """Saves a Stable Diffusion 1.x whose UNet takes channels beside the latent's."""

    def save(folder: Path) -> None:
        torch.manual_seed(seed)
        words = tokenizer()
        parts = {"vae": vae(), "unet": unet(in_channels=LATENT + beside, **LIGHT), "tokenizer": words}
        encoder = CLIPTextModel(text_config(words))
        scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)
        if kind is StableDiffusionDepth2ImgPipeline:
            # What estimates depth is no component of a bundle; its class has to be there for diffusers.
            parts |= {"depth_estimator": None, "feature_extractor": None}
            kind(**parts, text_encoder=encoder, scheduler=scheduler).save_pretrained(folder)
        else:
            _without_checker(kind, **parts, text_encoder=encoder, scheduler=scheduler).save_pretrained(folder)

    return save


def save_controlnet(folder: Path, base: Path, seed: int = 8) -> None:
    """A small ControlNet for a pipeline's UNet; trained ones have zero convolutions that are no longer zero."""
    torch.manual_seed(seed)
    whole = UNet2DConditionModel.from_pretrained(base / "unet")
    net = ControlNetModel.from_unet(whole, conditioning_embedding_out_channels=(8, 16))
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    net.save_pretrained(folder)


def save_t2i_adapter(folder: Path, kind: str, base: Path, in_channels: int = 3) -> None:
    """A small T2I-Adapter for a pipeline's UNet, whose features are large enough to be seen."""
    torch.manual_seed(10)
    channels = list(UNet2DConditionModel.load_config(base / "unet")["block_out_channels"])
    settings = {
        "full_adapter": {"channels": channels, "downscale_factor": 2},
        "full_adapter_xl": {"channels": [*channels, channels[-1]], "downscale_factor": 4},
        "light_adapter": {"channels": channels[:-1], "downscale_factor": 2},
    }
    adapter = T2IAdapter(in_channels=in_channels, num_res_blocks=1, adapter_type=kind, **settings[kind])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    adapter.save_pretrained(folder)


SAVE = {"sd1": save_sd1, "sd2": save_sd2, "xl": save_xl, "lcm": save_lcm}
# With the levels of Stable Diffusion and of SDXL, two of which are as wide.
SAVE |= {"sd1-up": save_sd1_up, "sd1-few": save_sd1_few, "sd1-levels": save_sd1_levels, "xl-levels": save_xl_levels}
# Of UNets that see a picture in every step.
EDITORS = {
    "inpaint": _editor(StableDiffusionInpaintPipeline, 5, beside=1 + LATENT),
    "pix2pix": _editor(StableDiffusionInstructPix2PixPipeline, 6, beside=LATENT),
    "depth": _editor(StableDiffusionDepth2ImgPipeline, 7, beside=1),
}
