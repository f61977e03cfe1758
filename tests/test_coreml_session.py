"""Core ML's own session, with a stand-in for Apple's runtime: what it asks of it, and where it is not available."""

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from artefacts import saved_once
from command_line import Command, assert_error
from conftest import Export
from ml_packages import Opened, change_package
from seals import flip_bit, reseal, seal_plain
from tiny_pipelines import SAVE

import edgediff
from edgediff import verify_bundle
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import MissingExtraError
from edgediff.mil import evaluate
from edgediff.mil.coremltools_quiet import import_coremltools
from edgediff.mil.function import Function
from edgediff.mil.package import read_package
from edgediff.targets.backends import open_pipeline, open_session
from edgediff.verify import parity
from edgediff_runtime import Bundle, BundleError, EdgePipeline, RequestError, open_bundle


class Stand:
    """MLModel as a Mac has it, as far as a session uses it; the reference evaluator computes."""

    opened: ClassVar[list[tuple[str, Any, str | None]]] = []
    framework_error: ClassVar[Exception | None] = None

    def __init__(self, path: str, compute_units: Any, function_name: str | None = None) -> None:
        self.opened.append((Path(path).name, compute_units.name, function_name))
        self.path, self.function = path, function_name
        # What Core ML refuses, the real class says in a warning, and has no proxy then.
        self.__proxy__ = object() if self.framework_error is None else None
        self._framework_error = self.framework_error
        if self.framework_error is not None:
            warnings.warn(f"You will not be able to run predict() on this Core ML model: {self.framework_error}",
                          RuntimeWarning, stacklevel=1)  # fmt: skip

    def get_spec(self) -> Any:
        return read_package(self.path).spec

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert all(isinstance(value, np.ndarray) for value in inputs.values())
        # Core ML gives float32 for float16 where it likes: the session settles the dtype.
        made = evaluate(self.path, inputs, self.function)
        return {name: value.astype(np.float32) for name, value in made.items()}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    Stand.opened = []
    models = import_coremltools("tests").models  # before it takes this machine for a Mac
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(models, "MLModel", Stand)
    return Stand


def test_a_mac_makes_the_images_that_the_evaluator_makes(coreml_bundle: Path, mac: type[Stand]) -> None:
    pipe = EdgePipeline.from_pretrained(coreml_bundle, backend="coreml", compute_units="cpu_and_ne")
    assert mac.opened == [("Unet.mlpackage", "CPU_AND_NE", "full"), ("Unet.mlpackage", "CPU_AND_NE", "cached")]
    request = {"label": ["Apple", "Kiwi", "Orange"], "num_inference_steps": 3, "clock": 2, "seed": 5}
    opened = open_bundle(coreml_bundle)
    other = EdgePipeline(opened.manifest, open_session(opened, "mil-reference"))
    assert np.array_equal(pipe(**request).latents, other(**request).latents)
    # Guidance that ends on the way keeps the conditional half of a cache in the graph's own dtype.
    request |= {"guidance_scale": [2.0, 1.0, 1.0], "clock": "1,0,0"}
    assert psnr_db(other(**request).latents, pipe(**request).latents) > 60


@pytest.fixture(scope="module")
def pipeline_bundle(export_once: Export) -> Path:
    """A whole pipeline, exported before a test takes this machine for a Mac."""
    return export_once(saved_once("sd1", SAVE["sd1"]), edgediff.ExportConfig(targets=("coreml",), steps=4))


@pytest.mark.long
def test_a_mac_draws_a_prompt_as_the_evaluator_does(pipeline_bundle: Path, mac: type[Stand]) -> None:
    bundle = open_bundle(pipeline_bundle)
    request: dict[str, Any] = {"prompt": "a red dog", "clip_skip": 1, "num_inference_steps": 2, "seed": 5}
    got = EdgePipeline.from_pretrained(bundle.path, backend="coreml")(**request)
    want = open_pipeline(bundle, "mil-reference")(**request)
    # Not bit for bit: the evaluator hands on tensors in any memory layout, and torch adds them in another order.
    assert psnr_db(want.latents, got.latents) > 45
    assert psnr_db(want.pixels, got.pixels) > 45
    # Outputs under other names in the package, each function by its own.
    assert {(name, function) for name, _, function in mac.opened} == {
        ("Unet.mlpackage", "highres_in"), ("Unet.mlpackage", "lowres"), ("Unet.mlpackage", "highres_out"),
        ("TextEncoder.mlpackage", None), ("VAEDecoder.mlpackage", None),
    }  # fmt: skip


