import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learned
import msgspec
import pytest
from command_line import Command
from seals import manifest_of, seal

import edgediff
from edgediff.export.draft import draft_manifest
from edgediff.export.export_bundle import _warn_of_adaptor
from edgediff.models.graphs import graph_list
from edgediff.models.torch_session import TorchSession
from edgediff_runtime import EdgePipeline, Manifest, OperatingPointWarning
from edgediff_runtime.errors import BundleError, warnings_told
from edgediff_runtime.manifest import Adaptor, TrainedFor
from edgediff_runtime.manifest_json import check_manifest

TRAINED = TrainedFor(
    num_inference_steps=4, scheduler="dpmpp_2m", clock=2, mask=(1, 0, 1, 0), guidance_scale=2.0
)  # fmt: skip
ADAPTOR = Adaptor(kind="resnet", name="tiny-resnet", path="x", sha256="0" * 64, trained_for=TRAINED)


def trained(manifest: Manifest, **values: Any) -> Manifest:
    """The manifest as if its adaptor had been trained."""
    adaptor = msgspec.structs.replace(ADAPTOR, trained_for=msgspec.structs.replace(TRAINED, **values))
    targets = tuple(
        target.with_unet(graphs=tuple(
            msgspec.structs.replace(g, file="adaptor.onnx") if g.name == "adaptor" and g.file is None else g
            for g in target.unet.graphs
        ))
        for target in manifest.targets
    )  # fmt: skip
    return msgspec.structs.replace(manifest, adaptor=adaptor, targets=targets)


@pytest.fixture(scope="module")
def identity(class_model: Path) -> EdgePipeline:
    model = edgediff.load_model(class_model)
    split = edgediff.split(model.unet)
    manifest = draft_manifest(model, split, edgediff.ExportConfig(steps=4, scheduler="dpmpp_2m"), "labels", {})
    return EdgePipeline(manifest, TorchSession(split.parts, graph_list(split, model)))


@pytest.fixture
def pipe(identity: EdgePipeline) -> EdgePipeline:
    return EdgePipeline(trained(identity.manifest), identity.session)


def told(pipe: EdgePipeline, **asked: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.stream(**asked)
    assert all(warning.category is OperatingPointWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_inference_steps": 4, "clock": 2, "guidance_scale": 2.0},
        {"clock": "1,0,1,0"},
        {"clock": [1, 0, 1, 0], "guidance_scale": [2, 2, 2, 2]},
        {"num_images": 3, "seed": 9, "label": "Kiwi"},
        # No step is cached: the adaptor never runs.
        {"clock": 1},
        {"clock": 1, "num_inference_steps": 20, "guidance_scale": 7.0},
        {"num_inference_steps": 1},
    ],
)
def test_what_it_was_trained_for_is_not_warned_of(pipe: EdgePipeline, asked: dict[str, Any]) -> None:
    assert told(pipe, **asked) == []


SAID = "adaptor tiny-resnet was trained for 4 steps of dpmpp_2m, clock 2, guidance 2; this is "


@pytest.mark.parametrize(
    ("asked", "differs"),
    [
        ({"num_inference_steps": 6}, "6 steps"),
        ({"clock": 3}, "clock 3"),
        ({"clock": [1, 0, 0, 1]}, "clock 1,0,0,1"),
        ({"clock": "1,1,0,0"}, "clock 1,1,0,0"),
        ({"guidance_scale": 1.0}, "guidance 1"),
        ({"guidance_scale": [2, 2, 3, 1]}, "guidance 2, 3, 1"),
        ({"num_inference_steps": 8, "clock": 4, "guidance_scale": 3}, "8 steps, clock 4, guidance 3"),
    ],
)
def test_what_differs_is_named_once_and_runs(pipe: EdgePipeline, asked: dict[str, Any], differs: str) -> None:
    assert told(pipe, **asked) == [f"{SAID}{differs}: images may be worse"]
    assert told(pipe, **asked) == []
    assert told(pipe, clock=4) == []
    assert pipe(**asked).latents.shape == (1, 3, 16, 16)


def test_each_pipeline_warns_for_itself(identity: EdgePipeline) -> None:
    for _ in range(2):
        assert len(told(EdgePipeline(trained(identity.manifest), identity.session), clock=3)) == 1
    assert told(EdgePipeline(trained(identity.manifest), identity.session, warn=False), clock=3) == []
    assert told(identity, clock=3) == []


def test_threads_on_one_pipeline_warn_once(pipe: EdgePipeline) -> None:
    start = threading.Barrier(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def work() -> None:
            start.wait()
            pipe.stream(clock=3)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("values", "asked", "differs"),
    [
        ({"scheduler": "ddim"}, {}, "dpmpp_2m"),
        ({"guidance_scale": 1.0}, {"guidance_scale": 0.5}, None),
        ({"num_inference_steps": 2, "clock": 2, "mask": (1, 0)}, {}, "4 steps"),
        ({"num_inference_steps": 2, "clock": "1,0", "mask": (1, 0)}, {}, "4 steps, clock 2"),
        ({"clock": "1,0,1,0"}, {}, None),
    ],
)
def test_other_trainings(
    identity: EdgePipeline, values: dict[str, Any], asked: dict[str, Any], differs: str | None
) -> None:
    said = told(EdgePipeline(trained(identity.manifest, **values), identity.session), **asked)
    assert said == [] if differs is None else said[0].endswith(f"; this is {differs}: images may be worse")


