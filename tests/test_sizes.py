"""Pictures of other sizes: graphs of any size, a function for each of a few, and what is refused."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from artefacts import exported
from command_line import exit_code
from pipelines import open_in_diffusers, saved

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.config.sizes import read_sizes
from edgediff.errors import ConfigError
from edgediff.export.export_config import config_from
from edgediff.models.sampling import diffusers_scheduler
from edgediff.targets.backends import open_pipeline
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline, RequestError, open_bundle
from edgediff_runtime.image import read_size
from edgediff_runtime.loop import initial_latents
from edgediff_runtime.manifest import Graph, Tensor

# Of the small pipelines, whose usual pictures are 32 x 32, latents 16 x 16 and levels a factor of two.
WHOLE = edgediff.ExportConfig(sizes=("any",), steps=4, scheduler="euler", verify=VerifyConfig(mode="graphs"))
# One of the two has the encoder of images too.
ANY = {"sd1": msgspec.structs.replace(WHOLE, components=("text_encoder", "vae_decoder")), "xl": WHOLE}
NAMED = edgediff.ExportConfig(
    sizes=("40x24", "24x48"), steps=4, scheduler="euler", verify=VerifyConfig(mode="graphs"), targets=("coreml",),
    components=("text_encoder", "vae_decoder"),
)  # fmt: skip
REQUEST: dict[str, Any] = {"prompt": "a photo of a red apple", "num_inference_steps": 4, "guidance_scale": 5.0}
SEED = 3

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' sampler


def drawn(theirs: Any, width: int, height: int) -> np.ndarray:
    """What diffusers draws of the same latents."""
    latents = torch.from_numpy(initial_latents(SEED, 1, (4, height // 2, width // 2), 1.0))
    images: np.ndarray = theirs(**REQUEST, latents=latents, width=width, height=height, output_type="np").images
    return images


def as_drawn(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


def test_a_shape_names_what_a_request_tells() -> None:
    graph = Graph(
        "x", "x", "step",
        (Tensor("sample", "float32", ("batch", 4, 16, 24)), Tensor("encoder_hidden_states", "float32", (2, 8, 1, 77))),
        (Tensor("lowres_feature", "float32", ("batch", 8, 8, 12)), Tensor("emb", "float32", ("batch", 16))),
    )  # fmt: skip
    symbolic = graph.of_any_size(16, 24)
    assert symbolic.takes_any_size
    assert symbolic.of_any_size(16, 24) == symbolic
    assert [tensor.shape for tensor in (*symbolic.inputs, *symbolic.outputs)] == [
        ("batch", 4, "height", "width"), (2, 8, 1, 77), ("batch", 8, "height/2", "width/2"), ("batch", 16)
    ]  # fmt: skip
    assert symbolic.at(16, 24) == graph
    assert symbolic.at(32, 64).outputs[0].shape == ("batch", 8, 16, 32)
    picture = Tensor("sample", "float32", ("batch", 3, 128, 192)).of_any_size(16, 24)
    assert picture.shape == ("batch", 3, "8*height", "8*width")
    assert picture.at(2, 3).shape == ("batch", 3, 16, 24)


@pytest.mark.parametrize("text", ["512", "512x", "0x512", "512 x 512", "512x768x3", "-1x2", "٣x٣", "all"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected WIDTHxHEIGHT"):
        read_sizes([text])
    with pytest.raises(RequestError, match="expected WIDTHxHEIGHT"):
        read_size(text)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"sizes": ["512x512", "512x512"]}, "has a duplicate"),
        ({"sizes": ["any"], "targets": ["coreml"]}, "graphs of Core ML take fixed sizes; name them"),
        ({"sizes": ["any"], "targets": ["onnx", "executorch"]}, "graphs of ExecuTorch take fixed sizes; name them"),
        (
            {"sizes": ["32x32", "64x32"], "targets": ["coreml"], "coreml": {"deployment_target": "iOS17"}},
            "iOS17 cannot load those",
        ),
    ],
)
def test_sizes_that_a_target_cannot_take_are_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from(recipe)


def test_a_size_that_the_levels_do_not_divide_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "export", saved("sd1"), "-o", tmp_path / "b", "--size", "34x32") == 2
    assert "'sizes' has 34x32, which the levels" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_graphs_of_any_size_draw_what_diffusers_draws(name: str) -> None:
    bundle = exported(saved(name), ANY[name], {})
    pipe = EdgePipeline.from_pretrained(bundle, threads=1)
    theirs = open_in_diffusers(name)
    theirs.scheduler = diffusers_scheduler(theirs.scheduler, "euler")
    for width, height in ((32, 32), (48, 24), (40, 64)):
        pixels = pipe(**REQUEST, seed=SEED, clock=1, width=width, height=height).pixels
        assert pixels is not None
        assert pixels.shape == (1, 3, height, width)
        assert psnr_db(drawn(theirs, width, height), as_drawn(pixels)) >= 60.0
    assert pipe.decode(np.zeros((1, 4, 6, 10), np.float32)).shape == (1, 3, 12, 20)
    for size, said in (
        ({"width": 34}, "unet: it has no graphs for 34 x 32 (width x height); it takes multiples of 4; ask"),
        ({"height": 31}, "height is 31; expected a multiple of 4"),
        ({"height": 0}, "height is 0; expected a multiple of 4"),
        ({"width": 32.0}, "width is 32.0; expected a multiple of 4"),
        ({"width": True}, "width is True; expected a multiple of 4"),
    ):
        with pytest.raises(RequestError) as raised:
            pipe(**REQUEST, **size)  # type: ignore[arg-type]
        assert said in str(raised.value)


@pytest.mark.long
def test_graphs_of_any_size_in_int8() -> None:
    config = msgspec.structs.replace(ANY["sd1"], onnx=OnnxConfig(quantize_nbits=8))
    pipe = EdgePipeline.from_pretrained(exported(saved("sd1"), config, {}), threads=1)
    unet = pipe.manifest.target("onnx").unet
    assert unet.dtype == "int8"
    theirs = open_in_diffusers("sd1")
    theirs.scheduler = diffusers_scheduler(theirs.scheduler, "euler")
    for width, height in ((32, 32), (40, 24)):
        pixels = pipe(**REQUEST, seed=SEED, clock=1, width=width, height=height).pixels
        assert pixels is not None
        assert np.isfinite(pixels).all()
        assert psnr_db(drawn(theirs, width, height), as_drawn(pixels)) >= unet.floors.trajectory


@pytest.mark.long
def test_named_sizes_are_functions_of_packages() -> None:
    bundle = open_bundle(exported(saved("sd1"), NAMED, {}))
    sample = bundle.manifest.sample
    assert (sample.height, sample.width) == (12, 20)
    pipe, theirs = open_pipeline(bundle, "mil-reference", threads=1), open_in_diffusers("sd1")
    theirs.scheduler = diffusers_scheduler(theirs.scheduler, "euler")
    for width, height in ((40, 24), (24, 48)):
        pixels = pipe(**REQUEST, seed=SEED, clock=1, width=width, height=height).pixels
        assert pixels is not None
        assert pixels.shape == (1, 3, height, width)
        assert psnr_db(drawn(theirs, width, height), as_drawn(pixels)) >= 35.0  # fp16
    with pytest.raises(RequestError, match=r"no graphs for 48 x 24 .*; it takes 40 x 24, 24 x 48; ask for one"):
        pipe(**REQUEST, width=48, height=24)


@pytest.mark.long
def test_one_size_is_that_of_all_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, recipe = tmp_path / "b", tmp_path / "recipe.yaml"
    recipe.write_text("clock: 1\ncomponents: [text_encoder, vae_decoder]\nverify: {mode: graphs}\n")
    command = ("export", saved("sd1"), "-o", bundle, "--config", recipe, "--size", "48x24")
    assert exit_code(monkeypatch, *command) == 0
    manifest = open_bundle(bundle).manifest
    assert (manifest.sample.height, manifest.sample.width, manifest.evidence.sizes) == (12, 24, ())
    assert not any(graph.takes_any_size for graph in manifest.target("onnx").unet.graphs)
    assert exit_code(monkeypatch, "run", bundle, "-o", tmp_path / "a.png", "--prompt", "a dog", "--size", "48x24") == 0
    assert exit_code(monkeypatch, "run", bundle, "-o", tmp_path / "b.png", "--prompt", "a dog", "--size", "32x32") == 2
    assert not (tmp_path / "b.png").exists()
