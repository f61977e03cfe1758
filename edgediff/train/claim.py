"""The folder of a training: what is trained there, and that no other training writes there at the same time."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from accelerate import Accelerator, PartialState

from edgediff.errors import TargetError
from edgediff.outputs import as_text, check_folder, lock, unlock, write_whole

SETTINGS = "training.json"
CHECKPOINTS = "checkpoints"
STORE = "store"


@dataclass(frozen=True)
class Claim:
    """What a training wants its folder for.

    Attributes:
        settings: What is asked for; its `free` may change when a training goes on, its `free_after` also once it is
            finished.
        sources: Hash of each thing that is learnt from, by what another one would be called: ``another model``.
        processes: How many train together.
        product: The file that a finished training leaves.
    """

    settings: Any
    sources: dict[str, str]
    processes: int
    product: str

    def to_dict(self) -> dict[str, Any]:
        """What the folder's file holds."""
        return {
            "sources": self.sources,
            "processes": self.processes,
            "settings": msgspec.to_builtins(self.settings),
        }

    def is_finished(self, path: Path) -> bool:
        """Whether the training's result is in a folder."""
        return (path / self.product).is_file()


def check_output(path: Path) -> None:
    """Refuses a folder that cannot be written or that another training writes, before anything is read.

    Raises:
        TargetError: It is a file, cannot be written, has a name that is not UTF-8, or another training runs there.
    """
    if as_text(path.resolve()) != str(path.resolve()):
        raise TargetError(f"{as_text(path.resolve())}: the name is not UTF-8; choose another folder")
    check_folder(path)
    if path.is_dir() and is_main_process():
        unlock(_lock(path))


def check_place(path: Path, claim: Claim) -> None:
    """Refuses a folder that holds something else.

    Raises:
        TargetError: The folder holds a training of other settings or other sources, or files that are none of ours.
    """
    check_folder(path)
    if not path.exists():
        return
    file = path / SETTINGS
    # A kill may have left this one half written.
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(f".{SETTINGS}.")}
    finished = claim.is_finished(path)
    if SETTINGS not in names:
        if names:
            what = f"a result without its {SETTINGS}" if finished else "something else"
            raise TargetError(f"{path} holds {what}; choose another folder")
        return
    if not finished and names == {SETTINGS}:
        return  # nothing has come of it yet
    try:
        found = msgspec.json.decode(file.read_bytes())
        old = {name: found[name] for name in ("sources", "processes", "settings")}
    except (OSError, msgspec.DecodeError, ValueError, TypeError, KeyError) as e:
        raise TargetError(f"{file} is damaged; remove {path} or choose another folder") from e
    differs = _differences(old, claim, finished)
    if differs:
        raise TargetError(f"{path} holds a training with {differs}; choose another folder")


@contextmanager
def claimed(path: Path, claim: Claim, accelerator: Accelerator) -> Iterator[None]:
    """Keeps a training's folder for as long as the block takes: says there what is trained, and locks it.

    The lock ends with the process, however it ends.

    Raises:
        TargetError: The folder holds something else, cannot be written, or another training runs there.
    """
    held = None
    accelerator.wait_for_everyone()
    try:
        if accelerator.is_main_process:
            try:
                path.mkdir(parents=True, exist_ok=True)
                held = _lock(path)
                check_place(path, claim)
                data = msgspec.json.format(msgspec.json.encode(claim.to_dict()), indent=1) + b"\n"
                write_whole(path / SETTINGS, lambda scratch: scratch.write_bytes(data))
            except OSError as e:
                raise TargetError(f"{path} cannot be written: {e.strerror or e}") from e
        accelerator.wait_for_everyone()
        yield
    finally:
        unlock(held)


def clear_place(path: Path, accelerator: Accelerator) -> None:
    """Removes what a finished training no longer needs."""
    if accelerator.is_main_process:
        for name in (CHECKPOINTS, STORE):
            shutil.rmtree(path / name, ignore_errors=True)
    accelerator.wait_for_everyone()


def is_main_process() -> bool:
    """Whether this process is the one that speaks: of several that train together, the first."""
    return bool(PartialState().is_main_process)


def _lock(path: Path) -> int | None:
    try:
        return lock(path)
    except BlockingIOError as e:
        raise TargetError(f"{path}: another training runs there; wait for it to end, or choose another folder") from e


def _differences(old: dict[str, Any], claim: Claim, finished: bool) -> str:
    """In what another training differs."""
    free = claim.settings.free_after if finished else claim.settings.free
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