def test_the_sampler_is_the_recipe_s(identity: EdgePipeline) -> None:
    karras = msgspec.structs.replace(identity.manifest.scheduler, use_karras_sigmas=True)
    manifest = msgspec.structs.replace(trained(identity.manifest), scheduler=karras)
    # The source asks for them, at the training as now.
    assert told(EdgePipeline(manifest, identity.session)) == []
    point = msgspec.structs.replace(manifest.operating_point, scheduler="dpmpp_2m_karras")
    manifest = msgspec.structs.replace(manifest, operating_point=point)
    assert told(EdgePipeline(manifest, identity.session))[0].endswith("; this is dpmpp_2m_karras: images may be worse")


# On the command lines


@pytest.fixture
def trained_bundle(class_model: Path, tmp_path: Path) -> Path:
    model = edgediff.load_model(class_model)
    adaptor = learned.trained(model, tmp_path / "tiny-resnet")
    edgediff.export_bundle(model, tmp_path / "bundle", edgediff.ExportConfig(steps=4, adaptor=str(adaptor)))
    return tmp_path / "bundle"


def test_run_says_it_once_before_the_first_step(trained_bundle: Path, tmp_path: Path, command: Command) -> None:
    said = command("run", trained_bundle, "-o", tmp_path / "x.png", "--clock", 3, "--json")
    assert said.code == 0
    assert said.errors == [f"warning: {SAID}clock 3: images may be worse"]
    assert json.loads(said.out)["mask"] == [1, 0, 0, 1]
    assert command("run", trained_bundle, "-o", tmp_path / "x.png").errors == []


def test_the_runtime_s_own_command_says_it_too(trained_bundle: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-W", "ignore", "-m", "edgediff_runtime", trained_bundle, "-o", tmp_path / "x.png"]
    done = subprocess.run([*args, "--steps", "5", "--num-images", "1"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == f"warning: {SAID}5 steps: images may be worse\n"


def test_verification_does_not_warn(trained_bundle: Path) -> None:
    seal(trained_bundle, trained(manifest_of(trained_bundle), clock=4, mask=(1, 0, 0, 0)))
    assert edgediff.verify_bundle(trained_bundle, record=False).ok  # warnings are errors here


def test_export_says_that_the_operating_point_is_another(identity: EdgePipeline) -> None:
    with pytest.warns(OperatingPointWarning, match="clock 4, guidance 2; this is clock 2: images may be worse"):
        _warn_of_adaptor(trained(identity.manifest, clock=4, mask=(1, 0, 0, 0)))
    _warn_of_adaptor(trained(identity.manifest))
    _warn_of_adaptor(identity.manifest)


def test_other_warnings_are_left_as_they_are() -> None:
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with warnings_told(lines.append):
            warnings.warn("other", UserWarning, stacklevel=1)
            warnings.warn("a\nb", OperatingPointWarning, stacklevel=1)
            warnings.warn("a\nb", OperatingPointWarning, stacklevel=1)
        warnings.warn("after", OperatingPointWarning, stacklevel=1)
    assert lines == ["a b", "a b"]
    assert [str(warning.message) for warning in caught] == ["other", "after"]


# What the manifest may say


def _adaptor(**values: Any) -> Callable[[Manifest], Manifest]:
    return lambda m: msgspec.structs.replace(m, adaptor=msgspec.structs.replace(ADAPTOR, **values))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_adaptor(kind="cubic"), "adaptor.kind is 'cubic'; expected one of identity, resnet, unet, unet-light"),
        (_adaptor(kind="identity"), "adaptor.name is 'tiny-resnet'; expected a value for a learned one, null for id"),
        (_adaptor(kind="identity", name=None), "adaptor.sha256 is '0"),
        (_adaptor(kind="identity", name=None, sha256=None), "adaptor.trained_for is TrainedFor"),
        (_adaptor(kind="identity", name=None, sha256=None, trained_for=None), "adaptor.path is 'x'"),
        (_adaptor(name=None), "adaptor.name is None; expected a value"),
        (_adaptor(sha256=None), "adaptor.sha256 is None; expected a value"),
        (_adaptor(sha256="abc"), "adaptor.sha256 is 'abc'; expected 64 hexadecimal digits"),
        (_adaptor(trained_for=None), "adaptor.trained_for is None; expected a value"),
        (
            lambda m: trained(m, mask=(1, 0)),
            r"adaptor.trained_for.mask is \(1, 0\); expected the mask of clock 2",
        ),
        (lambda m: trained(m, num_inference_steps=5), "adaptor.trained_for.mask"),
        (lambda m: trained(m, clock="0,0,1,0", mask=(0, 0, 1, 0)), "begins with 0"),
        (lambda m: trained(m, num_inference_steps=0), "steps is 0"),
        (lambda m: trained(m, guidance_scale=0.0), "adaptor.trained_for.guidance_scale is 0.0"),
    ],
)
def test_adaptors_that_no_manifest_has(
    identity: EdgePipeline, change: Callable[[Manifest], Manifest], match: str
) -> None:
    with pytest.raises((BundleError, ValueError), match=match):
        check_manifest(change(identity.manifest))


def test_adaptors_that_a_manifest_has(identity: EdgePipeline) -> None:
    check_manifest(identity.manifest)
    check_manifest(trained(identity.manifest))
    check_manifest(_adaptor(path=None)(trained(identity.manifest)))
