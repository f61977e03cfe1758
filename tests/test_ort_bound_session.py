"""ONNX Runtime's session on a device's memory: on the CPU it is held to the other one, and a GPU is not pretended."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from command_line import Command, assert_error

from edgediff.bundle.psnr import psnr_db
from edgediff_runtime import EdgePipeline, RequestError, open_bundle, ort_bound_session
from edgediff_runtime.ort_bound_session import CUDA, OrtBoundSession
from edgediff_runtime.ort_session import CPU, OrtSession

REQUEST = {"num_images": 2, "num_inference_steps": 4, "seed": 3}
HAS_CUDA = CUDA in ort.get_available_providers()
# On a GPU the order of additions is another.
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="this ONNX Runtime has no CUDA")))
NO_CUDA = pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("of", "asked"),
    [
        ("class_bundle", {"clock": 2}),
        ("class_bundle", {"clock": "1,0,0,1", "guidance_scale": [2.0, 2.0, 1.0, 2.0]}),  # the cache is divided
        ("text_bundle", {"clock": 2}),
    ],
)
def test_bound_tensors_make_the_same_latents(
    of: str, asked: dict[str, Any], device: str, request: pytest.FixtureRequest
) -> None:
    bundle = open_bundle(request.getfixturevalue(of))
    given = REQUEST | asked | _text(bundle.manifest.conditioning.kind)
    want, got = (
        EdgePipeline(bundle.manifest, session, warn=False)(**given)
        for session in (OrtSession(bundle, threads=1), OrtBoundSession(bundle, device, threads=1))
    )
    assert got.mask == want.mask
    if device == "cpu":
        assert np.array_equal(want.latents, got.latents)
    assert psnr_db(want.latents, got.latents) > 90


def _text(kind: str) -> dict[str, Any]:
    if kind != "text":
        return {}
    rows = np.random.default_rng(0).standard_normal((3, 7, 12)).astype(np.float32)
    return {"prompt_embeds": rows[:1], "negative_prompt_embeds": rows[1:2]}


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_graph_makes_stays_on_the_device_and_is_the_callers(class_bundle: Path, device: str) -> None:
    session = OrtBoundSession(open_bundle(class_bundle), device, threads=1)
    graph = session.graphs[0]
    rng = np.random.default_rng(0)
    given = {
        "sample": rng.standard_normal((2, 3, 16, 16)).astype(np.float32),
        "timestep": np.array([500], np.float32),
        "class_labels": np.array([1, 4], np.int64),
    }
    tensors = {name: session.put(array) for name, array in given.items()}
    session.run(graph, tensors)
    made = {tensor.name: tensors[tensor.name] for tensor in graph.outputs}
    assert all(isinstance(value, ort.OrtValue) and value.device_name() == device for value in made.values())
    before = {name: session.get(value).copy() for name, value in made.items()}
    again = {name: session.put(-array if name == "sample" else array) for name, array in given.items()}
    session.run(graph, again)
    for name, value in made.items():
        assert np.array_equal(session.get(value), before[name])
    assert not np.array_equal(session.get(again["highres_feature"]), before["highres_feature"])


def test_an_unknown_device_is_refused(class_bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"no device 'tpu'; choices: cpu, cuda$"):
        OrtBoundSession(open_bundle(class_bundle), "tpu")


def test_what_a_device_cannot_run_is_said_in_one_line(class_bundle: Path) -> None:
    session = OrtBoundSession(open_bundle(class_bundle), "cpu", threads=1)
    graph = session.graphs[0]
    rows = {"sample": np.zeros((2, 5, 16, 16), np.float32), "timestep": np.zeros(1, np.float32)}
    tensors = {name: session.put(array) for name, array in (rows | {"class_labels": np.zeros(2, np.int64)}).items()}
    with pytest.raises(RequestError, match=r"^highres_in cannot run on cpu: [^\n]*sample"):
        session.run(graph, tensors)


@NO_CUDA
def test_without_cuda_the_backend_says_what_it_needs(class_bundle: Path, tmp_path: Path, command: Command) -> None:
    with pytest.raises(RequestError, match=r"needs an NVIDIA GPU.* then pip install onnxruntime-gpu$"):
        EdgePipeline.from_pretrained(class_bundle, backend="onnxruntime-cuda")
    said = command("run", class_bundle, "-o", tmp_path / "a.png", "--backend", "onnxruntime-cuda")
    assert_error(said, "needs an NVIDIA GPU")
    assert not (tmp_path / "a.png").exists()


@NO_CUDA
def test_a_provider_that_onnxruntime_left_out_is_not_taken_for_a_gpu(
    class_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What happens where CUDA's libraries are missing: the provider is known, and the session is on the CPU.
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load\nlibcudart"))
    monkeypatch.setitem(ort_bound_session.PROVIDERS, "cuda", (CPU,))
    with pytest.raises(
        RequestError, match=r"libraries of CUDA and cuDNN.* could not start there: Failed to load libcudart$"
    ):
        OrtBoundSession(open_bundle(class_bundle), "cuda")
    assert capsys.readouterr().out == ""
