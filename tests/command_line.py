"""The command line, run in this process or as the script, what it said, and the folders it must leave as they were."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgediff import cli
from edgediff.cli.app import OF_TORCHAO

# As in every command; tests that call the library import diffusers too.
for name in OF_TORCHAO:
    logging.getLogger(name).setLevel(logging.ERROR)

SCRIPT = Path(sys.executable).parent / "edgediff"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# What the commands say on the way where there is no terminal, one line for each thing.
PROGRESS = (
    "loading ", "opening ", "step ", "dividing ", "drawing ", "reference trajectory", "exporting ", "verifying: ",
    "hashing ", "comparing ", "reading ", "onnxruntime: ", "mil-reference: ", "coreml: ", "trajectory of the source",
    "reference with ", "joining ", "storing ", "encoding ", "openvino: ", "writing ", "calibrating ", "measuring ",
    "first steps ", "copying ",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """An exit code, the standard output, and the lines of the standard error that are no progress."""

    code: int
    out: str
    errors: list[str]

    @classmethod
    def of(cls, code: int, out: str, err: str) -> "Said":
        return cls(code, out, [line for line in err.splitlines() if line.strip() and not line.startswith(PROGRESS)])


Command = Callable[..., Said]


def exit_code(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["edgediff", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int), caught.value.code
    return caught.value.code


def process(*args: object, **options: Any) -> Said:
    done = subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120, **options)
    return Said.of(done.returncode, done.stdout, done.stderr)


def assert_error(said: Said, *parts: str, code: int = 2) -> None:
    assert said.code == code, said
    assert len(said.errors) == 1, said.errors
    assert said.errors[0].startswith("error: "), said.errors
    for part in parts:
        assert part in said.errors[0], (part, said.errors)
    assert said.out == "", said.out


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything under a folder, hidden things too."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        for p in found
    }


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Everything under the folders is after the block what it was before."""
    before = {folder: snapshot(folder) for folder in folders}
    yield
    for folder, old in before.items():
        new = snapshot(folder)
        changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        assert changed == [], (folder, changed)
