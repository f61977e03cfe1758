"""Artefacts that tests share: made once by all processes, whole whatever is killed, no more of them than are of use."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import KEPT_STORES, locked, made_once, open_store, state_of
from guard import guard_stores


def _write(path: Path) -> None:
    path.mkdir()
    (path / "made").write_text("whole")


def test_it_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []
    for _ in range(2):
        path = made_once(tmp_path / "a", lambda path: (made.append(path), _write(path)))
        assert (path / "made").read_text() == "whole"
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_process_waits_and_what_a_killed_one_left_is_made_again(tmp_path: Path) -> None:
    told, tell = os.pipe()

    def half(path: Path) -> None:
        path.mkdir()
        os.write(tell, b"half")
        signal.pause()

    child = os.fork()
    if child == 0:
        made_once(tmp_path / "a", half)
    assert os.read(told, 4) == b"half"
    assert not (tmp_path / "a").exists()
    if (waiting := os.fork()) == 0:
        made_once(tmp_path / "a", _write)
        os._exit(0)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.waitpid(waiting, 0)[1] == 0
    made_once(tmp_path / "a", lambda path: pytest.fail("made twice"))
    assert (tmp_path / "a" / "made").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.lock"]


def test_what_fails_is_not_there(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            made_once(tmp_path / "a", lambda path: (_write(path), 1 / 0))
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "made").write_text("other"),
        lambda path: (path / "made").unlink(),
        lambda path: path.rename(path.with_name("moved")),
        lambda path: shutil.rmtree(path),
        lambda path: shutil.move(path, path.with_name("moved")),
        lambda path: os.replace(path.parents[1] / "new", path / "made"),
    ],
    ids=["written", "removed", "renamed", "tree removed", "moved", "replaced"],
)
def test_what_is_kept_is_not_changed(change: Callable[[Path], object], tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    stores.mkdir()
    (tmp_path / "new").touch()
    guard_stores(stores)
    path = made_once(stores / "a", _write)
    with pytest.raises(PermissionError, match="is kept for all tests; copy it"):
        change(path)
    assert (path / "made").read_text() == "whole"
    (shutil.copytree(path, tmp_path / "mine") / "made").unlink()


def test_a_changed_source_is_another_state(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.py").write_text("1")
    before = state_of([tmp_path / "source"])
    assert state_of([tmp_path / "source"]) == before
    (tmp_path / "source" / "a.py").write_text("2")
    changed = state_of([tmp_path / "source"])
    (tmp_path / "source" / "a.py").rename(tmp_path / "source" / "b.py")
    assert len({before, changed, state_of([tmp_path / "source"])}) == 3


def test_the_oldest_states_go(tmp_path: Path) -> None:
    for number in range(4):
        folder = open_store(tmp_path, f"{number}")
        with locked(folder / "a"):
            os.utime(folder, (number, number))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["2", "3"]
    assert KEPT_STORES == 2
