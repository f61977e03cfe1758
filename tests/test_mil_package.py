"""Packages that are damaged, foreign, or contain what the evaluator does not know: each one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import Case, build, floats
from torch import Tensor
from torch.nn import functional as F

from edgediff.errors import ProgramError
from edgediff.mil import evaluate, open_program
from edgediff.mil.coremltools_quiet import import_coremltools

MODEL = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


def _conv(x: Tensor) -> Tensor:
    return F.conv2d(x, F.pad(x, (0, 0)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A program of one convolution and what it takes."""
    path = tmp_path_factory.mktemp("saved") / "conv.mlpackage"
    params = {"weight": floats(5, 3, 3, 3), "bias": floats(5), "pad_type": "valid"}
    case = Case("conv", {"x": floats(1, 3, 6, 6)}, _conv, params)
    return path, build([("y", case, "float16")], "iOS17", path)


@pytest.fixture
def package(saved: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> Path:
    return shutil.copytree(saved[0], tmp_path / "conv.mlpackage")


def refused(path: Path, feeds: dict[str, np.ndarray], fault: str, function: str | None = None) -> str:
    with pytest.raises(ProgramError, match=fault) as caught:
        evaluate(path, feeds, function)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(package: Path, edit: Callable[[Any], None]) -> None:
    """Edits the protobuf."""
    proto = import_coremltools("this test").proto.Model_pb2
    model = proto.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    edit(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def operation(model: Any, kind: str) -> Any:
    function = model.mlProgram.functions["main"]
    return next(op for op in function.block_specializations[function.opset].operations if op.type == kind)


def write_manifest(package: Path, content: object) -> None:
    (package / "Manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))


def _named(path: str) -> dict[str, Any]:
    return {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": path}}}


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, "is not there; expected an .mlpackage directory"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("x")), "is a file; expected an .mlpackage directory"),
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "is not an .mlpackage: it has no Manifest.json"),
    "manifest no JSON": (lambda p: write_manifest(p, "{"), "is not JSON"),
    "manifest no text": (lambda p: (p / "Manifest.json").write_bytes(b"\xff\xfe\xff"), "is not JSON"),
    "manifest a list": (lambda p: write_manifest(p, []), "names no root model"),
    "root not listed": (
        lambda p: write_manifest(p, {"rootModelIdentifier": "a", "itemInfoEntries": {}}),
        "no root model",
    ),
    "root a number": (
        lambda p: write_manifest(p, {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 3}}}),
        "no root",
    ),
    "root missing": (lambda p: write_manifest(p, _named("gone.mlmodel")), "the root model gone.mlmodel is missing"),
    "root outside": (lambda p: write_manifest(p, _named("../../other")), "'../../other' leads out of the package"),
    "root absolute": (lambda p: write_manifest(p, _named("/etc/hostname")), "leads out of the package"),
    "root a symlink": (
        lambda p: ((p / MODEL).rename(p.parent / "m"), (p / MODEL).symlink_to(p.parent / "m")),
        "model.mlmodel is a symlink; expected the file itself",
    ),
    "folder a symlink": (
        lambda p: ((p / "Data").rename(p.parent / "d"), (p / "Data").symlink_to(p.parent / "d")),
        "Data is a symlink",
    ),
    "no protobuf": (lambda p: (p / MODEL).write_bytes(b"\xff" * 40), "it is not a protobuf"),
    "empty": (lambda p: (p / MODEL).write_bytes(b""), "is empty: it contains no model; expected an ML Program"),
    "weights missing": (lambda p: (p / WEIGHTS).unlink(), "the weights file is missing"),
    "weights cut off": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:200]),
        "is cut off at 200 bytes",
    ),
    "weights short": (lambda p: (p / WEIGHTS).write_bytes(b""), "0 bytes are not a weights file"),
    "weights a symlink": (
        lambda p: ((p / WEIGHTS).rename(p.parent / "w"), (p / WEIGHTS).symlink_to(p.parent / "w")),
        "weight.bin is a symlink",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_package_is_refused(name: str, package: Path, saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    damage, fault = FILES[name]
    damage(package)
    assert str(package) in refused(package, saved[1], fault)


def _blob(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    ops = function.block_specializations[function.opset].operations
    return next(op.attributes["val"] for op in ops if op.attributes["val"].WhichOneof("value") == "blobFileValue")


def _swap(op: Any, key: str, name: str) -> None:
    op.inputs[key].arguments[0].name = name


PROTOS: dict[str, tuple[Callable[[Any], object], str]] = {
    "another kind": (lambda m: m.neuralNetwork.SetInParent(), "is a neural network; expected an ML Program"),
    "a newer version": (
        lambda m: setattr(m, "specificationVersion", 99),
        r"has specification version 99; coremltools .* knows those up to \d+: install a newer coremltools",
    ),
    "an unknown op": (
        lambda m: setattr(operation(m, "conv"), "type", "frobnicate"),
        "main: frobnicate conv_0: this op is not known to the evaluator",
    ),
    "an unknown input": (
        lambda m: operation(m, "conv").inputs["bogus"].CopyFrom(operation(m, "conv").inputs["x"]),
        "conv conv_0: input bogus is not known to the evaluator; choices: x, weight",
    ),
    "a missing input": (lambda m: operation(m, "conv").inputs.pop("weight"), "conv conv_0: input weight is missing"),
    "an unknown dtype": (
        lambda m: setattr(operation(m, "conv").outputs[0].type.tensorType, "dataType", 13),
        "conv conv_0: dtype bfloat16 is not known to the evaluator; choices: float16, float32",
    ),
    "a dtype of the future": (
        lambda m: setattr(operation(m, "conv").outputs[0].type.tensorType, "dataType", 99),
        "conv conv_0: dtype number 99 is not known to the installed coremltools",
    ),
    "a state": (
        lambda m: m.mlProgram.functions["main"].inputs[0].type.stateType.SetInParent(),
        "input y_in0: a state, no tensor",
    ),
    "an undefined name": (
        lambda m: _swap(operation(m, "conv"), "x", "nobody"),
        "conv conv_0: no earlier operation computes nobody, its input x",
    ),
    "an undefined output": (
        lambda m: m.mlProgram.functions["main"].block_specializations["CoreML7"].outputs.append("nobody"),
        "no operation computes the output nobody",
    ),
    "another opset": (
        lambda m: setattr(m.mlProgram.functions["main"], "opset", "CoreML1"),
        "blocks for the opsets CoreML7; expected one",
    ),
    "another shape": (
        lambda m: setattr(operation(m, "conv").outputs[0].type.tensorType.dimensions[1].constant, "size", 6),
        r"conv_0 has shape \[1, 5, 4, 4\]; declared is \[1, 6, 4, 4\]",
    ),
    "a blob beyond the end": (
        lambda m: setattr(_blob(m).blobFileValue, "offset", 10**12),
        "the blob at 1000000000000 is out of the file's",
    ),
    "a blob that is none": (lambda m: setattr(_blob(m).blobFileValue, "offset", 128), "expected the sentinel"),
    "a blob of another dtype": (
        lambda m: setattr(_blob(m).type.tensorType, "dataType", 11),
        "the program says float32",
    ),
    "a blob of another size": (
        lambda m: setattr(_blob(m).type.tensorType.dimensions[0].constant, "size", 7),
        "has 270 bytes; 189 elements of float16 take 378",
    ),
    "weights outside": (
        lambda m: setattr(_blob(m).blobFileValue, "fileName", "@model_path/../../../other"),
        "leads out of the package",
    ),
    "weights elsewhere": (
        lambda m: setattr(_blob(m).blobFileValue, "fileName", "/etc/passwd"),
        "are not in the package",
    ),
}


@pytest.mark.parametrize("name", PROTOS)
def test_foreign_program_is_refused(name: str, package: Path, saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    edit, fault = PROTOS[name]
    change(package, edit)
    assert str(package) in refused(package, saved[1], fault)


def test_inputs_that_do_not_fit_are_refused(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, feeds = saved
    refused(path, {}, "main takes y_in0; got none")
    refused(path, {**feeds, "other": feeds["y_in0"]}, "main takes y_in0; got y_in0, other")
    refused(path, {"y_in0": feeds["y_in0"][:, :2]}, r"input y_in0 has shape \[1, 2, 6, 6\]; expected \[1, 3, 6, 6\]")
    refused(path, {"y_in0": np.full((1, 3, 6, 6), "a")}, "input y_in0 is an array of <U1; expected float16")
    refused(path, feeds, "has no function 'other'; choices: main", function="other")


def test_inputs_are_cast_and_left_alone(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, _ = saved
    whole = np.arange(108).reshape(1, 3, 6, 6) % 7
    expected = evaluate(path, {"y_in0": whole.astype(np.float16)})["y_0"]
    assert expected.dtype == np.float16
    frozen = whole.astype(np.float64)
    frozen.setflags(write=False)
    backwards = np.ascontiguousarray(whole[..., ::-1])[..., ::-1]
    for given in (whole, frozen, backwards, whole.astype(">f4"), whole.astype(np.float32)):
        np.testing.assert_array_equal(evaluate(path, {"y_in0": given})["y_0"], expected)


def test_negative_index_is_refused_where_it_is_undefined(tmp_path: Path) -> None:
    case = Case("gather", {"x": floats(4, 5), "indices": np.array([1, -1], dtype=np.int32)}, lambda x, i: x[i])
    for opset, fault in (("iOS16", None), ("iOS17", "index -1 is negative, which is undefined from iOS 17 on")):
        path = tmp_path / f"{opset}.mlpackage"
        feeds = build([("y", case, "float32")], opset, path)
        if fault is None:
            np.testing.assert_array_equal(evaluate(path, feeds)["y_0"], case.given["x"][[1, -1]])
        else:
            refused(path, feeds, fault)
        refused(path, {**feeds, "y_in1": np.array([1, 4])}, "gather gather_0: index 4 is out of bounds for 4 elements")


def test_opening_says_what_there_is(
    saved: tuple[Path, dict[str, np.ndarray]], capfd: pytest.CaptureFixture[str]
) -> None:
    program = open_program(str(saved[0]))
    assert (program.functions, program.default, program.specification_version) == (("main",), "main", 8)
    function = program.function()
    assert function is program.function("main")
    assert {name: (spec.dtype, spec.shape) for name, spec in function.inputs.items()} == {
        "y_in0": ("float16", (1, 3, 6, 6))
    }
    assert function.outputs["y_0"].shape == (1, 5, 4, 4)
    assert capfd.readouterr() == ("", "")
