"""The conditioning of the reference trajectory: labels, a file of embeddings, or seeded normal ones."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgediff.data.arrays import load_arrays
from edgediff.errors import ConfigError
from edgediff.models.conditioning import Conditioning
from edgediff_runtime import noise
from edgediff_runtime.conditioning import time_ids
from edgediff_runtime.manifest import GUIDANCE

Source = Literal["none", "labels", "prompt", "file", "synthetic"]
# Pixels of SDXL's time ids: original size, crop, target size.
TIME_IDS = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)


def reference_conditioning(
    known: Conditioning,
    path: str | None,
    seed: int,
    drawn: Mapping[str, np.ndarray] | None = None,
    prompt: dict[str, np.ndarray] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], Source]:
    """Finds the embeddings that the reference trajectory is conditioned on.

    Args:
        path: A ``.safetensors`` or ``.npz`` file, or None.
        drawn: What stands for pictures, by its names, where no file has it.
        prompt: The embeddings of a prompt, where there is no file and a text encoder.
        size: Height and width of the picture in pixels, where they are known.

    Returns:
        Arrays by name, unconditional ones as ``negative_*``; and where they came from: ``none``, ``labels``,
        ``prompt``, ``file`` or ``synthetic``.

    Raises:
        ConfigError: The file cannot be read, lacks a tensor, or the model takes no embeddings.
    """
    extra = dict(drawn or {})
    if path is not None:
        if known.kind != "text":
            raise ConfigError(f"conditioning {path} was given, but the model is not conditioned on text")
        arrays = load_arrays(path)
        missing = [name for name in known.tensors if name not in arrays and name != GUIDANCE]
        if missing:
            raise ConfigError(f"conditioning {path} lacks {', '.join(missing)}; it has {', '.join(arrays)}")
        return extra | arrays, "file"
    if known.kind == "class":
        return extra, "labels"
    if known.kind == "none":
        return extra, "none"
    arrays = extra
    for draw, (name, spec) in enumerate(known.tensors.items()):
        if name == GUIDANCE:
            continue  # the loop computes it from the operating point's guidance
        if prompt is not None and name in prompt:
            arrays |= {key: prompt[key] for key in (name, f"negative_{name}")}
        elif name == "time_ids" and size is not None and spec.shape[0] in (5, 6):
            arrays[name], arrays[f"negative_{name}"] = (time_ids(spec.shape[0], *size, each) for each in (False, True))
        elif name == "time_ids":
            ids = np.resize(np.array(TIME_IDS, dtype=np.float32), spec.shape)
            arrays[name] = arrays[f"negative_{name}"] = ids[None]
        elif name == "class_labels" and spec.shape == ():
            arrays[name] = arrays[f"negative_{name}"] = np.zeros(1, dtype=str(spec.dtype).removeprefix("torch."))
        else:
            arrays[name] = noise(seed, spec.shape, image=0, draw=2 * draw)[None]
            arrays[f"negative_{name}"] = noise(seed, spec.shape, image=0, draw=2 * draw + 1)[None]
    return arrays, "synthetic" if prompt is None else "prompt"
