"""What a model of text is conditioned on, from a file: prompts, or embeddings that were made elsewhere."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgediff.errors import ConfigError
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import CONTROL_IMAGE, T2I_ADAPTER, numbered

# The end of the name of a file of prompts.
PROMPTS = ".txt"


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads arrays by name from a ``.safetensors`` or ``.npz`` file; a ConfigError where it cannot."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path):  # numpy takes other files under this name too
                pass
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return dict(load_file(path))
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, SafetensorError) as e:
        raise ConfigError(f"conditioning {path} cannot be read as .safetensors or .npz: {one_line(e)}") from e


def prompt_arguments(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `EdgePipeline.stream`, of embeddings whose unconditional ones are named ``negative_...``."""
    negative = {n.removeprefix("negative_"): v for n, v in arrays.items() if n.startswith("negative_")}
    positive = {n: v for n, v in arrays.items() if not n.startswith("negative_")}
    pictures: dict[str, Any] = {"concat_latents": positive.pop("concat_latents", None)}
    count = sum(name.startswith(CONTROL_IMAGE) for name in positive)
    controls = [positive.pop(numbered(CONTROL_IMAGE, i), None) for i in range(count)]
    pictures[CONTROL_IMAGE] = controls if count > 1 else next(iter(controls), None)
    features = {name: positive.pop(name) for name in sorted(positive) if name.startswith(T2I_ADAPTER)}
    if features:  # made of the picture
        pictures |= {CONTROL_IMAGE: None, "control_features": features}
    return {
        **pictures,
        "prompt_embeds": positive.pop("encoder_hidden_states", None),
        "negative_prompt_embeds": negative.pop("encoder_hidden_states", None),
        "added_cond": positive,
        "negative_added_cond": negative,
    }


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a file, one a line; a ConfigError where there are none."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError) as e:
        raise ConfigError(f"conditioning {path} cannot be read as UTF-8 text: {one_line(e)}") from e
    if not prompts:
        raise ConfigError(f"conditioning {path} is empty; expected prompts, one a line")
    return prompts
