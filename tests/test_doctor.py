import json
import platform
import re
from pathlib import Path

import onnxruntime as ort
import pytest

from edgediff import doctor
from edgediff.doctor import KNOWN_BAD, TESTED, TRAIN, WEB, _abilities, _numbers, examine, find_known_bad
from edgediff.targets import TARGETS
from edgediff_runtime.ort_bound_session import CUDA

NO_RUNTIME = "no: pip install edgediff (onnxruntime missing)"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def test_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    assert {name: pins.get(name) for name in TESTED} == TESTED
    assert {*TRAIN, *WEB} <= {*TESTED}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.13.0", (2, 13, 0)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("2.9.0a0+git1234", (2, 9, 0)),
        ("1.0rc1", (1, 0)),
        ("1.19rc1.post2", (1, 19)),
        ("0.5.3.dev1", (0, 5, 3)),
        ("2", (2,)),
        ("unknown", ()),
        ("²", ()),
        ("", ()),
    ],
)
def test_numbers_of_odd_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert _numbers(text) == numbers


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({"onnxruntime": "1.18.1", "numpy": "2.1.0"}, ["onnxruntime 1.18.1 with numpy 2.1.0", ">=1.19"]),
        ({"onnxscript": "0.5.2", "torch": "2.9.0+cpu"}, ["onnxscript 0.5.2 with torch 2.9.0+cpu", ">=0.6"]),
        ({"onnxscript": "0.4", "torch": "2.10rc1"}, ["onnxscript 0.4 with torch 2.10rc1", ">=0.6"]),
    ],
)
def test_known_bad_pairs_are_found(installed: dict[str, str | None], words: list[str]) -> None:
    (found,) = find_known_bad(installed)
    assert [word for word in words if word not in found] == [], found


@pytest.mark.parametrize(
    "installed",
    [
        {},
        dict(TESTED),
        dict.fromkeys(TESTED),
        {"onnxruntime": "1.18.1", "numpy": "1.26.4"},
        {"onnxruntime": "1.19.0", "numpy": "2.1.0"},
        {"onnxruntime": "1.19rc1", "numpy": "2.1.0"},
        {"onnxruntime": "1.18.1", "numpy": None},
        {"onnxruntime": None, "numpy": "2.1.0"},
        {"onnxscript": "0.6.0", "torch": "2.9.0"},
        {"onnxscript": "0.5.2", "torch": "2.8.0"},
    ],
)
def test_good_pairs_are_let_be(installed: dict[str, str | None]) -> None:
    assert find_known_bad(installed) == ()


def test_two_bad_pairs_are_both_said() -> None:
    installed = {"onnxruntime": "1.16", "numpy": "2.0", "onnxscript": "0.1", "torch": "3.0"}
    assert len(find_known_bad(installed)) == len(KNOWN_BAD) == 2


def test_the_examination_is_plain_data() -> None:
    found = examine()
    data = json.loads(json.dumps(found.to_dict()))
    assert data.keys() == {"machine", "versions", "abilities", "known_bad"}
    assert data["machine"].keys() == {"system", "processor", "cores", "python"}
    assert data["versions"].keys() == TESTED.keys()
    assert {name: pair["tested"] for name, pair in data["versions"].items()} == TESTED
    assert data["known_bad"] == list(found.known_bad) == []


def test_what_is_installed_here_can_export() -> None:
    abilities = examine().abilities
    assert abilities["export to ONNX"] == abilities["run and verify ONNX bundles"] == "yes"
    assert abilities["recompute trajectories in torch"] == "yes"


def test_what_is_missing_is_named() -> None:
    abilities = _abilities(TESTED | {"torch": None, "onnxsim": None})
    assert abilities["export to ONNX"] == 'no: pip install "edgediff[export]" (torch, onnxsim missing)'
    assert abilities["recompute trajectories in torch"] == 'no: pip install "edgediff[export]" (torch missing)'
    assert abilities["run and verify ONNX bundles"] == "yes"
    assert _abilities(dict.fromkeys(TESTED))["run and verify ONNX bundles"] == NO_RUNTIME


def test_every_target_and_backend_is_told_of() -> None:
    abilities = _abilities(TESTED)
    for target in TARGETS.values():
        assert f"export to {target.title}" in abilities
    assert len(abilities) == 4 + len(TARGETS) + sum(len(target.backends) for target in TARGETS.values())
    assert abilities["run ExecuTorch programs in executorch"] == "yes"
    missing = _abilities(TESTED | {"executorch": None, "coremltools": None})
    assert missing["export to ExecuTorch"] == 'no: pip install "edgediff[executorch]" (executorch missing)'
    assert missing["run ExecuTorch programs in executorch"] == missing["export to ExecuTorch"]
    assert missing["verify Core ML packages (mil-reference)"].endswith("(coremltools missing)")
    unserved = _abilities(TESTED | {"segno": None})["serve bundles to browsers"]
    assert unserved == 'no: pip install "edgediff[web]" (segno missing)'


def test_what_this_machine_lacks_besides_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, apple = "run ONNX graphs in onnxruntime-cuda", "run Core ML packages on Apple's runtime"
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    abilities = _abilities(TESTED)
    assert abilities[cuda] == "no: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    assert abilities[apple] == "no: it needs macOS"
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    abilities = _abilities(TESTED)
    assert (abilities[cuda], abilities[apple]) == ("yes", "yes")


def test_an_onnxruntime_built_for_a_gpu_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "_installed", there.get)
    assert examine().abilities["run and verify ONNX bundles"] == "yes"
    assert examine().versions["onnxruntime"]["installed"] == "1.31.1"
    there.clear()
    assert examine().abilities["run and verify ONNX bundles"] == NO_RUNTIME
