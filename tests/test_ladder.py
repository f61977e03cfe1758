"""`edgediff inspect --ladder`: bundles of one model side by side."""

import json
from pathlib import Path

import pytest
from command_line import Command, assert_error
from conftest import Export

from edgediff.export.export_config import config_from

RECIPE = {"steps": 2, "adaptor": "identity"}


@pytest.fixture(scope="module")
def rungs(class_model: Path, export_once: Export) -> tuple[Path, Path]:
    """A bundle in fp32, and one whose weights are in int8."""
    int8 = RECIPE | {"onnx": {"weights": "int8"}, "verify": {"weights": {"int8": 20}}}
    return export_once(class_model, config_from(RECIPE)), export_once(class_model, config_from(int8))


@pytest.mark.long
def test_bundles_are_compared(command: Command, rungs: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "ladder.png"
    said = command("inspect", "--ladder", *rungs, "--picture", picture, "--json")
    assert said.code == 0, said
    plain, stored = json.loads(said.out)["rungs"]
    assert plain["stored"] == "fp32"
    assert stored["stored"].startswith("fp32: int8 0.")
    assert stored["nbytes"] < 0.7 * plain["nbytes"]
    assert plain["trajectory_db"] > stored["trajectory_db"] > 20
    assert min(plain["ms"], stored["ms"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = command("inspect", "--ladder", *rungs, "--picture", picture)
    assert "latents dB" in shown.out
    assert f"{stored['nbytes'] / 1e6:.2f}" in shown.out


@pytest.mark.long
def test_bundles_that_differ_are_refused(
    command: Command, rungs: tuple[Path, Path], class_model: Path, plain_model: Path, export_once: Export
) -> None:
    longer = export_once(class_model, config_from(RECIPE | {"steps": 3}))
    other = export_once(plain_model, config_from(RECIPE))
    assert_error(command("inspect", "--ladder", rungs[0], longer), "is for another clock, sampler or guidance than")
    assert_error(command("inspect", "--ladder", rungs[0], other), "a ladder is of one model")


def test_bad_requests_are_refused(command: Command, tmp_path: Path) -> None:
    assert_error(command("inspect", "--ladder"), "nothing to compare; expected one BUNDLE or more")
    assert_error(command("inspect", "a", "b"), "expected one MODEL or BUNDLE, got 2; --ladder compares bundles")
    assert_error(command("inspect", "--ladder", tmp_path), "manifest.json")
