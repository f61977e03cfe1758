"""Single-file checkpoints of Stable Diffusion: one file with UNet, VAE and text encoders under the original names.

diffusers says which model a file is, and converts the names; the configurations and CLIP's vocabulary travel with
edgediff, so that nothing is downloaded. A component's weights are read when it is loaded: safetensors maps the file,
and only the component's tensors are copied.
"""

import gzip
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as ldm

from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.model_files import BAD_SETTINGS, file_sha256, read_json, read_tensors
from edgediff.zoo import FOLDER as ZOO_FOLDER
from edgediff_runtime.errors import one_line

log = logging.getLogger(__name__)


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SAFE, PICKLED = (".safetensors",), (".ckpt", ".pt", ".pth", ".bin")
FOLDER = Path(__file__).parent / "single_files"
MERGES = FOLDER / "clip" / "merges.txt.gz"
# diffusers' name of a kind of checkpoint -> our folder of its configurations, and the built-in geometry of its UNet.
KINDS = {
    "v1": ("v1", "sd15"),
    "inpainting": ("v1", "sd15"),
    "instruct-pix2pix": ("v1", "sd15"),
    "v2": ("v2", "sd21"),
    "inpainting_v2": ("v2", "sd21"),
    "xl_base": ("xl_base", "sdxl"),
    "xl_inpaint": ("xl_base", "sdxl"),
}
CONV_IN = f"{ldm.LDM_UNET_KEY}input_blocks.0.0.weight"
OPEN_CLIP, OPEN_CLIP_XL = "cond_stage_model.model.", "conditioner.embedders.1.model."
# Side of the latents of 2.x models that predict the noise (512 pixels); those that predict the velocity have 768.
V2_BASE_SIDE = 64


