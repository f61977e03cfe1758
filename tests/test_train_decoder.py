"""A decoder for latents that stay: a pipeline's own, trained further, and a small one."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import Command, assert_error, unchanged
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import save_sd1

from edgediff.data.image_folder import ImageSet
from edgediff.errors import ConfigError, EdgediffError, ModelError, TargetError
from edgediff.models.components import pipeline_components
from edgediff.models.load import load_model
from edgediff.models.wavelet import dwt2
from edgediff.train.autoencoder import train_autoencoder
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.decoder import DecoderTrained, details_error, train_decoder
from edgediff.train.latents import WEIGHTS_FILE, decode, encode, load_autoencoder
from edgediff.train.settings import AutoencoderTraining, DecoderTraining, load_training, training_from
from edgediff_runtime.bundle import sha256_of

SIZE = 16
TINY = DecoderTraining(updates=6, batch=4, ema=0.5, checkpoint_minutes=1e-9, warmup=0)
SMALL: dict[str, Any] = {"channels": 8, "decoder_blocks": [1, 1]}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 discs in two colours on white."""
    folder = tmp_path_factory.mktemp("drawings")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for i in range(40):
        pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
        centre, radius = rng.uniform(5, 11, 2), rng.uniform(2, 6)
        pixels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = ((200, 40, 30), (30, 60, 200))[i % 2]
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def source(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder that has begun to learn them."""
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(drawings.iterdir())])
    settings = AutoencoderTraining(
        block_out_channels=(8, 16), norm_num_groups=4, updates=30, batch=8, learning_rate=5e-3, ema=0.5
    )
    path = tmp_path_factory.mktemp("source") / "vae"
    train_autoencoder(ImageSet(images, np.zeros(40, np.int64), ()), settings, path, accelerator=Accelerator())
    return path


@pytest.fixture
def asked(source: Path, drawings: Path) -> DecoderTraining:
    return msgspec.structs.replace(TINY, model=str(source), data=str(drawings))


def changed(settings: DecoderTraining, **changes: object) -> DecoderTraining:
    return msgspec.structs.replace(settings, **changes)


@pytest.mark.long
def test_the_pipelines_own_is_trained_further(asked: DecoderTraining, source: Path, tmp_path: Path) -> None:
    done = train_decoder(
        tmp_path / "a", changed(asked, updates=60, learning_rate=3e-3, checkpoint_minutes=5.0, sample_every=30)
    )
    assert isinstance(done, DecoderTrained)
    assert done.psnr > done.before + 1
    before, after = (load_file(path / WEIGHTS_FILE) for path in (source, tmp_path / "a"))
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "post_quant_conv"}, "its latents are others now"
    found = {file.name for file in (tmp_path / "a").iterdir()}
    assert found == {"README.md", "config.json", WEIGHTS_FILE, "loss.png", "samples.png", "training.json"}
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"{done.psnr:.2f} dB; AutoencoderKL before {done.before:.2f} dB" in card
    theirs = AutoencoderKL.from_pretrained(tmp_path / "a")
    assert theirs.config.scaling_factor == load_autoencoder(source).config.scaling_factor
    with unchanged(tmp_path / "a"):
        assert train_decoder(tmp_path / "a", changed(asked, updates=60, learning_rate=3e-3)) is None


@pytest.mark.long
def test_a_small_one_learns_the_same_latents(asked: DecoderTraining, source: Path, tmp_path: Path) -> None:
    small = changed(asked, tiny=SMALL, updates=120, learning_rate=1e-2, checkpoint_minutes=5.0, latent_noise=0.0)
    done = train_decoder(tmp_path / "a", small)
    assert done is not None
    untrained = train_decoder(tmp_path / "b", changed(small, updates=1, learning_rate=1e-9))
    assert untrained is not None
    assert done.psnr > untrained.psnr + 3
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "a").eval()
    assert tiny.config.num_decoder_blocks == [1, 1]
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(Path(str(asked.data)).iterdir())])
    latents = encode(load_autoencoder(source), images)
    own = encode(tiny, images)
    assert float((own - latents).square().mean()) < 0.5 * float(latents.square().mean())
    # What diffusers decodes of the latents that a pipeline hands over is what was trained.
    with torch.no_grad():
        theirs = tiny.decode(latents[:2] / tiny.config.scaling_factor).sample
    made = decode(tiny, latents[:2]).astype(np.float32)
    assert np.abs(made / 127.5 - 1 - theirs.clamp(-1, 1).permute(0, 2, 3, 1).numpy()).max() <= 1 / 127.5


def test_a_small_one_is_trained_further(asked: DecoderTraining, tmp_path: Path) -> None:
    """A pipeline's own decoder may be a small one, whose folder does not say how large its images are."""
    train_decoder(tmp_path / "tiny", changed(asked, tiny=SMALL))
    further = changed(asked, model=str(tmp_path / "tiny"), tiny=None, learning_rate=1e-2)
    with pytest.raises(ConfigError, match="does not say how large its images are; name it, 'size'"):
        train_decoder(tmp_path / "a", changed(further, size=None))
    assert train_decoder(tmp_path / "a", changed(further, size=SIZE)) is not None
    before, after = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("tiny", "a"))
    assert "block_out_channels" not in json.loads((tmp_path / "a" / "config.json").read_text())  # diffusers warns of it
    changes = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changes == {"decoder"}


