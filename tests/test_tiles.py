"""Decoding in tiles: as diffusers does it, in graphs of any size; tiles moved inwards, in graphs of one."""

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from artefacts import exported
from command_line import exit_code
from pipelines import open_in_diffusers, open_in_torch, saved

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.models.sampling import diffusers_scheduler
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import EdgePipeline, RequestError, noise, open_bundle
from edgediff_runtime.__main__ import main as light_main
from edgediff_runtime.decoding import decode
from edgediff_runtime.loop import initial_latents
from edgediff_runtime.manifest import Graph, Sized, Tensor, Vae
from edgediff_runtime.pipeline import DECODER

# Of the small pipelines: two pixels of a side for one of the latent, and tiles of 32 pixels by diffusers' default.
TILE = 32
ASKED: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2, "clock": 1, "guidance_scale": 2.0}
ANY = edgediff.ExportConfig(
    sizes=("any",), steps=2, scheduler="euler", verify=VerifyConfig(mode="graphs"), targets=("onnx", "openvino"),
    components=("text_encoder", "vae_decoder"),
)  # fmt: skip
NAMED = edgediff.ExportConfig(
    sizes=("32x32", "48x32"), steps=2, scheduler="euler", verify=VerifyConfig(mode="graphs"), targets=("coreml",),
    components=("vae_decoder",),
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' sampler


class Pixelwise:
    """A decoder whose pixels depend on nothing around them: however it is tiled, the picture is the same."""

    batch = None

    def __init__(self) -> None:
        self.sizes = set[tuple[int, int]]()

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, value: np.ndarray) -> np.ndarray:
        return value

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        z = tensors["latent_sample"]
        self.sizes.add(z.shape[2:])
        assert graph.at(*z.shape[2:]).inputs[0].shape[2:] == z.shape[2:]
        tensors["sample"] = z[:, :3].repeat(2, axis=2).repeat(2, axis=3)


GRAPH = Graph(
    DECODER, DECODER, None, (Tensor("latent_sample", "float32", ("batch", 4, "height", "width")),),
    (Tensor("sample", "float32", ("batch", 3, "2*height", "2*width")),),
)  # fmt: skip


@pytest.mark.parametrize("multiple", [1, 2, None])
@pytest.mark.parametrize("tile", [4, 8, 16])
def test_tiles_lie_where_the_picture_is(tile: int, multiple: int | None) -> None:
    """Narrower ones where there is a graph for them, of multiples of a size; else those at the end move inwards."""
    session, vae = Pixelwise(), Vae(1.0, 2)

    def graph_at(height: int, width: int) -> Graph | None:
        fits = multiple is not None and height % multiple == width % multiple == 0
        return GRAPH.at(height, width) if fits or (height, width) == whole else None

    for height, width in itertools.product((2, 12, 16, 17, 22, 31), (6, 16, 23)):
        whole = min(tile, height), min(tile, width)
        session.sizes.clear()
        latents = noise(1, (2, 4, height, width))
        made = decode(session, graph_at, vae, latents, tile)
        np.testing.assert_allclose(made, latents[:, :3].repeat(2, axis=2).repeat(2, axis=3), atol=1e-6)
        assert max(max(size) for size in session.sizes) <= tile
        if multiple is None:
            assert session.sizes == {whole}


@pytest.fixture(scope="module")
def sd1() -> EdgePipeline:
    """A small pipeline whose graphs take any size."""
    pipe = open_in_torch("sd1")
    sample = pipe.manifest.sample
    pipe.components.graphs = {
        name: tuple(graph.of_any_size(sample.height, sample.width) for graph in graphs)
        for name, graphs in pipe.components.graphs.items()
    }
    return pipe


@pytest.fixture(scope="module")
def theirs() -> Any:
    pipeline = open_in_diffusers("sd1")
    pipeline.vae.enable_tiling()
    assert pipeline.vae.tile_latent_min_size == TILE // 2
    return pipeline


