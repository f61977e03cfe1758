"""The folder of a training: what is trained there, so that nothing else goes on from its checkpoints."""

import os
from pathlib import Path
from typing import Any

import msgspec

from edgediff.errors import TargetError
from edgediff.models.load import Model
from edgediff.models.trained import RECORD
from edgediff.train.settings import AdaptorTraining
from edgediff_runtime.bundle import sha256_of

SETTINGS = "training.json"
CHECKPOINTS = "checkpoints"
STORE = "store"
# What a training that has begun may change: how fast it goes on, not what it learns from.
FREE = ("learning_rate", "checkpoint_minutes", "store_gb")


def check_place(path: Path, settings: AdaptorTraining, model: Model, processes: int) -> None:
    """Refuses a folder that holds something else.

    Args:
        path: Where the adaptor is to be.
        settings: What is asked for.
        model: What it is to serve.
        processes: How many train together.

    Raises:
        TargetError: The folder holds a training of other settings or another model, or files that are none of ours.
    """
    file = path / SETTINGS
    if not path.exists():
        return
    if not path.is_dir():
        raise TargetError(f"{path} is a file; choose another folder")
    names = {entry.name for entry in path.iterdir()}
    if SETTINGS not in names:
        if names - {f"{SETTINGS}.partial"}:
            what = f"an adaptor without its {SETTINGS}" if RECORD in names else "something else"
            raise TargetError(f"{path} holds {what}; choose another folder")
        return
    if not names & {CHECKPOINTS, STORE, RECORD}:
        return  # nothing has come of it yet
    try:
        found = msgspec.json.decode(file.read_bytes())
        old = {name: found[name] for name in ("model_sha256", "conditioning_sha256", "processes", "settings")}
    except (msgspec.DecodeError, TypeError, KeyError) as e:
        raise TargetError(f"{file} is damaged; remove {path} or choose another folder") from e
    differs = _differences(old, _wanted(settings, model, processes), finished=RECORD in names)
    if differs:
        raise TargetError(f"{path} holds a training with {differs}; choose another folder")


def claim_place(path: Path, settings: AdaptorTraining, model: Model, processes: int) -> None:
    """Writes into the folder what is trained there.

    Args:
        path: Made where it is missing.
        settings: What is asked for.
        model: What it is to serve.
        processes: How many train together.
    """
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f"{SETTINGS}.partial"
    data = msgspec.json.encode(_wanted(settings, model, processes))
    partial.write_bytes(msgspec.json.format(data, indent=1) + b"\n")
    os.replace(partial, path / SETTINGS)


def _wanted(settings: AdaptorTraining, model: Model, processes: int) -> dict[str, Any]:
    conditioning = None if settings.conditioning is None else sha256_of(Path(settings.conditioning))
    return {
        "model_sha256": model.sha256,
        "conditioning_sha256": conditioning,
        "processes": processes,
        "settings": msgspec.to_builtins(settings),
    }


def _differences(old: dict[str, Any], new: dict[str, Any], finished: bool) -> str:
    """In what another training differs; what is free counts where it is finished and was learnt with."""
    free = () if not finished else ("learning_rate",)
    was, wanted = old["settings"], new["settings"]
    if not isinstance(was, dict):
        return "settings that cannot be read"
    names = [name for name in wanted if (name not in FREE or name in free) and was.get(name) != wanted[name]]
    found = [f"{name} {was.get(name)!r}, not {wanted[name]!r}" for name in names]
    if old["model_sha256"] != new["model_sha256"]:
        found.append("another model")
    if old["conditioning_sha256"] != new["conditioning_sha256"] and "conditioning" not in names:
        found.append(f"other embeddings in {wanted['conditioning']}")
    if old["processes"] != new["processes"] and not finished:
        found.append(f"{old['processes']} processes, not {new['processes']}")
    return ", ".join(found)
