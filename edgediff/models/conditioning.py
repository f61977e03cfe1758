"""What a UNet is conditioned on, and the shapes that come with it.

A UNet's configuration gives the width of its text input but not the length, and no labels: those are beside it, in the
configurations of tokenizer and text encoder and in ``classes.json``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.model_files import read_json
from edgediff_runtime.manifest import GUIDANCE

Kind = Literal["none", "class", "text"]
# CLIP's, transformers' defaults for what a text encoder's configuration leaves out.
CLIP_TOKENS = 77
CLIP_PROJECTION = 512
MAX_TOKENS = 2**16
# Pooled text of every published SDXL UNet; beside it six time ids, or five (the refiner's).
SDXL_POOLED = 1280
VECTORS = ("timestep", "identity", "projection", "simple_projection")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a conditioning tensor, without its batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, rows: int = 1) -> torch.Tensor:
        """A tensor on the meta device: shape and dtype without numbers."""
        return torch.empty(rows, *self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is conditioned on.

    Attributes:
        tensors: Each conditioning input by name: ``class_labels``, ``encoder_hidden_states``, ``text_embeds``,
            ``time_ids``, ``timestep_cond``.
        labels: Names of the classes without the null class; empty where there are none.
        null_label: Index of the class that stands for 'no class' in guidance, or None.
    """

    kind: Kind
    tensors: dict[str, TensorSpec]
    labels: tuple[str, ...] = ()
    null_label: int | None = None


def read_conditioning(path: Path, config: dict[str, Any]) -> Conditioning:
    """Finds out what a UNet is conditioned on, from its configuration and what is in the model's directory.

    Classes without names are called by their index; a null class is known only where ``classes.json`` names one class
    fewer than the UNet embeds.

    Raises:
        ModelError: A file beside the UNet does not fit it, or one that is needed to know a shape is missing.
        UnsupportedError: The conditioning is of a kind that edgediff does not handle.
    """
    tensors: dict[str, TensorSpec] = {}
    labels: tuple[str, ...] = ()
    null_label = None
    if looks_at_text(config):
        tensors["encoder_hidden_states"] = TensorSpec((_tokens(path), _text_width(config)), torch.float32)
    if config.get("addition_embed_type") == "text_time":
        tensors["text_embeds"], tensors["time_ids"] = _added(path, config)
    if config.get("time_cond_proj_dim") is not None:
        tensors[GUIDANCE] = TensorSpec((int(config["time_cond_proj_dim"]),), torch.float32)
    count = config.get("num_class_embeds")
    if config.get("class_embed_type") in VECTORS:
        shape = () if config["class_embed_type"] == "timestep" else (_class_width(config),)
        tensors["class_labels"] = TensorSpec(shape, torch.float32)
    elif count is not None:
        tensors["class_labels"] = TensorSpec((), torch.int64)
        labels = _labels(path / "classes.json", count)
        null_label = len(labels) if len(labels) == count - 1 else None
    kind: Kind = "text" if "encoder_hidden_states" in tensors else "class" if labels else "none"
    if kind == "none" and "class_labels" in tensors:
        raise UnsupportedError(
            f"the UNet's classes are vectors (class_embed_type {config['class_embed_type']!r}) without text; "
            "supported: class indices, text, or neither"
        )
    return Conditioning(kind, tensors, labels, null_label)


def looks_at_text(config: dict[str, Any]) -> bool:
    """Whether any part of a UNet takes ``encoder_hidden_states``, by its configuration with ``_class_name``."""
    # A conditional UNet may have no attention.
    if not config["_class_name"].endswith("UNet2DConditionModel"):  # spectral ones have a word before it
        return False
    blocks = (*config["down_block_types"], config.get("mid_block_type"), *config["up_block_types"])
    return config.get("addition_embed_type") == "text" or any("CrossAttn" in str(block) for block in blocks)


def _class_width(config: dict[str, Any]) -> int:
    """Width of a class given as a vector: what the projection takes, or the time embedding's where there is none."""
    width = config.get("projection_class_embeddings_input_dim")
    if config["class_embed_type"] == "identity" or width is None:
        width = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]  # diffusers' own default
    return int(width)


def _labels(path: Path, count: int) -> tuple[str, ...]:
    if not path.exists():
        return tuple(str(i) for i in range(count))
    labels = read_json(path, object)
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        raise ModelError(f"{path} is not a list of names; expected one name for each class")
    if len(set(labels)) != len(labels) or not count - 1 <= len(labels) <= count:
        raise ModelError(
            f"{path} has {len(labels)} names; the UNet embeds {count} classes: expected {count} distinct names, "
            f"or {count - 1} where the last class is the null class"
        )
    return tuple(labels)


def _tokens(path: Path) -> int:
    """Tokens of a prompt: what the tokenizer pads to, and at most what the text encoder has positions for."""
    for suffix in ("", "_2"):
        encoder = path / f"text_encoder{suffix}" / "config.json"
        padded = _setting(path / f"tokenizer{suffix}" / "tokenizer_config.json", "model_max_length")
        positions = _setting(encoder, "max_position_embeddings")
        if positions is None and encoder.exists() and _is_clip(read_json(encoder)):
            positions = CLIP_TOKENS
        # transformers writes 10^30 for a tokenizer without a limit.
        sizes = [size for size in (padded, positions) if size is not None and size <= MAX_TOKENS]
        if sizes:
            return min(sizes)
        if encoder.exists():
            raise ModelError(f"{encoder} has no max_position_embeddings; expected it, or a tokenizer with a limit")
    return CLIP_TOKENS


def _is_clip(encoder: dict[str, Any]) -> bool:
    return str(encoder.get("model_type", "clip")).startswith("clip")


def _setting(file: Path, name: str) -> int | None:
    """A size from a configuration beside the UNet; None where there is no such file or setting."""
    settings = read_json(file) if file.exists() else {}
    value = settings.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{file}: {name} is {value!r}; expected a whole number above 0")
    return value if name in settings else None


def _text_width(config: dict[str, Any]) -> int:
    if config.get("encoder_hid_dim") is not None:
        return int(config["encoder_hid_dim"])
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        if len(set(width)) != 1:
            raise UnsupportedError(f"the UNet's levels want text of different widths {tuple(width)}; supported: one")
        width = width[0]
    return int(width)


def _added(path: Path, config: dict[str, Any]) -> tuple[TensorSpec, TensorSpec]:
    """SDXL's pooled text and time ids: their widths add up to the projection's, so one is needed to know the other."""
    total, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    encoder = path / "text_encoder_2" / "config.json"
    if encoder.exists():
        pooled = _setting(encoder, "projection_dim") or CLIP_PROJECTION
    elif total - SDXL_POOLED in (5 * each, 6 * each):
        pooled = SDXL_POOLED
    else:
        raise ModelError(
            f"the UNet's added conditioning is {total} wide, and how much of it is pooled text is not known; expected "
            f"{encoder} with projection_dim"
        )
    ids, rest = divmod(total - pooled, each)
    if pooled < 1 or ids < 1 or rest:
        raise ModelError(
            f"pooled text of width {pooled} and time ids of width {each} do not add up to the {total} that the "
            "UNet's added conditioning projects"
        )
    return TensorSpec((pooled,), torch.float32), TensorSpec((ids,), torch.float32)
