"""What a killed export leaves: at each moment that its folder changes, a copy is taken, as a kill would leave it."""

import functools
import pkgutil
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from artefacts import saved_once
from command_line import snapshot
from conftest import SMALL, Export, save_model
from unets import unet2d

import edgediff
from edgediff.bundle.files import check_files
from edgediff.bundle.staging import clear_stale
from edgediff.config.floors import VerifyConfig
from edgediff_runtime import open_bundle

SOURCES = str(Path(edgediff.__file__).parent)
# Where the code is that writes; it is asked for what lies there at each of its lines.
WRITING = ("bundle", "export", "onnx/write_onnx", "onnx/pool_weights", "coreml/write_coreml")
# What takes long and is not asked inside: none of that code writes but the converter, at its end.
COMPUTING = {
    "onnx": ("edgediff.export.export_bundle.record", "edgediff.targets.onnx.write_onnx.run_passes"),
    "coreml": ("edgediff.export.export_bundle.record", "torch.export.export", "coremltools.convert"),
}


@pytest.fixture
def smallest_model() -> Path:
    """As few operations as a UNet has that can be cut."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    return saved_once("smallest", lambda path: save_model(unet2d(**SMALL | blocks), path))


@contextmanager
def moments(place: Path, kept: Path, computing: tuple[str, ...]) -> Iterator[None]:
    """Copies the place into numbered folders, whenever a line of the export finds it changed."""
    last: list[Any] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        where = frame.f_code.co_filename
        if not where.startswith(SOURCES) or not any(f"/{part}" in where for part in WRITING):
            return None
        now = [(path, path.lstat().st_size, path.lstat().st_ino) for path in sorted(place.rglob("*"))]
        if now != last:
            last[:] = now
            shutil.copytree(place, kept / f"{len(list(kept.iterdir())):03d}")
        return trace

    def untraced(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        sys.settrace(None)
        try:
            return call(*args, **named)
        finally:
            sys.settrace(trace)

    kept.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in computing:
            with warnings.catch_warnings():  # what coremltools imports warns of itself
                warnings.simplefilter("ignore")
                called = pkgutil.resolve_name(name)
            patch.setattr(name, functools.partial(untraced, called))
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)


@pytest.mark.long
@pytest.mark.parametrize(("target", "over_a_bundle"), [("onnx", True), ("coreml", False)])
def test_an_export_that_is_killed_at_any_moment_leaves_no_half_bundle_and_loses_none(
    target: Any,
    over_a_bundle: bool,
    smallest_model: Path,
    export_once: Export,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def recipe(steps: int) -> edgediff.ExportConfig:
        return edgediff.ExportConfig(targets=(target,), steps=steps, verify=VerifyConfig(mode="graphs"))

    (place / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    (place / ".out.edgediff-1").mkdir()  # left by an earlier export
    old = None
    if over_a_bundle:
        old = snapshot(shutil.copytree(export_once(smallest_model, recipe(2)), place / "out"))
    with moments(place, tmp_path / "moments", COMPUTING[target]):
        edgediff.export_bundle(edgediff.load_model(smallest_model), place / "out", recipe(3), force=True)
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "out", "tmp"]
    new = snapshot(place / "out")
    kept = sorted((tmp_path / "moments").iterdir())
    assert len(kept) > 5
    for moment in kept:
        out = moment / "out"
        if not out.exists():  # what was there is not lost: it lies aside until the next export puts it back
            assert old is None or list(moment.glob(".out.edgediff-*.old"))
        clear_stale(out)
        assert sorted(path.name for path in moment.iterdir()) == ["mine.txt", *["out"] * out.exists(), "tmp"]
        assert list((moment / "tmp").iterdir()) == []
        if out.exists():
            check_files(open_bundle(out))
        assert (snapshot(out) if out.exists() else None) in (old, new)