@pytest.mark.parametrize(("height", "width"), [(24, 40), (28, 16), (10, 44), (52, 18), (16, 16), (12, 14)])
def test_the_picture_is_that_of_diffusers_tiles(sd1: EdgePipeline, theirs: Any, height: int, width: int) -> None:
    latents = noise(5, (2, 4, height, width))
    assert sd1.manifest.vae is not None
    with torch.no_grad():
        z = torch.from_numpy(latents) / sd1.manifest.vae.scaling_factor
        want = theirs.vae.decode(z).sample.numpy()
    tiled, whole = sd1.decode(latents, tile=TILE), sd1.decode(latents)
    assert psnr_db(want, tiled) >= 100.0
    assert np.array_equal(tiled, whole) == (max(height, width) <= TILE // 2)


def test_a_generation_in_tiles(sd1: EdgePipeline) -> None:
    asked = {**ASKED, "height": 48, "width": 64, "num_images": 2}
    whole, tiled = sd1(**asked), sd1(**asked, tile=np.int64(TILE))
    np.testing.assert_array_equal(whole.latents, tiled.latents)
    np.testing.assert_array_equal(tiled.pixels, sd1.decode(whole.latents, tile=TILE))
    assert not np.array_equal(whole.pixels, tiled.pixels)
    np.testing.assert_array_equal(whole.pixels, sd1(**asked, tile=64).pixels)


def test_a_decoder_of_one_size_draws_a_larger_picture(sd1: EdgePipeline, theirs: Any) -> None:
    """Where diffusers' tiles are whole, the picture is diffusers'; where they are narrower, these have seen more."""
    pipe = open_in_torch("sd1")
    latents = noise(5, (1, 4, 24, 40))
    with pytest.raises(RequestError, match=r"^vae_decoder: it has no graphs for 80 x 48 .*; it takes 32 x 32; ask"):
        pipe.decode(latents)
    made, want = pipe.decode(latents, tile=TILE), sd1.decode(latents, tile=TILE)
    assert made.shape == (1, 3, 48, 80)
    # The second tile begins at pixel 24, and the last column of tiles at 72; those before are 32 wide.
    assert psnr_db(want[:, :, :24, :72], made[:, :, :24, :72]) >= 100.0
    edge = pipe.decode(latents[:, :, :16, 24:])  # the last tile of the first row, moved inwards
    np.testing.assert_allclose(made[:, :, :24, 78:], edge[:, :, :24, 30:], rtol=0, atol=1e-5)


BAD_TILES: dict[str, tuple[Any, str]] = {
    "no multiple": (36, "expected a multiple of 8 pixels, of which a quarter overlaps the next tile"),
    "smaller than the overlap": (4, "expected a multiple of 8 pixels"),
    "nothing": (0, "expected a multiple of 8 pixels"),
    "negative": (-32, "expected a multiple of 8 pixels"),
    "a fraction": (32.0, "expected a multiple of 8 pixels"),
    "a text": ("32", "expected a multiple of 8 pixels"),
    "true": (True, "expected a multiple of 8 pixels"),
}


@pytest.mark.parametrize("name", BAD_TILES)
def test_tiles_that_are_refused(sd1: EdgePipeline, name: str) -> None:
    tile, said = BAD_TILES[name]
    for ask in (lambda: sd1(**ASKED, tile=tile), lambda: sd1.decode(np.zeros((1, 4, 24, 24), np.float32), tile=tile)):
        with pytest.raises(RequestError) as caught:
            ask()
        assert str(caught.value).startswith(f"tile is {tile!r}; ")
        assert said in str(caught.value)


def test_a_tile_without_a_graph_is_refused_before_anything_runs(
    sd1: EdgePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = msgspec.structs.replace(sd1.manifest.sample, multiple=8)
    monkeypatch.setattr(sd1, "manifest", msgspec.structs.replace(sd1.manifest, sample=sample))
    monkeypatch.setattr(sd1.components, "_open_session", None)
    said = r"^tile is 24: vae_decoder has no graph for 24 x 24 \(width x height\); it takes multiples of 16; ask for a "
    with pytest.raises(RequestError, match=said):
        sd1(**ASKED, width=64, tile=24)
    fixed = open_in_torch("sd1")
    (graph,) = fixed.components.graphs[DECODER]
    sized = Sized(24, 24, (graph.of_any_size(16, 16).at(24, 24),))
    fixed.components.further = {DECODER: (sized,)}
    with pytest.raises(RequestError, match="it takes 32 x 32, 48 x 48; ask for a tile of one of these"):
        fixed.decode(np.zeros((1, 4, 24, 24), np.float32), tile=40)


def test_a_tile_of_a_bundle_without_a_decoder(sd1: EdgePipeline) -> None:
    alone = EdgePipeline(sd1.manifest, sd1.session)
    pixels = EdgePipeline.from_pretrained(Path(__file__).parents[1] / "runtime/golden/bundle")
    for pipe in (alone, pixels):
        with pytest.raises(RequestError, match=r"^tile is 32, but the bundle has no decoder for this backend; leave"):
            pipe(tile=32)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_graphs_of_any_size_draw_diffusers_tiles(theirs: Any, backend: str, tmp_path: Path) -> None:
    bundle = exported(saved("sd1"), ANY, {})
    pipe = EdgePipeline.from_pretrained(bundle, backend, threads=1)
    theirs.scheduler = diffusers_scheduler(theirs.scheduler, "euler")
    width, height = 72, 56
    latents = torch.from_numpy(initial_latents(3, 1, (4, height // 2, width // 2), 1.0))
    asked = {name: value for name, value in ASKED.items() if name != "clock"}
    want = theirs(**asked, latents=latents, width=width, height=height, output_type="np").images
    pixels = pipe(**ASKED, seed=3, width=width, height=height, tile=TILE).pixels
    assert pixels is not None
    assert psnr_db(want, np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)) >= 60.0


@pytest.mark.long
def test_tiles_on_both_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, files = exported(saved("sd1"), ANY, {}), []
    asked = [bundle, "--prompt", "a dog", "--size", "64x48", "--threads", "1"]
    for i, tile in enumerate(("32", "64", "20")):
        file = tmp_path / f"{i}.png"
        code = exit_code(monkeypatch, "run", *asked, "-o", file, "--tile", tile, "--backend", "onnxruntime")
        monkeypatch.setattr("sys.argv", ["x", *map(str, asked), "-o", str(tmp_path / f"light-{i}.png"), "--tile", tile])
        assert light_main() == code == (2 if tile == "20" else 0)
        files.append(file)
    assert capsys.readouterr().err.count("error: tile is 20; expected a multiple of 8 pixels") == 2
    assert files[0].read_bytes() == (tmp_path / "light-0.png").read_bytes() != files[1].read_bytes()
    assert files[1].read_bytes() == (tmp_path / "light-1.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.long
def test_named_sizes_have_tiles_of_those_sizes() -> None:
    pipe = open_pipeline(open_bundle(exported(saved("sd1"), NAMED, {})), "mil-reference", threads=1)
    latents = noise(5, (1, 4, 16, 24))
    tiled, whole = pipe.decode(latents, tile=TILE), pipe.decode(latents)
    first = pipe.decode(latents[:, :, :, :16])
    np.testing.assert_array_equal(first[:, :, :24, :24], tiled[:, :, :24, :24])
    assert 0 < psnr_db(whole, tiled) < 60
    with pytest.raises(RequestError, match=r"no graph for 24 x 24 .*; it takes 32 x 32, 48 x 32; ask for a tile"):
        pipe.decode(latents, tile=24)
