import json
import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.rows import ParityReport, Row
from edgediff.errors import ModelError
from edgediff.verify import source
from edgediff_runtime import open_bundle
from edgediff_runtime.manifest import Source


def test_psnr_is_the_formula() -> None:
    reference = np.array([0.0, 3.0, -4.0])
    value = reference + np.array([0.1, -0.1, 0.1])
    want = 20 * math.log10((4 + 1e-5) / (0.1 + 1e-10))
    assert psnr_db(reference, value) == pytest.approx(want, abs=1e-9)


def test_psnr_of_what_cannot_be_compared_is_minus_infinity() -> None:
    reference = np.zeros((2, 3))
    assert psnr_db(reference, np.zeros((3, 2))) == -math.inf
    assert psnr_db(reference, np.full((2, 3), np.nan)) == -math.inf
    assert psnr_db(reference, np.full((2, 3), np.inf)) == -math.inf


def test_every_number_of_a_fresh_bundle(class_bundle: Path) -> None:
    report = edgediff.verify_bundle(class_bundle)
    assert report.ok
    rows = {(row.check, row.part): row for row in report.rows}
    assert set(rows) == {
        ("graph", "highres_in"), ("graph", "lowres"), ("graph", "highres_out"), ("graph", "undivided"),
        ("composed", "full"), ("composed", "cached"), ("trajectory", "latents"), ("caching", "latents"),
    }  # fmt: skip
    for key, row in rows.items():
        assert row.status == "measured"
        assert row.psnr_db is not None
        if key[0] in ("graph", "composed"):
            assert row.psnr_db >= 100
        if key[0] == "trajectory":
            assert row.psnr_db >= 80
            assert row.note == "against torch, computed again"
    caching = rows[("caching", "latents")]
    assert caching.floor_db is None
    assert caching.ok is None


def test_the_report_is_written_and_is_the_design_s_json(class_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(class_bundle, bundle)
    (bundle / "evidence" / "parity.json").unlink()
    report = edgediff.verify_bundle(bundle)
    written = json.loads((bundle / "evidence" / "parity.json").read_text())
    assert written["ok"] is True
    assert written["rows"] == report.to_dict()["rows"]
    keys = {"check", "part", "backend", "output", "psnr_db", "floor_db", "ok", "status"}
    assert all(keys <= row.keys() for row in written["rows"])
    assert written["machine"]["cpus"] >= 1


def test_without_the_source_the_evidence_is_the_reference(class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **settings: object) -> None:
        raise ModelError("no such directory")

    monkeypatch.setattr("edgediff.models.load.load_model", gone)
    report = edgediff.verify_bundle(class_bundle, record=False)
    row = next(row for row in report.rows if row.check == "trajectory")
    assert report.ok
    assert row.status == "measured"
    assert row.note == "against the evidence's latents: the source is not available"


def test_a_source_that_cannot_be_read_is_not_at_hand(class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edgediff.models.load.load_model", forbidden)
    assert edgediff.verify_bundle(class_bundle, record=False).ok


def test_a_named_model_must_be_the_source(class_bundle: Path, text_model: Path, class_model: Path) -> None:
    with pytest.raises(ModelError, match="is not the bundle's source"):
        edgediff.verify_bundle(class_bundle, str(text_model), record=False)
    report = edgediff.verify_bundle(class_bundle, str(class_model), record=False)
    assert report.ok


def test_a_source_that_has_changed_is_said(class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_bundle(class_bundle).manifest
    other = edgediff.load_model("grocery-32")
    monkeypatch.setattr("edgediff.models.load.load_model", lambda *args, **settings: other)
    latents, note = source.torch_latents(manifest, {}, None)
    assert latents is None
    assert note.endswith("the source has changed")


def test_a_built_in_source_is_not_looked_for_in_the_working_directory(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgediff.load_model("grocery-32")
    built_in = Source(name=model.name, path=None, sha256=model.sha256)
    manifest = msgspec.structs.replace(open_bundle(class_bundle).manifest, source=built_in)
    (tmp_path / model.name).mkdir()
    monkeypatch.chdir(tmp_path)
    found, why = source.open_source(manifest)
    assert found is not None, why
    assert found[0].sha256 == model.sha256


def _row(check: str, ok: bool | None, status: str = "measured", target: str = "onnx") -> Row:
    return Row(check, "full", "somewhere", "out_sample", 120.0, 35.0, ok, status, target=target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "ok"),
    [
        ([("graph", True), ("composed", True)], True),
        ([("graph", True), ("composed", True), ("caching", None)], True),
        ([("graph", True), ("composed", False)], False),
        ([("graph", True), ("composed", True), ("caching", False)], False),
        ([("graph", True)], False),
        ([], False),
    ],
)
def test_the_verdict(rows: list[tuple[str, bool | None]], ok: bool) -> None:
    assert ParityReport(tuple(_row(*row) for row in rows), "graphs", ("onnx",)).ok is ok


def test_a_failure_names_the_worst_number() -> None:
    low = msgspec.structs.replace(_row("composed", False), psnr_db=20.0)
    infinite = msgspec.structs.replace(_row("caching", False), psnr_db=None, floor_db=None)
    assert ParityReport((_row("graph", True), low), "graphs", ("onnx",)).failure == (
        "1 of 2 numbers are below their floor, the worst: composed full (out_sample, somewhere) is 20.0 dB, "
        "expected 35.0 dB"
    )
    worst = ParityReport((low, infinite), "graphs", ("onnx",)).failure
    assert worst.endswith("the worst: caching full (out_sample, somewhere) is not finite, expected a finite number")


def test_a_full_bundle_whose_trajectory_was_not_measured_fails() -> None:
    rows = (_row("graph", True), _row("composed", True), _row("trajectory", None, "not_run"))
    report = ParityReport(rows, "full", ("onnx",))
    assert not report.ok
    assert report.failure == "not measured: onnx trajectory; install the backend that the report names"
    assert ParityReport(rows, "graphs", ("onnx",)).ok


def test_every_target_must_have_been_measured() -> None:
    rows = (_row("graph", True), _row("composed", True), _row("graph", None, "not_run", "coreml"))
    assert not ParityReport(rows, "graphs", ("onnx", "coreml")).ok
    assert not ParityReport(rows, "graphs", ()).ok
    more = (*rows, _row("graph", True, target="coreml"), _row("composed", True, target="coreml"))
    assert ParityReport(more, "graphs", ("onnx", "coreml")).ok