def test_a_mac_is_asked_by_verify_too(coreml_bundle: Path, mac: type[Stand]) -> None:
    report = verify_bundle(coreml_bundle, record=False)
    assert report.ok
    rows = {(row.check, row.part): row for row in report.rows if row.backend == "coreml"}
    assert {row.status for row in rows.values()} == {"measured"}
    assert rows.keys() >= {("graph", "full"), ("graph", "cached"), ("composed", "full"), ("trajectory", "latents")}


def test_elsewhere_it_is_not_run_and_never_passed(
    coreml_bundle: Path, command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    rows = [row for row in verify_bundle(coreml_bundle, record=False).rows if row.backend == "coreml"]
    assert len(rows) == 6
    assert {(row.status, row.ok, row.psnr_db) for row in rows} == {("not_run", None, None)}
    assert all("needs macOS" in row.note for row in rows)
    said = command("run", coreml_bundle, "-o", place / "out.png", "--backend", "coreml")
    assert_error(said, "backend 'coreml' needs macOS", "--backend mil-reference")


def test_no_backend_is_guessed(coreml_bundle: Path, mac: type[Stand], command: Command, place: Path) -> None:
    assert command("run", coreml_bundle, "-o", place / "out.png", "--num-images", "2").code == 0
    assert mac.opened[0][0] == "Unet.mlpackage"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "linux")
        said = command("run", coreml_bundle, "-o", place / "out.png")
    assert_error(said, "only Core ML packages, which do not run on this machine", "--backend mil-reference evaluates")


def test_compute_units_that_there_are_not(coreml_bundle: Path, command: Command, place: Path) -> None:
    said = command("run", coreml_bundle, "-o", place / "x.png", "--backend", "coreml", "--compute-units", "gpu")
    assert_error(said, "no compute units 'gpu'; choices: all, cpu_only, cpu_and_gpu, cpu_and_ne")
    said = command("run", coreml_bundle, "-o", place / "x.png", "--backend", "mil-reference", "--compute-units", "gpu")
    assert_error(said, "compute units 'gpu' are for backend 'coreml'", "'mil-reference'")


def test_a_mac_without_coremltools(coreml_bundle: Path, mac: type[Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(RequestError, match="needs coremltools, which is not installed; pip install coremltools"):
        EdgePipeline.from_pretrained(coreml_bundle, backend="coreml")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda made: {}, r"gave \{\}; the manifest says out_sample"),
        (lambda made: {name: value[:1] for name, value in made.items()}, r"gave .*; the manifest says out_sample"),
    ],
)
def test_predictions_that_are_not_what_the_manifest_says(
    coreml_bundle: Path, mac: type[Stand], monkeypatch: pytest.MonkeyPatch, wrong: Any, match: str
) -> None:
    predict = Stand.predict
    monkeypatch.setattr(Stand, "predict", lambda self, inputs: wrong(predict(self, inputs)))
    with pytest.raises(BundleError, match=match):
        EdgePipeline.from_pretrained(coreml_bundle, backend="coreml")(num_inference_steps=1, clock=1)


