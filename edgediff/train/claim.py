"""The folder of a training: what is trained there, so that nothing else goes on from its checkpoints."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgediff.errors import TargetError

SETTINGS = "training.json"
CHECKPOINTS = "checkpoints"
STORE = "store"


@dataclass(frozen=True)
class Claim:
    """What a training wants its folder for.

    Attributes:
        settings: What is asked for.
        sources: Hash of each thing that is learnt from, by what another one would be called: ``another model``.
        processes: How many train together.
        product: The file that a finished training leaves.
        free: Settings that a training that has begun may change: how it goes on, not what it learns from.
        free_after: Those of them that make no other result, and may differ from a finished one's.
    """

    settings: msgspec.Struct
    sources: dict[str, str]
    processes: int
    product: str
    free: tuple[str, ...]
    free_after: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What the folder's file holds."""
        return {
            "sources": self.sources,
            "processes": self.processes,
            "settings": msgspec.to_builtins(self.settings),
        }


def check_place(path: Path, claim: Claim) -> None:
    """Refuses a folder that holds something else.

    Args:
        path: Where the training's result is to be.
        claim: What for.

    Raises:
        TargetError: The folder holds a training of other settings or other sources, or files that are none of ours.
    """
    file = path / SETTINGS
    if not path.exists():
        return
    if not path.is_dir():
        raise TargetError(f"{path} is a file; choose another folder")
    names = {entry.name for entry in path.iterdir()}
    finished = is_finished(path, claim)
    if SETTINGS not in names:
        if names - {f"{SETTINGS}.partial"}:
            what = f"a result without its {SETTINGS}" if finished else "something else"
            raise TargetError(f"{path} holds {what}; choose another folder")
        return
    if not finished and not names - {SETTINGS, f"{SETTINGS}.partial"}:
        return  # nothing has come of it yet
    try:
        found = msgspec.json.decode(file.read_bytes())
        old = {name: found[name] for name in ("sources", "processes", "settings")}
    except (msgspec.DecodeError, TypeError, KeyError) as e:
        raise TargetError(f"{file} is damaged; remove {path} or choose another folder") from e
    differs = _differences(old, claim, finished)
    if differs:
        raise TargetError(f"{path} holds a training with {differs}; choose another folder")


def claim_place(path: Path, claim: Claim) -> None:
    """Writes into the folder what is trained there.

    Args:
        path: Made where it is missing.
        claim: What for.

    Raises:
        TargetError: It cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / f"{SETTINGS}.partial"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(claim.to_dict()), indent=1) + b"\n")
        os.replace(partial, path / SETTINGS)
    except OSError as e:
        raise TargetError(f"{path} cannot be written: {e.strerror or e}") from e


def is_finished(path: Path, claim: Claim) -> bool:
    """Whether the training's result is there.

    Args:
        path: The folder.
        claim: What for.

    Returns:
        True where it is.
    """
    return (path / claim.product).is_file()


def clear_place(path: Path) -> None:
    """Removes what a finished training no longer needs.

    Args:
        path: Its folder.
    """
    for name in (CHECKPOINTS, STORE):
        shutil.rmtree(path / name, ignore_errors=True)


def _differences(old: dict[str, Any], claim: Claim, finished: bool) -> str:
    """In what another training differs."""
    free = claim.free_after if finished else claim.free
    # As it comes back from the file: a tuple is a list there.
    was, wanted = old["settings"], msgspec.json.decode(msgspec.json.encode(claim.settings))
    if not isinstance(was, dict) or not isinstance(old["sources"], dict):
        return "settings that cannot be read"
    names = [name for name in wanted if name not in free and was.get(name) != wanted[name]]
    found = [f"{name} {was.get(name)!r}, not {wanted[name]!r}" for name in names]
    # One that is not known by this name comes with a setting that differs.
    found += [what for what, digest in claim.sources.items() if old["sources"].get(what, digest) != digest]
    if old["processes"] != claim.processes and not finished:
        found.append(f"{old['processes']} processes, not {claim.processes}")
    return ", ".join(found)
