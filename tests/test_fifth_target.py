"""A fifth target is a folder and one line: it exports, verifies, runs, and is told of, with no other file changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgediff
from edgediff_runtime import BundleError, open_bundle

ROOT = Path(edgediff.__file__).parents[1]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package by symlinks, with one file changed, the table of targets, and one folder more."""
    root = tmp_path_factory.mktemp("overlay")
    targets = root / "edgediff" / "targets"
    targets.mkdir(parents=True)
    for file in (ROOT / "edgediff").iterdir():
        if file.name not in ("targets", "__pycache__"):
            (root / "edgediff" / file.name).symlink_to(file)
    (root / "export_configs").symlink_to(ROOT / "export_configs")
    for file in (ROOT / "edgediff" / "targets").iterdir():
        if file.name not in ("__init__.py", "__pycache__"):
            (targets / file.name).symlink_to(file)
    (targets / "toy").symlink_to(HERE / "fifth_target")
    table = (ROOT / "edgediff" / "targets" / "__init__.py").read_text()
    changed = table.replace('"litert")', '"litert", "toy")')
    assert changed != table
    (targets / "__init__.py").write_text(changed)
    return root


# Runs commands one after the other in a process that knows the fifth target: torch is imported once.
RUN = """
import contextlib, io, json, sys
from edgediff.cli import main

said = []
for args in json.load(sys.stdin):
    sys.argv = ["edgediff", *args]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as e:
            assert e.code == 0, (args, e.code)
    said.append(out.getvalue())
json.dump(said, sys.stdout)
"""


@pytest.mark.long
def test_a_fifth_target(overlay: Path, plain_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {plain_model}\ntargets: [onnx, toy]\nsteps: 4\ntoy: {{batch: 2}}\n")
    commands = [
        ["export", "--config", "recipe.yaml", "-o", "bundle", "--json"],
        ["verify", "bundle", "--target", "toy", "--json"],
        ["run", "bundle", "-o", "toy.png", "--num-images", "2", "--backend", "toy-torch"],
        ["inspect", "bundle", "--json"],
        ["doctor", "--json"],
        ["export", "--help"],
        ["export", str(plain_model), "-o", "alone", "--target", "toy", "--steps", "4"],
    ]
    path = os.pathsep.join([str(overlay), str(ROOT / "runtime")])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(commands),
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    exported, verified, _, inspected, doctor, helped, _ = json.loads(done.stdout)
    rows = [row for row in json.loads(exported)["rows"] if row["target"] == "toy"]
    assert {row["check"] for row in rows} == {"graph", "composed", "trajectory", "caching"}
    assert all(row["ok"] for row in rows if row["floor_db"] is not None)
    assert json.loads(verified)["ok"]
    assert (tmp_path / "toy.png").read_bytes()[1:4] == b"PNG"
    assert "toy fp32, pair" in json.loads(inspected)["facts"]["targets"]
    assert "--backend toy-torch" in (tmp_path / "bundle" / "README.md").read_text()
    abilities = json.loads(doctor)["abilities"]
    assert (abilities["export to Toy"], abilities["run toy programs in toy-torch"]) == ("yes", "yes")
    assert "toy" in helped
    # Who does not know the target runs the others.
    assert [target.target for target in open_bundle(tmp_path / "bundle").manifest.targets] == ["onnx"]
    with pytest.raises(BundleError, match="one at least that this runtime knows"):
        open_bundle(tmp_path / "alone")