@dataclass(frozen=True)
class CheckpointFile:
    """A file with weights under the original names, of a whole model or of an autoencoder alone."""

    path: Path

    @cached_property
    def sha256(self) -> bytes:
        """Hash over the file."""
        return file_sha256(self.path)

    def state(self, component: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The weights of a component, by diffusers' names and of the type that they are saved in.

        Args:
            component: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.

        Raises:
            ModelError: The file is damaged or has none.
        """
        try:
            state = _converted(read_tensors(self.path), component, config)
        except BAD_SETTINGS as e:
            raise ModelError(f"{self.path}: its {component} cannot be read: {one_line(e)}; take another copy") from e
        # A name that diffusers expects and the file lacks.
        found = {name: tensor for name, tensor in state.items() if tensor is not None}
        if not found:
            raise ModelError(f"{self.path} has no {component}; expected a checkpoint with all components")
        return found


@dataclass(frozen=True)
class SingleFile(CheckpointFile):
    """A single-file checkpoint and where its configurations are.

    Attributes:
        home: A pipeline's folder without weights: model_index.json, and each component's configuration.
        geometry: The folder with ``unet/config.json`` and ``scheduler/scheduler_config.json``.
        prediction_type: What the UNet predicts.
    """

    home: Path
    geometry: Path
    prediction_type: str

    def unet_config(self) -> dict[str, Any]:
        """The UNet's configuration, with the input channels that the file has."""
        config: dict[str, Any] = read_json(self.geometry / "unet" / "config.json")
        conv_in = read_tensors(self.path).get(CONV_IN)
        if conv_in is None:
            raise ModelError(f"{self.path} has no UNet ({CONV_IN} is missing); expected a Stable Diffusion checkpoint")
        config["in_channels"] = conv_in.shape[1]
        if self.home == FOLDER / "v2" and self.prediction_type == "epsilon":
            config["sample_size"] = V2_BASE_SIDE
        return config

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration."""
        config: dict[str, Any] = read_json(self.geometry / "scheduler" / "scheduler_config.json")
        return config | {"prediction_type": self.prediction_type}


def open_single_file(
    path: Path,
    configs: str | Path | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
) -> SingleFile:
    """Finds out what a checkpoint is.

    Args:
        configs: A pipeline's folder whose configurations fit, for a checkpoint of another geometry; None infers the
            kind as diffusers does.
        allow_pickle: Read a ``.ckpt`` too, tensors only.
        prediction_type: What the UNet predicts; None takes the velocity for 2.x, else the noise, or what `configs` say.

    Raises:
        ModelError: The file is damaged, or a pickle without `allow_pickle`.
        UnsupportedError: It is no checkpoint of Stable Diffusion 1.x, 2.x or XL base.
    """
    check_file(path, allow_pickle)
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise UnsupportedError(
            f"prediction type {prediction_type!r} is unknown; choices: {', '.join(PREDICTION_TYPES)}"
        )
    if configs is not None:
        home = geometry = Path(configs)
    else:
        folder, unet = KINDS[_kind(path, read_tensors(path))]
        home, geometry = FOLDER / folder, ZOO_FOLDER / unet
    said = read_json(geometry / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction_type is None and home == FOLDER / "v2":
        log.warning("%s: taken for a 2.x model of 768 pixels (v_prediction); a base model needs epsilon", path)
    return SingleFile(path, home, geometry, said if prediction_type is None else prediction_type)


def check_file(path: Path, allow_pickle: bool) -> None:
    """Refuses a file that is no checkpoint by its name, and a pickle that was not allowed."""
    if path.suffix in PICKLED and not allow_pickle:
        raise ModelError(
            f"{path} is a pickle, which can run code when it is opened; convert it to .safetensors, or pass "
            "--allow-pickle (allow_pickle=True) to read its tensors and nothing else"
        )
    if path.suffix not in (*SAFE, *PICKLED):
        raise ModelError(f"{path} is a file of another kind; expected .safetensors or .ckpt, or a diffusers directory")


def _kind(path: Path, checkpoint: dict[str, torch.Tensor]) -> str:
    if any(".lora_" in key or key.startswith("lora_") for key in checkpoint):
        raise ModelError(f"{path} is a LoRA; name its base model, and pass the file with --lora")
    kind: str = ldm.infer_diffusers_model_type(checkpoint)
    supported = "single files of Stable Diffusion 1.x, 2.x and XL base (with UNet, VAE and text encoders)"
    if kind not in KINDS:
        raise UnsupportedError(f"{path} is a checkpoint of the kind {kind}; supported: {supported}")
    if (path.parent / "config.json").exists():
        raise ModelError(
            f"{path} has the weights of a diffusers directory, no single file; name the directory: {path.parent}"
        )
    if CONV_IN not in checkpoint:  # diffusers takes whatever it does not know for "v1"
        raise UnsupportedError(f"{path} is no checkpoint of a known kind; supported: {supported}")
    return kind


def _converted(checkpoint: dict[str, torch.Tensor], component: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor]
    if component == "unet":
        state = ldm.convert_ldm_unet_checkpoint(checkpoint, config)
    elif component == "vae":
        already = any(key.startswith(("decoder.up_blocks.", "decoder.layers.")) for key in checkpoint)
        state = checkpoint if already else ldm.convert_ldm_vae_checkpoint(checkpoint, config)
    else:
        prefix = OPEN_CLIP_XL if component == "text_encoder_2" else OPEN_CLIP
        is_open = any(key.startswith(prefix) for key in checkpoint)
        state = _open_clip(checkpoint, config, prefix) if is_open else ldm.convert_ldm_clip_checkpoint(checkpoint)
    return state


def _open_clip(checkpoint: dict[str, torch.Tensor], config: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    like = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    state: dict[str, torch.Tensor] = ldm.convert_open_clip_checkpoint(like, checkpoint, prefix)
    return state


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, and its merges in order (Radford et al. 2021; OpenAI's file, MIT licence)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(MERGES, "rt", encoding="utf-8") as stream:
        merges = [(first, second) for first, second in (line.split() for line in stream)]
    characters = list(bytes_to_unicode().values())
    entries = [*characters, *(f"{each}</w>" for each in characters), *(first + second for first, second in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(entries)}, merges
