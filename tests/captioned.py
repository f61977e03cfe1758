"""Folders of small pictures with captions, and trainings of tiny models that learn them."""

import json
from pathlib import Path
from typing import Any

from photographs import folder_of_images

from edgediff.train.settings import TeacherTraining

COLOURS = ("red", "green", "blue", "grey")
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TEXT = {
    "vocab_size": 540,
    "max_position_embeddings": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
KL = {"latent_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4, "updates": 2, "batch": 4}


def rows_of(each: int = 4) -> list[dict[str, Any]]:
    """An image of each colour is held out."""
    return [
        {
            "file_name": f"{colour}/{i:03d}.png",
            "text": f"{colour} stripes, {'flat' if i % 2 else 'noisy'}",
            "name": colour,
            "keywords": ["paint", f"{colour}ish"],
            "split": "test" if i == each - 1 else "train",
        }
        for colour in COLOURS
        for i in range(each)
    ]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def captioned_folder(folder: Path, each: int = 4) -> Path:
    folder_of_images(folder, COLOURS, each)
    write_rows(folder, rows_of(each))
    return folder


def training(data: Path, **changes: Any) -> TeacherTraining:
    """A few updates of a tiny model of captions, on latents of 8x8."""
    settings: dict[str, Any] = {
        "unet": UNET, "size": 16, "text": TEXT, "autoencoder": KL, "data": str(data), "updates": 3, "batch": 4,
        "warmup": 1, "ema": 0.5, "guidance_scale": 2.0,
    }  # fmt: skip
    return TeacherTraining(**settings | changes)
