import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from seals import REFERENCE, assert_refused, reseal

from edgediff import verify_bundle
from edgediff_runtime.bundle import PARITY


def _put(bundle: Path, flat: dict[str, np.ndarray]) -> None:
    save_file(flat, bundle / REFERENCE)
    reseal(bundle)


def _change(bundle: Path, key: str, value: np.ndarray) -> None:
    _put(bundle, load_file(bundle / REFERENCE) | {key: value})


def test_evidence_without_any_one_of_its_tensors_is_refused(bundle: Path) -> None:
    flat = load_file(bundle / REFERENCE)
    assert len(flat) > 10
    for key in flat:
        _put(bundle, {name: value for name, value in flat.items() if name != key})
        assert_refused(bundle, f"{REFERENCE} has no {key.rpartition('/')[2]}", run=False)


@pytest.mark.parametrize("kept", ["", "latents", "steps/0/full/", "steps/1/cached/"])
def test_evidence_without_its_steps_is_refused(bundle: Path, kept: str) -> None:
    flat = load_file(bundle / REFERENCE)
    _put(bundle, {name: value for name, value in flat.items() if kept and name.startswith(kept)})
    assert_refused(bundle, f"{REFERENCE} holds the steps .*; the manifest asks for 0", run=False)


@pytest.mark.parametrize("key", ["more", "steps/x/full/sample", "steps/0/half/sample", "steps/0/full", "a/b/c/d/e"])
def test_evidence_with_foreign_keys_is_refused(bundle: Path, key: str) -> None:
    _change(bundle, key, np.zeros(1, np.float32))
    assert_refused(bundle, f"holds '{key}', which no reference has; export again", run=False)


@pytest.mark.parametrize(
    "value",
    [np.zeros(3, np.float32), np.zeros((0, 3, 16, 16), np.float32), np.zeros((4, 3, 16, 16)), np.float32(1),
     np.full((4, 3, 16, 16), np.nan, np.float32), np.full((4, 3, 16, 16), np.inf, np.float32)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["steps/0/full/sample", "steps/1/cached/out_sample"])
def test_evidence_of_another_kind_is_refused(bundle: Path, key: str, value: np.ndarray) -> None:
    _change(bundle, key, np.asarray(value))
    assert_refused(bundle, f"{REFERENCE}: ", run=False)


@pytest.mark.parametrize(
    "key", ["latents", "steps/0/full/out_sample", "steps/1/cached/lowres_feature", "steps/3/cached/sample"]
)
def test_evidence_of_other_numbers_does_not_hold(bundle: Path, key: str) -> None:
    _change(bundle, key, load_file(bundle / REFERENCE)[key] * np.float32(1.2) + np.float32(0.1))
    assert not verify_bundle(bundle).ok


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_evidence_that_is_no_evidence_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / REFERENCE).write_bytes(data)
    reseal(bundle)
    assert_refused(bundle, f"{REFERENCE} (cannot be read|holds the steps none)", run=False)


@pytest.mark.parametrize("data", [None, b"garbage"])
def test_the_last_report_is_not_relied_on_and_is_replaced(bundle: Path, data: bytes | None) -> None:
    if data is None:
        (bundle / PARITY).unlink()
    else:
        (bundle / PARITY).write_bytes(data)
    report = verify_bundle(bundle)
    written = json.loads((bundle / PARITY).read_text())
    assert written["ok"] is report.ok is True
    assert written["rows"] == report.to_dict()["rows"]


def test_a_bundle_on_read_only_media_is_verified_all_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    before = (bundle / PARITY).read_bytes()
    monkeypatch.setattr(os, "replace", read_only)
    assert verify_bundle(bundle).ok
    assert (bundle / PARITY).read_bytes() == before
    assert sorted(file.name for file in (bundle / "evidence").iterdir()) == ["parity.json", "reference.safetensors"]


def test_what_a_killed_verification_left_is_no_obstacle(bundle: Path) -> None:
    (bundle / "evidence" / ".parity.json.new").write_text("half")
    assert verify_bundle(bundle).ok
    assert not (bundle / "evidence" / ".parity.json.new").exists()
