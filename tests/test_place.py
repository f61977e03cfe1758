import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgediff.bundle.staging import check_place, clear_stale, staged
from edgediff.errors import TargetError


def _bundle(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format_version": 1}')
    (folder / "SHA256SUMS").write_text("")
    (folder / "weights").write_text(text)
    return folder


def _export(target: Path, fault: BaseException | None = None) -> None:
    clear_stale(target)
    with staged(target) as folder:
        (folder / "new").touch()
        if fault is not None:
            raise fault


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out", "a/b/out", "empty"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_free_place_is_filled_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    target = Path(name) if relative else tmp_path / name
    check_place(target, force=False)
    with staged(target) as folder:
        assert not (target / "a").exists()
        (folder / "a").write_text("x")
    assert (tmp_path / name / "a").read_text() == "x"
    assert set(_names((tmp_path / name).parent)) <= {"out", "empty"}


def test_an_existing_bundle_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = _bundle(tmp_path / "out")
    with staged(target) as folder:
        (folder / "new").touch()
        assert (target / "weights").read_text() == "old"
    assert _names(target) == ["new"]
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("fault", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_whatever_ends_the_block_leaves_the_old_as_it_was(tmp_path: Path, fault: BaseException) -> None:
    target = _bundle(tmp_path / "out")
    with pytest.raises(type(fault)):
        _export(target, fault)
    assert (target / "weights").read_text() == "old"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_the_old_as_it_was(tmp_path: Path, number: int) -> None:
    target = _bundle(tmp_path / "out")
    with pytest.raises(TargetError, match=r"the disk is full: .*out was not written, what was there is as it was"):
        _export(target, OSError(number, os.strerror(number)))
    assert (target / "weights").read_text() == "old"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_fault_between_the_two_renames_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    target = _bundle(tmp_path / "out")
    rename, calls = os.rename, []

    def faulty(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise fault
        rename(source, to)

    monkeypatch.setattr(os, "rename", faulty)
    with pytest.raises(type(fault)):
        _export(target)
    assert len(calls) == 3
    assert (target / "weights").read_text() == "old"
    assert _names(tmp_path) == ["out"]


def test_stale_siblings_of_dead_processes_are_cleared_and_of_living_ones_kept(tmp_path: Path) -> None:
    target = _bundle(tmp_path / "out")
    living = (".out.edgediff-1", ".out.edgediff-1.old")
    others = (".out.edgediff-mine", ".other.edgediff-1")
    # A process number that is in use again says nothing: the lock is what tells the living.
    for name in (*living, *others, f".out.edgediff-{os.getppid()}", ".out.edgediff-2.old"):
        _bundle(tmp_path / name)
    holding = "import fcntl, os, sys; [fcntl.flock(os.open(f, os.O_RDONLY), fcntl.LOCK_EX) for f in sys.argv[1:]]"
    with subprocess.Popen(
        [sys.executable, "-c", f"{holding}; print('held', flush=True); sys.stdin.read()", *living],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        _export(target)
        assert _names(tmp_path) == sorted([*living, *others, "out"])
        other.kill()
    _export(target)
    assert _names(tmp_path) == sorted([*others, "out"])
    assert _names(target) == ["new"]


def _write(target: Path, text: str) -> None:
    clear_stale(target)
    with staged(target) as folder:
        for name in ("manifest.json", "weights"):
            (folder / name).write_text(text)


def _killed_at(moment: int, target: Path) -> bool:
    """Whether a process that kills itself before its so manieth line of staging and shutil was killed."""
    child = os.fork()
    if child == 0:
        lines = itertools.count(1)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if Path(frame.f_code.co_filename).name not in ("staging.py", "shutil.py"):
                return None
            if event == "line" and next(lines) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        _write(target, "new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _holds(target: Path) -> str | None:
    """The text of a place that is whole."""
    if not target.exists():
        return None
    assert _names(target) == ["manifest.json", "weights"]
    manifest, weights = (file.read_text() for file in sorted(target.iterdir()))
    assert manifest == weights
    return weights


def kill_at_each_line(folder: Path, before: str) -> None:
    """Writes in new processes, each killed one line later than the last, until one is not killed."""
    for moment in itertools.count(1):
        target = folder / f"{moment}" / "out"
        target.parent.mkdir()
        if before != "nothing":
            _write(target, "old")
        if before == "a bundle moved aside":
            target.rename(target.with_name(".out.edgediff-7.old"))
        killed = _killed_at(moment, target)
        old = None if before == "nothing" else "old"
        left = _names(target.parent)
        assert _holds(target) in (old, "new") or any(name.endswith(".old") for name in left), left
        clear_stale(target)
        assert _holds(target) in (old, "new")
        assert set(_names(target.parent)) <= {"out"}
        if not killed:
            break
    assert moment > 20
    assert _holds(target) == "new"


@pytest.mark.parametrize("before", ["nothing", "a bundle", "a bundle moved aside"])
def test_a_process_killed_at_any_line_loses_nothing(tmp_path: Path, before: str) -> None:
    # In a process of its own: a fork of this one would have the locks of threads that libraries began here.
    killing = "import pathlib, sys, test_place; test_place.kill_at_each_line(pathlib.Path(sys.argv[1]), sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", killing, tmp_path, before], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(_names(tmp_path)) > 20


def test_a_name_with_wildcards_means_itself_alone(tmp_path: Path) -> None:
    other = _bundle(tmp_path / ".o1.edgediff-7.old")
    with pytest.raises(ValueError, match="its own"):
        _export(tmp_path / "o[12]", ValueError("its own"))
    assert _names(tmp_path) == [other.name]


def test_force_is_needed_to_replace_a_bundle(tmp_path: Path) -> None:
    target = _bundle(tmp_path / "out")
    with pytest.raises(TargetError, match="holds another bundle; pass --force"):
        check_place(target, force=False)
    check_place(target, force=True)


@pytest.mark.parametrize("lost", ["SHA256SUMS", "manifest.json"])
def test_a_damaged_bundle_is_told_from_other_things(tmp_path: Path, lost: str) -> None:
    target = _bundle(tmp_path / "out")
    (target / lost).unlink()
    if lost == "manifest.json":
        with pytest.raises(TargetError, match="not a bundle, never replaced"):
            check_place(target, force=True)
    else:
        check_place(target, force=True)
        assert (target / "weights").exists()


@pytest.mark.parametrize("force", [True, False])
def test_a_web_page_with_its_own_manifest_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "my page", "icons": []}')
    (tmp_path / "index.html").touch()
    with pytest.raises(TargetError, match="not a bundle, never replaced"):
        check_place(tmp_path, force)


@pytest.mark.parametrize("force", [True, False])
def test_other_folders_files_and_symlinks_are_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(_bundle(tmp_path / "bundle"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError, match="folder that is not a bundle, never replaced"):
        check_place(tmp_path / "folder", force)
    for name in ("file", "link", "dangling"):
        with pytest.raises(TargetError, match=f"{name} is not a directory"):
            check_place(tmp_path / name, force)
    with pytest.raises(TargetError, match="file is not a folder that can be written"):
        check_place(tmp_path / "file" / "out", force)


def test_a_name_too_long_for_a_sibling_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot write beside .*File name too long"), staged(tmp_path / ("x" * 250)):
        pass
    assert _names(tmp_path) == []


def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def export_beside_a_user() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").touch()

    with pytest.raises(TargetError, match="appeared while the bundle was written"):
        export_beside_a_user()
    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == ["thesis.tex"]


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("edgediff.outputs.fcntl.flock", unsupported)
    target = _bundle(tmp_path / "out")
    _bundle(tmp_path / ".out.edgediff-7")
    _export(target)
    assert _names(tmp_path) == ["out"]
    assert _names(target) == ["new"]
