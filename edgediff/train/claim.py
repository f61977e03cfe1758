"""The folder of a training: what is trained there, and that no other training writes there meanwhile."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError

from edgediff.errors import TargetError
from edgediff.outputs import as_text, check_folder, lock, unlock, write_whole
from edgediff_runtime.errors import one_line

SETTINGS = "training.json"
CHECKPOINTS = "checkpoints"
STORE = "store"


class _Record(msgspec.Struct):
    """What `SETTINGS` contains."""

    sources: dict[str, str]
    processes: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """What a training uses its folder for.

    Attributes:
        product: The file that a finished training leaves.
        settings: Those in its `free` may differ when a training is resumed; of a finished one, not the learning rate.
        sources: sha256 of what is learnt from, by how a message calls a different one: ``another model``.
    """

    path: Path
    product: str
    settings: Any
    sources: dict[str, str]
    accelerator: Accelerator

    def is_done(self) -> bool:
        """Whether the result is there already.

        Raises:
            TargetError: The folder contains a training of other settings or sources, or other files.
        """
        self._check()
        if not self._is_finished():
            return False
        self.accelerator.wait_for_everyone()
        self._clear()  # it may have been killed before it did this itself
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder and records there what is trained, until the block or the process ends.

        A block that ends without an error removes the checkpoints.

        Raises:
            TargetError: The folder contains something else, cannot be written, or another training runs there.
        """
        descriptor = None
        self.accelerator.wait_for_everyone()
        try:
            if self.accelerator.is_main_process:
                with writing(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    descriptor = _lock(self.path)
                    self._check()
                    data = msgspec.json.format(msgspec.json.encode(self._record()), indent=1) + b"\n"
                    write_whole(self.path / SETTINGS, lambda scratch: scratch.write_bytes(data))
            self.accelerator.wait_for_everyone()
            yield
            self._clear()
        finally:
            unlock(descriptor)

    def _record(self) -> _Record:
        return _Record(self.sources, self.accelerator.num_processes, msgspec.to_builtins(self.settings))

    def _is_finished(self) -> bool:
        return (self.path / self.product).is_file()

    def _clear(self) -> None:
        """Removes what a finished training no longer needs."""
        if self.accelerator.is_main_process:
            for name in (CHECKPOINTS, STORE):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _check(self) -> None:
        path = self.path
        check_folder(path)
        if not path.exists():
            return
        file = path / SETTINGS
        # A kill may have left a half-written copy of it.
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(f".{SETTINGS}.")}
        if not names or (names == {SETTINGS} and not self._is_finished()):
            return
        if SETTINGS not in names:
            what = f"a result without its {SETTINGS}" if self._is_finished() else "something else"
            raise TargetError(f"{path} contains {what}; choose another folder")
        try:
            old = msgspec.json.decode(file.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError, ValueError) as e:
            raise TargetError(f"{file} is damaged; remove {path} or choose another folder") from e
        differs = ", ".join(self._differences(old))
        if differs:
            raise TargetError(f"{path} contains a training with {differs}; choose another folder")

    def _differences(self, old: _Record) -> Iterator[str]:
        finished = self._is_finished()
        free = set(self.settings.free) - ({"learning_rate"} if finished else set())
        # As read from the file: a tuple is a list there.
        new = msgspec.json.decode(msgspec.json.encode(self._record()), type=_Record)
        for name, value in new.settings.items():
            if name not in free and old.settings.get(name) != value:
                yield f"{name} {old.settings.get(name)!r}, not {value!r}"
        # A source that the old one lacks comes with a setting that differs.
        yield from (what for what, digest in new.sources.items() if old.sources.get(what, digest) != digest)
        if old.processes != new.processes and not finished:
            yield f"{old.processes} processes, not {new.processes}"


def check_output(path: Path, accelerator: Accelerator) -> None:
    """Refuses a folder that cannot be written or that another training uses, before anything is read.

    Raises:
        TargetError: It is a file, cannot be written, has a name that is not UTF-8, or another training runs there.
    """
    if as_text(path.resolve()) != str(path.resolve()):
        raise TargetError(f"{as_text(path.resolve())}: the name is not UTF-8; choose another folder")
    check_folder(path)
    if path.is_dir() and accelerator.is_main_process:
        unlock(_lock(path))


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what writing raises into a TargetError about `path`; `kept` is what is left to resume from."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as e:  # torch and safetensors have their own for a full disk
        raise TargetError(f"{path} cannot be written: {one_line(e)[:200]}{kept and '; '}{kept}") from e


def is_main_process() -> bool:
    """Whether this process, of those that train together, is the one that prints."""
    return bool(PartialState().is_main_process)


def _lock(path: Path) -> int | None:
    try:
        return lock(path)
    except BlockingIOError as e:
        raise TargetError(f"{path}: another training runs there; wait for it to end, or choose another folder") from e
