import dataclasses
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FULL, SCRIPT, Command, Said, assert_error, snapshot, unchanged
from seals import flip_bit

import edgediff.export.export_bundle as pipeline
from edgediff.bundle.reference import Reference, save_reference
from edgediff.bundle.rows import ParityReport, Row
from edgediff.targets.onnx import OnnxTarget

# Where the bundle goes.


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_other_things_are_never_replaced(command: Command, class_model: Path, place: Path, force: list[str]) -> None:
    (place / "page").mkdir()
    (place / "page" / "manifest.json").write_text('{"name": "a web page"}')
    (place / "page" / "index.html").touch()
    (place / "link").symlink_to("page")
    for output, part in (
        (place, "a folder that is not a bundle, never replaced"),
        (place / "page", "a folder that is not a bundle, never replaced"),
        (place / "mine.txt", "mine.txt is not a directory"),
        (place / "mine.txt" / "out", "mine.txt is not a folder that can be written"),
        (place / ("x" * 300), "File name too long"),
        (place / "link", "link"),
    ):
        with unchanged(place):
            assert_error(command("export", class_model, "-o", output, *force), part)


def test_the_same_bundle_again_is_left_as_it_is(
    command: Command, class_model: Path, class_bundle: Path, place: Path
) -> None:
    shutil.copytree(class_bundle, place / "out")
    for force in ([], ["--force"]):
        with unchanged(place):
            said = command("export", class_model, "-o", place / "out", "--steps", "4", "--layout", "split", *force)
        assert said.code == 0
        assert "already there and valid: nothing was exported" in said.out.replace("\n", " ")


def test_another_bundle_and_a_damaged_one_need_force(
    command: Command, class_model: Path, class_bundle: Path, place: Path
) -> None:
    shutil.copytree(class_bundle, place / "out")
    export = ("export", class_model, "-o", place / "out", "--layout", "split")
    with unchanged(place):
        assert_error(command(*export, "--steps", "3"), "holds another bundle; pass --force")
    flip_bit(place / "out" / "onnx/unet/lowres.onnx")
    with unchanged(place):
        assert_error(command(*export, "--steps", "4"), "not valid (onnx/unet/lowres.onnx does not", "--force")
    said = command(*export, "--steps", "4", "--force")
    assert (said.code, said.errors) == (0, [])
    assert command("verify", place / "out").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "out"]


# Interrupted, and a full disk.


def _fails(fault: BaseException) -> Callable[..., None]:
    def faulty(*_: object, **__: object) -> None:
        raise fault

    return faulty


@pytest.mark.parametrize(("fault", "code"), [(FULL, 2), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("name", ["write_onnx", "save_reference", "_seal"])
def test_what_ends_an_export_leaves_what_was_there(
    command: Command,
    class_model: Path,
    class_bundle: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    code: int,
    name: str,
) -> None:
    if name != "write_onnx":  # the graphs take the time, and are not what fails here
        monkeypatch.setattr(OnnxTarget, "write", lambda self, job: job.target)
    monkeypatch.setattr("edgediff.targets.onnx.write_onnx.write_onnx" if name == "write_onnx" else
                        f"edgediff.export.export_bundle.{name}", _fails(fault))  # fmt: skip
    shutil.copytree(class_bundle, place / "out")
    for output in ("out", "deep/new"):
        with unchanged(place):
            said = command("export", class_model, "-o", place / output, "--steps", "3", "--force")
            shutil.rmtree(place / "deep", ignore_errors=True)
        assert_error(said, "what was there is as it was", code=code)
        assert ("the disk is full" in said.errors[0]) == (code == 2)


def test_a_disk_that_fills_while_torch_writes_its_graph(
    command: Command, class_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", _fails(FULL))
    with unchanged(place):
        assert_error(command("export", class_model, "-o", place / "out", "--steps", "3"), "the disk is full")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
        except OSError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(
    command: Command, class_model: Path, class_bundle: Path, disk: Callable[[int], Path]
) -> None:
    small = disk(64)
    assert_error(command("export", class_model, "-o", small / "out", "--steps", "3"), "the disk is full")
    assert snapshot(small) == {}
    reference = Reference((), np.zeros(2**16, np.float32), {})
    with pytest.raises(OSError, match="No space left"):
        save_reference(reference, small / "reference.safetensors")
    (small / "reference.safetensors").unlink()
    (small / "out.npy").write_bytes(b"as it was")
    (small / "rest").write_bytes(b"x" * 50_000)
    said = command("run", class_bundle, "-o", small / "out.npy")
    assert_error(said, "No space left on device")
    assert sorted(path.name for path in small.iterdir()) == ["out.npy", "rest"]
    assert (small / "out.npy").read_bytes() == b"as it was"


@pytest.mark.long
@pytest.mark.parametrize("size", [100, 200, 330])
def test_a_disk_that_fills_while_coremltools_writes(
    command: Command, class_model: Path, disk: Callable[[int], Path], size: int
) -> None:
    # Weights in C++, the program in Python, a copy in C++: each has its own way to say so.
    small = disk(size)
    said = command("export", class_model, "-o", small / "out", "--steps", "3", "--target", "coreml")
    assert_error(said, "the disk is full")
    assert snapshot(small) == {}


def test_a_number_that_does_not_hold_puts_nothing_in_place(
    command: Command, class_model: Path, class_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("graph", "lowres", "onnxruntime", "lowres_feature", 12.5, 35.0, False, "measured")
    monkeypatch.setattr(OnnxTarget, "write", lambda self, job: job.target)
    monkeypatch.setattr(pipeline, "verify_bundle", lambda *_, **__: ParityReport((row,), "full", ("onnx",)))
    shutil.copytree(class_bundle, place / "out")
    with unchanged(place):
        said = command("export", class_model, "-o", place / "out", "--steps", "3", "--force")
    assert "below its floor" in said.out
    words = "graph lowres (lowres_feature, onnxruntime) is 12.5 dB, expected 35.0 dB"
    assert_error(dataclasses.replace(said, out=""), words, code=1)


@pytest.mark.long
def test_control_c_in_a_real_export(class_model: Path, place: Path) -> None:
    with subprocess.Popen(
        [SCRIPT, "export", class_model, "-o", place / "out", "--steps", "3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:  # fmt: skip
        assert running.stderr is not None
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("exporting"):
                break
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert_error(Said.of(running.returncode, out, "".join(lines) + err), "interrupted", code=130)
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt"]