def test_what_apples_runtime_refuses_is_one_line(
    coreml_bundle: Path, mac: type[Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Error compiling model:\n  compiler error")

    pipe = EdgePipeline.from_pretrained(coreml_bundle, backend="coreml")
    monkeypatch.setattr(Stand, "predict", fails)
    with pytest.raises(BundleError, match="the prediction failed: Error compiling model: compiler error"):
        pipe(num_inference_steps=1, clock=1)
    monkeypatch.setattr(Stand, "__init__", fails)
    with pytest.raises(BundleError, match=r"Unet.mlpackage cannot be loaded: Error compiling model: compiler error"):
        EdgePipeline.from_pretrained(coreml_bundle, backend="coreml")


def test_a_mac_that_is_too_old_is_not_run(
    coreml_bundle: Path, mac: type[Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stand, "framework_error", RuntimeError("Unable to parse ML Program: needs macOS 15"))
    with pytest.raises(RequestError, match=r"Unet.mlpackage cannot be loaded by Core ML here: .* needs macOS 15"):
        EdgePipeline.from_pretrained(coreml_bundle, backend="coreml")
    report = verify_bundle(coreml_bundle, record=False)
    assert report.ok
    assert {row.status for row in report.rows if row.backend == "coreml"} == {"not_run"}


def test_a_package_that_describes_other_tensors_is_refused(
    coreml_bundle: Path, mac: type[Stand], tmp_path: Path
) -> None:
    def change(opened: Opened) -> None:
        opened.spec.description.functions[0].input[0].type.multiArrayType.shape[0] = 7

    bundle = shutil.copytree(coreml_bundle, tmp_path / "bundle")
    change_package(bundle / "coreml/Unet.mlpackage", change)
    reseal(bundle)
    for backend in ("coreml", "mil-reference"):
        with pytest.raises(BundleError, match=r"sample.*float32.*7, 3, 16, 16"):
            open_session(open_bundle(bundle), backend)


def test_the_evaluator_computes_with_the_threads_that_are_asked_for(
    coreml_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, before = open_bundle(coreml_bundle), torch.get_num_threads()
    run = Function.run
    seen = []

    def watched(self: Function, *args: Any, **settings: Any) -> Any:
        seen.append(torch.get_num_threads())
        return run(self, *args, **settings)

    monkeypatch.setattr(Function, "run", watched)
    for threads, used in ((before + 1, before + 1), (None, before)):
        EdgePipeline(bundle.manifest, open_session(bundle, "mil-reference", threads=threads))(num_images=1)
        assert {*seen} == {used}
        assert torch.get_num_threads() == before
        seen.clear()


@pytest.mark.parametrize("backend", ["mil-reference", "executorch", "onnxruntime"])
@pytest.mark.parametrize("threads", [0, -1, True])
def test_threads_are_a_number_above_0_in_every_backend(coreml_bundle: Path, backend: str, threads: int) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads}; expected a whole number above 0"):
        open_session(open_bundle(coreml_bundle), backend, threads=threads)


def test_an_accelerator_is_held_to_its_own_floors(coreml_bundle: Path, mac: type[Stand], tmp_path: Path) -> None:
    bundle = shutil.copytree(coreml_bundle, tmp_path / "bundle")
    seal_plain(
        bundle,
        lambda m: m["targets"][0]["components"]["unet"]["floors"].update(graph=60.0, composed=60.0, trajectory=50.0),
    )
    floors = {(row.backend, row.check): row.floor_db for row in verify_bundle(bundle).rows}
    assert (floors["mil-reference", "graph"], floors["coreml", "graph"]) == (60, 45)
    assert (floors["mil-reference", "trajectory"], floors["coreml", "trajectory"]) == (50, 35)


def test_without_torch_the_program_is_not_run(
    coreml_bundle: Path, mac: type[Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity.open_session

    def open_session(bundle: Bundle, backend: str) -> Any:
        if backend == "mil-reference":
            raise MissingExtraError("evaluating Core ML packages", "export")
        return real(bundle, backend)

    monkeypatch.setattr(parity, "open_session", open_session)
    rows = verify_bundle(coreml_bundle, record=False).rows
    assert {(row.part, row.status) for row in rows if row.check == "program"} == {
        ("full", "not_run"),
        ("cached", "not_run"),
    }


def test_a_damaged_package_never_reaches_the_runtime(coreml_bundle: Path, mac: type[Stand], tmp_path: Path) -> None:
    bundle = shutil.copytree(coreml_bundle, tmp_path / "bundle")
    flip_bit(bundle / "coreml/Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
    with pytest.raises(BundleError, match=r"weight.bin does not have the hash"):
        EdgePipeline.from_pretrained(bundle, backend="coreml")
    assert mac.opened == []