@pytest.mark.long
def test_a_built_in_models_decoder_is_trained_further(asked: DecoderTraining, tmp_path: Path) -> None:
    done = train_decoder(tmp_path / "a", changed(asked, model="drawings-64", size=SIZE, updates=1))
    assert done is not None


def test_a_killed_training_resumes(asked: DecoderTraining, tmp_path: Path) -> None:
    settings = changed(asked, tiny=SMALL)
    assert train_decoder(tmp_path / "whole", settings) is not None

    def stop(what: str, share: float) -> None:
        if what.startswith("decoder") and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_decoder(tmp_path / "a", settings, progress=stop)
    assert (tmp_path / "a" / CHECKPOINTS).exists()
    with pytest.raises(TargetError, match="edge_weight"):
        train_decoder(tmp_path / "a", changed(settings, edge_weight=2.0))
    assert train_decoder(tmp_path / "a", settings) is not None
    for name in (WEIGHTS_FILE, "config.json"):
        assert sha256_of(tmp_path / "a" / name) == sha256_of(tmp_path / "whole" / name)


def test_a_pipeline_takes_it(asked: DecoderTraining, drawings: Path, tmp_path: Path, command: Command) -> None:
    save_sd1(tmp_path / "sd")
    (tmp_path / "d.yaml").write_text("tiny: {channels: 8}\nbatch: 2\n")
    said = command(
        "train", "decoder", tmp_path / "sd", "--config", tmp_path / "d.yaml", "--data", drawings, "--size", 16,
        "--updates", 2, "-o", tmp_path / "tiny",
    )  # fmt: skip
    assert "2 updates on 36 images" in said.out
    assert f"autoencoder: {tmp_path / 'tiny'}" in said.out
    components = pipeline_components(load_model(tmp_path / "sd", vae=tmp_path / "tiny"))
    assert components["vae_decoder"].config["_class_name"] == "AutoencoderTiny"
    with torch.no_grad():
        made = components["vae_decoder"].load()(torch.zeros(1, 4, 8, 8))[0]
    assert made.shape[1] == 3


def test_details_are_those_of_haars_bands() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 16, 16, generator=rng) for _ in range(2))
    expected = []
    for _ in range(3):
        (x, *theirs), (y, *own) = dwt2(x), dwt2(y)
        expected.append(np.mean([float((a - b).abs().mean()) for a, b in zip(theirs, own, strict=True)]))
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 16, 16, generator=rng) for _ in range(2))
    assert float(details_error(x, y)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(details_error(x, x + 1)) == pytest.approx(0, abs=1e-6), "a shift has no details"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": None}, ConfigError, "no autoencoder: name a diffusers directory"),
        ({"model": "nowhere"}, ModelError, "nowhere"),
        ({"data": None}, ConfigError, "no images: name a folder"),
        ({"size": 15}, ConfigError, "'size' is 15; expected a multiple of 2"),
        ({"tiny": {"chanels": 8}}, ConfigError, "unknown.*chanels.*channels"),
        ({"tiny": {"channels": 0}}, ConfigError, "channels"),
        ({"tiny": {"decoder_blocks": [1]}}, ConfigError, r"'tiny.decoder_blocks' is \[1\]; expected 2 numbers"),
        ({"tiny": {"encoder_blocks": [1, -1]}}, ConfigError, r"'tiny.encoder_blocks' is \[1, -1\]; expected 0 to"),
        ({"edge_weight": -1.0}, ConfigError, "'edge_weight' is -1.0"),
        ({"latent_noise": float("nan")}, ConfigError, "'latent_noise' is nan"),
        ({"only": {"name": "things.txt"}}, EdgediffError, "things.txt|name"),
    ],
)
def test_settings_that_do_not_fit(
    asked: DecoderTraining, tmp_path: Path, changes: dict[str, Any], kind: type[EdgediffError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        train_decoder(tmp_path / "a", changed(asked, **changes))
    assert not (tmp_path / "a").exists()


def test_the_command_refuses_in_one_line(drawings: Path, tmp_path: Path, command: Command) -> None:
    said = command("train", "decoder", "--data", drawings, "-o", tmp_path / "a")
    assert_error(said, "no autoencoder: name a diffusers directory")


def test_the_recipe_is_one() -> None:
    settings = load_training("drawings-64-decoder", DecoderTraining)
    assert training_from(msgspec.to_builtins(settings), DecoderTraining) == settings
    assert settings.tiny is not None
