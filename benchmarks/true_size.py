"""Whole pipelines of the true geometry of Stable Diffusion 1.5 and XL, with random weights: nothing is downloaded.

    python true_size.py sd15 FOLDER
    python true_size.py sdxl FOLDER --half --side 32

Each component is made, saved and let go before the next, by diffusers and transformers themselves, in their own
initialisation under a seed. With `--half` weights are fp16 from the beginning: SDXL's UNet is never in fp32.
"""

import argparse
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from edgediff.models.clip_tokenizer import load_tokenizer
from edgediff.models.single_file import FOLDER as CONFIGS
from edgediff.zoo import FOLDER as GEOMETRIES

# Folder of the components around the UNet, and the built-in geometry of the UNet.
KINDS = {"sd15": ("v1", "sd15"), "sdxl": ("xl_base", "sdxl")}
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def save_pipeline(kind: str, folder: Path, half: bool = False, side: int | None = None, seed: int = 0) -> None:
    """Saves a pipeline as diffusers does.

    Args:
        half: Save weights in fp16.
        side: Rows and columns of the latent, where they differ from the geometry's own.
    """
    configs, geometry = CONFIGS / KINDS[kind][0], GEOMETRIES / KINDS[kind][1]
    folder.mkdir(parents=True)
    shutil.copy(configs / "model_index.json", folder)
    shutil.copytree(geometry / "scheduler", folder / "scheduler")
    for tokenizer in configs.glob("tokenizer*"):
        load_tokenizer(tokenizer).save_pretrained(folder / tokenizer.name)
    torch.manual_seed(seed)
    for name in COMPONENTS:
        source = (geometry if name == "unet" else configs) / name / "config.json"
        if source.exists():
            config = json.loads(source.read_text())
            if name == "unet" and side is not None:
                config["sample_size"] = side
            torch.set_default_dtype(torch.float16 if half else torch.float32)
            _module(config).save_pretrained(folder / name)
            torch.set_default_dtype(torch.float32)
            gc.collect()


def _module(config: dict[str, Any]) -> Any:
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    kind = getattr(transformers, config["architectures"][0])
    return kind(kind.config_class.from_dict(config))


def main() -> None:
    """Saves what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", action="store_true", help="weights in fp16")
    parser.add_argument("--side", type=int, help="rows and columns of the latent")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    save_pipeline(given.kind, given.folder, given.half, given.side, given.seed)


if __name__ == "__main__":
    main()
