import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import Command, assert_error
from safetensors.numpy import load_file
from seals import REFERENCE, manifest_of, seal
from traces import remembering

import edgediff
from edgediff.config.floors import VerifyConfig
from edgediff.errors import ConfigError
from edgediff.export.export_config import check_config
from edgediff.inspect.survey import survey_bundle
from edgediff.targets.coreml import CoreMLConfig
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import AutoClock, EdgePipeline, EdgeRuntimeError, Manifest
from edgediff_runtime.manifest_json import check_manifest

CONFIG = edgediff.ExportConfig(steps=7, clock="auto:0.2")
MASK = (1, 0, 0, 1, 0, 0, 1)


@pytest.fixture(scope="module")
def auto_bundle(class_model: Path, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "auto"
    with remembering(traces):
        done = edgediff.export_bundle(edgediff.load_model(class_model), path, CONFIG)
    assert done.report is not None
    assert done.report.ok
    return path


def test_the_manifest_has_the_clock_and_what_it_did(auto_bundle: Path) -> None:
    point = manifest_of(auto_bundle).operating_point
    assert (point.clock, point.mask) == ("auto:0.2", MASK)
    assert EdgePipeline.from_pretrained(auto_bundle)(num_images=2).mask == MASK
    found = {tuple(key.split("/")[1:3]) for key in load_file(auto_bundle / REFERENCE) if key.startswith("steps/")}
    assert found == {("0", "full"), ("1", "cached"), ("6", "full")}


def test_verification_compares_along_the_reference_s_steps(auto_bundle: Path) -> None:
    report = edgediff.verify_bundle(auto_bundle, record=False)
    assert report.ok
    rows = {row.check: row for row in report.rows}
    assert rows["trajectory"].note == "against torch, computed anew; clock auto:0.2 decides on the same steps here"
    assert rows["trajectory"].psnr_db is not None
    assert rows["trajectory"].psnr_db > 80
    assert rows["caching"].note == "clock auto:0.2 FccFccF against clock 1"
    assert rows["caching"].status == "measured"


def test_a_backend_that_decides_otherwise_is_said_and_compared_all_the_same(auto_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(auto_bundle, tmp_path / "bundle")
    # As if torch's features had come out just above, and this backend's just below.
    seal(bundle, _with(manifest_of(bundle), clock="auto:9"))
    report = edgediff.verify_bundle(bundle, record=False)
    assert report.ok
    row = next(row for row in report.rows if row.check == "trajectory")
    assert row.note.endswith("; clock auto:9 decides on other steps here: FcccFcc, in torch FccFccF")
    assert row.psnr_db is not None
    assert row.psnr_db > 80


def test_the_same_export_is_known_again(auto_bundle: Path, class_model: Path) -> None:
    model = edgediff.load_model(class_model)
    assert edgediff.export_bundle(model, auto_bundle, CONFIG).report is None
    with pytest.raises(edgediff.EdgediffError, match="holds another bundle"):
        edgediff.export_bundle(model, auto_bundle, msgspec.structs.replace(CONFIG, clock="auto:0.3"))


def test_other_steps_than_the_bundle_s_simply_work(auto_bundle: Path) -> None:
    pipe = EdgePipeline.from_pretrained(auto_bundle)
    assert [len(pipe(num_inference_steps=steps).mask) for steps in (1, 3, 12)] == [1, 3, 12]
    assert pipe(clock=AutoClock(9.0, 2)).mask == (1, 0, 0, 1, 0, 0, 1)
    assert pipe(clock=3).mask == (1, 0, 0, 1, 0, 0, 1)


@pytest.mark.usefixtures("traced_once")
def test_an_auto_clock_that_never_caches_is_a_clock_without_cached_steps(class_model: Path, tmp_path: Path) -> None:
    config = edgediff.ExportConfig(steps=2, clock="auto:0.00001", onnx=OnnxConfig(simplify=False))
    done = edgediff.export_bundle(edgediff.load_model(class_model), tmp_path / "bundle", config)
    assert done.report is not None
    rows = {(row.check, row.part): row for row in done.report.rows}
    assert rows["caching", "latents"].status == "not_run"
    assert rows["caching", "latents"].note == "the clock has no cached step"
    assert ("composed", "cached") not in rows
    assert survey_bundle(tmp_path / "bundle", None, None, None).mask == (True, True)


# The command line


def test_run_shows_how_far_the_feature_moved(auto_bundle: Path, tmp_path: Path, command: Command) -> None:
    args = ("run", auto_bundle, "-o", tmp_path / "x.npy", "--num-images", 2)
    said = command(*args, "--json")
    assert said.errors == []
    shown = json.loads(said.out)
    assert shown["mask"] == list(MASK)
    assert shown["ledger"][0]["moved"] is None
    assert all(0 < step["moved"] < 1 for step in shown["ledger"][1:])
    assert [step["moved"] > 0.2 for step in shown["ledger"][1:]] == [bool(full) for full in MASK[1:]]
    assert "moved" in command(*args).out
    table = command(*args, "--clock", 2)
    assert "moved" not in table.out
    assert command(*args, "--clock", "auto:9:1", "--steps", 4).code == 0


def test_run_refuses_auto_clocks_that_are_none(auto_bundle: Path, tmp_path: Path, command: Command) -> None:
    said = command("run", auto_bundle, "-o", tmp_path / "x.npy", "--clock", "auto:0.1:0")
    assert_error(said, "clock is 'auto:0.1:0'; expected auto:TOL or auto:TOL:BOUND")


def test_inspect_shows_what_the_reference_did(auto_bundle: Path, command: Command) -> None:
    for args in ((), ("--clock", "auto:0.2"), ("--steps", 7), ("--clock", "auto:0.20:3")):
        schedule = json.loads(command("inspect", auto_bundle, *args, "--json").out)["schedule"]
        assert schedule["mask"] == list(MASK)
        assert schedule["tflops"] < schedule["tflops_clock1"]
    assert "clock auto:0.2 (FccFccF)" in command("inspect", auto_bundle).out
    assert json.loads(command("inspect", auto_bundle, "--clock", 2, "--json").out)["schedule"]["mask"][:3] == [1, 0, 1]


def test_inspect_refuses_what_only_running_tells(auto_bundle: Path, class_model: Path, command: Command) -> None:
    said = command("inspect", auto_bundle, "--steps", 9)
    assert_error(said, "clock auto:0.2 decides as it runs, and was run over 7 steps, not 9")
    for what in (auto_bundle, class_model):
        said = command("inspect", what, "--clock", "auto:0.3")
        assert_error(said, "clock is 'auto:0.3', which decides as it runs", "auto:TOL is for export and run")


# Recipes


@pytest.mark.parametrize("clock", ["auto:0.2", " auto:0.2:5", AutoClock(0.2)])
def test_recipes_take_an_auto_clock(clock: Any) -> None:
    config = check_config(edgediff.ExportConfig(clock=clock))
    assert config.clock == str(clock)
    assert check_config(config) == config


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"clock": "auto"}, "clock is 'auto'; expected auto:TOL"),
        ({"clock": "auto:0.1:0"}, "clock is 'auto:0.1:0'; expected auto:TOL"),
        ({"layout": "pair"}, "clock auto:0.2 decides after highres_in has run, layout pair before; expected"),
        ({"onnx": OnnxConfig(layout="pair")}, "layout pair before"),
        ({"targets": ("onnx", "coreml"), "coreml": CoreMLConfig(layout="pair")}, "layout pair before"),
        ({"verify": VerifyConfig(mode="graphs")}, "clock auto:0.2 decides as it runs, and --verify graphs runs no tra"),
    ],
)
def test_recipes_that_an_auto_clock_does_not_go_with(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_config(edgediff.ExportConfig(**{"clock": "auto:0.2", **values}))


# What the manifest may say


def _with(manifest: Manifest, **values: Any) -> Manifest:
    return msgspec.structs.replace(
        manifest, operating_point=msgspec.structs.replace(manifest.operating_point, **values)
    )


def _without_a_head(manifest: Manifest) -> Manifest:
    target = manifest.targets[0]
    kinds = ("full_step", "cached_step")
    graphs = tuple(msgspec.structs.replace(target.graphs[0], name=k, frequency=k) for k in kinds)
    target = msgspec.structs.replace(target, graphs=(*graphs, *target.graphs[1:]), layout="pair")
    cost = manifest.cost | dict.fromkeys(kinds, manifest.cost["highres_in"])
    return msgspec.structs.replace(manifest, targets=(target,), cost=cost)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: _with(m, clock="auto"), "expected auto:TOL"),
        (lambda m: _with(m, mask=()), r"operating_point.mask is \(\); expected clock auto:0.2 spelt out"),
        (lambda m: _with(m, mask=MASK[:-1]), "operating_point.mask"),
        (lambda m: _with(m, mask=(0, *MASK[1:])), "operating_point.mask"),
        (lambda m: _with(m, mask=(1, 0, 0, 0, 0, 1, 0)), "operating_point.mask"),
        (lambda m: _with(m, mask=(1, 1, 1, 1, 0, 0, 2)), "operating_point.mask"),
        (lambda m: _with(m, clock="auto:0.2:1"), "operating_point.mask"),
        (
            lambda m: msgspec.structs.replace(m, verified="graphs"),
            "verified is 'graphs'; expected full with clock auto",
        ),
        (_without_a_head, "operating_point.clock is 'auto:0.2'; expected a period or a mask with layout pair"),
    ],
)
def test_manifests_that_an_auto_clock_cannot_have(
    auto_bundle: Path, change: Callable[[Manifest], Manifest], match: str
) -> None:
    manifest = manifest_of(auto_bundle)
    check_manifest(manifest)
    with pytest.raises(EdgeRuntimeError, match=match):
        check_manifest(change(manifest))


@pytest.mark.parametrize("mask", [(1, 0, 0, 0, 1, 0, 0), (1, 1, 1, 1, 1, 1, 1)])
def test_manifests_that_an_auto_clock_can_have(auto_bundle: Path, mask: tuple[int, ...]) -> None:
    check_manifest(_with(manifest_of(auto_bundle), mask=mask))
