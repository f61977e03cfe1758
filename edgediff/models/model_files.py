"""Files of a model: JSON and tensors, each read with one ModelError that names the file.

Weights are read from safetensors first, and from a pickle (``.bin``, ``.ckpt``) only with ``weights_only=True``.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from edgediff.errors import ModelError
from edgediff_runtime.errors import one_line

WEIGHTS = "diffusion_pytorch_model"
# How diffusers and transformers name files of weights: as safetensors, and as .bin.
DIFFUSERS, TRANSFORMERS = (WEIGHTS, WEIGHTS), ("model", "pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")
# Attention layers in checkpoints from before diffusers 0.12.
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What torch, diffusers and transformers raise for settings of the wrong kind.
BAD_SETTINGS = (
    TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, LookupError, NameError, AssertionError,
    ImportError, MemoryError,
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file of settings by name (or of any value: `kind` object); a ModelError where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ModelError(f"{path} is missing; expected a directory saved by diffusers") from e
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read as JSON: {one_line(e)}") from e
    if not isinstance(data, kind):
        raise ModelError(f"{path} contains a {type(data).__name__}; expected an object of settings by name")
    return data


def weight_files(folder: Path, stems: tuple[str, str] = DIFFUSERS) -> list[Path]:
    """The files of a component's weights: one or an index's shards, safetensors before .bin, fp32 before fp16.

    Args:
        stems: Their names as safetensors and as .bin: `DIFFUSERS` or `TRANSFORMERS`.

    Raises:
        ModelError: An index names shards that are missing or outside of the folder.
    """
    for suffix, stem in zip(("safetensors", "bin"), stems, strict=True):
        for variant in VARIANTS:
            single = folder / f"{stem}{variant}.{suffix}"
            index = folder / f"{stem}.{suffix}.index{variant}.json"
            if single.exists():
                return [single]
            if index.exists():
                named = read_json(index).get("weight_map")
                shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
                bad = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
                if bad or not shards:
                    raise ModelError(f"{index} names shards that are missing: {', '.join(bad) or 'none'}")
                return [folder / shard for shard in shards]
    return []


def check_weights(folder: Path, files: list[Path], stems: tuple[str, str] = DIFFUSERS) -> None:
    """Refuses a component without weights, and names files of weights that have another name."""
    if not files:
        others = sorted(file.name for file in folder.glob(f"{stems[0]}.*") if file.is_file())
        found = f" of a known name (found: {', '.join(others)})" if others else ""
        raise ModelError(f"{folder} has a config.json but no weights{found}; expected {stems[0]}.safetensors")


def read_state(folder: Path, stems: tuple[str, str] = DIFFUSERS) -> dict[str, torch.Tensor]:
    """The weights of a component's folder, by today's names and of the type that they are saved in.

    Raises:
        ModelError: A file is missing or damaged.
    """
    files = weight_files(folder, stems)
    check_weights(folder, files, stems)
    return {_modern(key): tensor for file in files for key, tensor in read_tensors(file).items()}


def _modern(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts and parts[-2] in LEGACY_ATTENTION:
        parts[-2] = LEGACY_ATTENTION[parts[-2]]
    return ".".join(parts)


def file_sha256(file: Path) -> bytes:
    """Hash over a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def folder_sha256(folder: Path) -> str:
    """The SHA-256 over a component's configuration and its weights, in hexadecimal."""
    digest = hashlib.sha256(file_sha256(folder / "config.json"))
    for file in weight_files(folder):
        digest.update(file_sha256(file))
    return digest.hexdigest()


def read_saved(file: Path) -> Any:
    """What a file holds: tensors by name, or what a pickle has of tensors and plain data; nothing that runs code.

    Raises:
        ModelError: The file is damaged, or a pickle of anything else.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{file} is a Git LFS pointer without weights; run `git lfs pull` in its repository")
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([nn.ParameterDict]):  # of the first textual inversions
            return torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, AttributeError) as e:
        raise ModelError(f"{file} cannot be read as weights ({one_line(e)}); is it damaged or truncated?") from e
    except Exception as e:  # pickle's own errors share no base class
        # torch's own message goes on to say how to run the file's code.
        raise ModelError(f"{file} is not a plain file of tensors and was not opened; expected safetensors") from e


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads tensors by name; a ModelError where the file is damaged, or contains anything else.

    A training's checkpoint (``.ckpt``, ``.pt``) has them under ``state_dict``.
    """
    tensors = read_saved(file)
    if file.suffix in (".ckpt", ".pt", ".pth") and isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelError(f"{file} does not contain tensors by name; expected safetensors")
    complex_ones = [key for key, tensor in tensors.items() if tensor.is_complex()]
    if complex_ones:
        raise ModelError(f"{file}: weights are complex numbers in {', '.join(complex_ones[:3])}; expected real ones")
    return dict(tensors)


def fill(module: nn.Module, state: dict[str, torch.Tensor], where: Path, config: str) -> None:
    """Replaces the parameters of a module on the meta device by tensors, which are not copied.

    Raises:
        ModelError: Names or shapes differ from what `config`, the name of a file, describes, or a value is not finite.
    """
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as e:
        reason = _known_misfit({*state}, {*module.state_dict()}) or one_line(e)
        raise ModelError(f"{where}: the weights do not fit its {config}: {reason}") from e
    check_finite(state, where)


def check_finite(state: Mapping[str, torch.Tensor], where: Path) -> None:
    """Refuses weights with a value that is not finite."""
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ModelError(f"{where}: weights are not finite in {', '.join(bad[:3])}; take an undamaged copy")


def _known_misfit(given: set[str], wanted: set[str]) -> str | None:
    """Why names do not fit, where the names themselves say so."""
    if any(".base_layer." in name or ".lora_" in name for name in given):
        return "they contain LoRA layers of PEFT; fuse them (merge_and_unload() or fuse_lora()) and save the UNet again"
    prefix = next(iter(given), "").partition(".")[0] + "."
    if {name.removeprefix(prefix) for name in given if name.startswith(prefix)} == wanted:
        return f"every name begins with {prefix!r}, as a module around the UNet saves them; save the UNet inside of it"
    return None
