"""The small autoencoder: it learns, its latents are of unit variance, and a kill changes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import unchanged
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from edgediff.data.image_folder import ImageSet, divide
from edgediff.errors import ConfigError, ModelError, TargetError, TrainingError
from edgediff.train import autoencoder
from edgediff.train.autoencoder import train_autoencoder
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.latents import decode, encode, load_autoencoder, reconstruction_psnr
from edgediff.train.settings import AutoencoderTraining, check_training
from edgediff_runtime.bundle import sha256_of

SIZE = 16
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = AutoencoderTraining(
    block_out_channels=(8, 16), norm_num_groups=4, updates=6, batch=4, ema=0.5, checkpoint_minutes=1e-9
)


def tiny(**changes: object) -> AutoencoderTraining:
    return msgspec.structs.replace(TINY, **changes)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """40 images in two classes: slopes from reddish to bluish, down or across."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 1, SIZE)[:, None, None]
    ends = np.array([[210, 60, 40], [30, 80, 220]])[:, None, None] + rng.uniform(-25, 25, (40, 2, 1, 1, 3))
    pixels = ends[:, 0] * slope + ends[:, 1] * (1 - slope) + np.zeros((1, SIZE, SIZE, 1))
    labels = np.arange(40) % 2
    pixels = np.where(labels[:, None, None, None] == 1, pixels.transpose(0, 2, 1, 3), pixels)
    return ImageSet(np.rint(pixels).astype(np.uint8), labels, ("across", "down"))


def train(images: ImageSet, path: Path, settings: AutoencoderTraining = TINY, **options: object) -> AutoencoderKL:
    return train_autoencoder(images, settings, path, accelerator=Accelerator(), **options)


def interrupted(images: ImageSet, path: Path, settings: AutoencoderTraining, after: int) -> None:
    """Trains until so many updates are done."""

    def stop(what: str, share: float) -> None:
        if share * settings.updates > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(images, path, settings, progress=stop)


@pytest.fixture(scope="module")
def whole(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of the tiny settings that nothing interrupted; tests copy what they change."""
    path = tmp_path_factory.mktemp("whole") / "a"
    train(images, path)
    return path


def same(one: Path, other: Path) -> bool:
    return all(sha256_of(one / name) == sha256_of(other / name) for name in (WEIGHTS, "config.json"))


# Training


def test_training_brings_images_back(images: ImageSet, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    settings = tiny(updates=40, learning_rate=1e-2, checkpoint_minutes=5.0)
    vae = train(images, tmp_path / "a", settings, progress=lambda *args: said.append(args))
    losses = [float(what.rpartition(" ")[2]) for what, _ in said[:-1]]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert said[19][1] == 0.5
    untrained = train(images, tmp_path / "b", tiny(updates=1, learning_rate=1e-9))
    learnt, held_out = divide(images, 0.1, settings.seed)
    before, after = (reconstruction_psnr(each, held_out.images) for each in (untrained, vae))
    assert after > before + 5
    assert said[-1] == (f"autoencoder: {after:.1f} dB on 4 held-out images", 1.0)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"config.json", "training.json", WEIGHTS}
    latents = encode(vae, learnt.images)
    assert latents.shape == (36, 4, 8, 8)
    assert latents.dtype == torch.float32
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert vae.config.scaling_factor != 1


def test_it_is_an_autoencoder_of_diffusers(images: ImageSet, whole: Path) -> None:
    vae = load_autoencoder(whole)
    theirs = AutoencoderKL.from_pretrained(whole)
    assert theirs.config.scaling_factor == vae.config.scaling_factor
    assert theirs.config.sample_size == SIZE
    latents = encode(vae, images.images[:3], batch=2)
    with torch.no_grad():
        x = torch.from_numpy(images.images[:3]).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(theirs.encode(x).latent_dist.mode() * theirs.config.scaling_factor, latents)
        made = theirs.decode(latents / theirs.config.scaling_factor).sample
    pixels = np.rint(255 * (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    found = decode(vae, latents, batch=2)
    assert found.dtype == np.uint8
    assert np.abs(found - pixels).max() <= 1
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_moving_the_mean_leaves_images_as_they_were(
    images: ImageSet, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = load_autoencoder(whole)
    monkeypatch.setattr(autoencoder, "_standardise", lambda vae, images, settings: None)
    raw = train(images, tmp_path / "b")
    assert encode(raw, images.images).mean((0, 2, 3)).abs().max() > 0.01
    one, other = (decode(vae, encode(vae, images.images)).astype(int) for vae in (moved, raw))
    assert np.abs(one - other).max() <= 1
    assert raw.config.scaling_factor == 1


@pytest.mark.parametrize("after", [1, 4])
def test_killed_and_resumed_gives_the_same_weights(images: ImageSet, whole: Path, tmp_path: Path, after: int) -> None:
    interrupted(images, tmp_path / "a", TINY, after)
    assert [path.name for path in (tmp_path / "a" / CHECKPOINTS).iterdir()] == [f"visit-{after:08d}"]
    torch.rand(3)  # whatever was drawn in between
    train(images, tmp_path / "a")
    assert same(tmp_path / "a", whole)


def test_another_seed_gives_other_weights(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "a", tiny(seed=2))
    assert not same(tmp_path / "a", whole)


def test_what_is_there_is_read(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a" / CHECKPOINTS).mkdir()  # killed before it was removed
    found = train(images, tmp_path / "a", tiny(checkpoint_minutes=3.0))
    assert not (tmp_path / "a" / CHECKPOINTS).exists()
    assert same(tmp_path / "a", whole)
    expected = load_file(whole / WEIGHTS)
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.state_dict().items())
    assert not found.training


def test_the_accelerator_is_free_afterwards(images: ImageSet, tmp_path: Path) -> None:
    accelerator = Accelerator()
    train_autoencoder(images, TINY, tmp_path / "a", accelerator=accelerator)
    accelerator.prepare(torch.nn.Linear(2, 3))
    accelerator.save_state(str(tmp_path / "state"))
    assert [file.name for file in (tmp_path / "state").glob("*") if file.suffix != ".pkl"] == ["model.safetensors"]
    assert load_file(tmp_path / "state" / "model.safetensors").keys() == {"weight", "bias"}
    assert not list((tmp_path / "state").glob("custom_checkpoint_*"))


def test_own_images_held_out(images: ImageSet, tmp_path: Path) -> None:
    said: list[str] = []
    train(images, tmp_path / "a", held_out=images.take(np.arange(3)), progress=lambda what, share: said.append(what))
    assert said[-1].endswith("dB on 3 held-out images")
    one = ImageSet(images.images[:1], images.labels[:1], ())
    train(one, tmp_path / "b", tiny(batch=2), progress=lambda what, share: said.append(what))
    assert said[-1].endswith("dB on the 1 images it learnt from")


# What goes wrong


def test_a_disk_that_is_full_at_the_end(
    images: ImageSet, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", full)
        with pytest.raises(TargetError, match=r"cannot be written: .*No space left"):
            train(images, tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    train(images, tmp_path / "a")
    assert same(tmp_path / "a", whole)


def test_latents_that_are_all_alike(images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "encode", lambda vae, images: torch.full((36, 4, 8, 8), 3.0))
    with pytest.raises(TrainingError, match=r"latents are constant .*a kl_weight below 1e-06"):
        train(images, tmp_path / "a", tiny(updates=1))
    assert not (tmp_path / "a" / "config.json").exists()


def test_a_folder_of_another_training(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "a")
    other = ImageSet(255 - images.images, images.labels, images.names)
    with unchanged(tmp_path / "a"):
        with pytest.raises(TargetError, match="contains a training with latent_channels 4, not 8"):
            train(images, tmp_path / "a", tiny(latent_channels=8))
        with pytest.raises(TargetError, match="contains a training with other images"):
            train(other, tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": ()}, r"'block_out_channels' is \[\]; expected one or more multiples of"),
        ({"block_out_channels": (8, 18)}, r"'block_out_channels' is \[8, 18\]; .* multiples of norm_num_groups: 4"),
        ({"block_out_channels": "wide"}, "'block_out_channels': expected `array`"),
        ({"latent_channels": 0.5}, "'latent_channels': expected `int`"),
        ({"kl_weight": -1.0}, "'kl_weight' is -1.0; expected 0 or more"),
        ({"block_out_channels": (4,) * 6}, r"images are 16x16; expected a multiple of 32, which the 6 levels of"),
    ],
)
def test_settings_that_are_wrong(images: ImageSet, tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(images, tmp_path / "a", tiny(**change))
    assert not (tmp_path / "a").exists()


def test_settings_without_a_size() -> None:
    assert check_training(tiny(block_out_channels=(4,) * 6)).factor == 32


def test_sizes_that_the_levels_do_not_divide(images: ImageSet, whole: Path) -> None:
    vae = load_autoencoder(whole)
    with pytest.raises(ConfigError, match="images are 16x15; the autoencoder takes multiples of 2"):
        encode(vae, images.images[:, :15])
    assert reconstruction_psnr(vae, images.images[:, :, :8], batch=7) > 0


def _reword(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda folder: _reword(folder, _class_name="VQModel"),
            "is of class 'VQModel'; expected AutoencoderKL or AutoencoderTiny",
        ),
        (lambda folder: _reword(folder, block_out_channels=[8, 24]), "cannot be read as an autoencoder"),
        (lambda folder: _reword(folder, norm_num_groups=5), "cannot be read as an autoencoder"),
        (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read as an autoencoder"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"weights"), "cannot be read as an autoencoder"),
    ],
    ids=["missing", "json", "class", "shape", "groups", "weights", "damaged"],
)
def test_autoencoders_that_cannot_be_read(tmp_path: Path, spoil: Callable[[Path], object], words: str) -> None:
    folder = tmp_path / "a"
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    load_autoencoder(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_autoencoder(folder)
    assert "\n" not in str(caught.value)


def test_autoencoders_of_pipelines_and_of_other_channels(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "pipe" / "vae")
    assert load_autoencoder(tmp_path / "pipe").config.latent_channels == 4
    AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "grey")
    with pytest.raises(ModelError, match="has 1 channels; expected an autoencoder of RGB images"):
        load_autoencoder(tmp_path / "grey")


def test_an_autoencoder_that_shifts(images: ImageSet, whole: Path) -> None:
    vae = load_autoencoder(whole)
    plain = encode(vae, images.images[:2])
    vae.register_to_config(shift_factor=0.5)
    shifted = encode(vae, images.images[:2])
    torch.testing.assert_close(shifted, plain - 0.5 * vae.config.scaling_factor)
    assert np.array_equal(decode(vae, shifted), decode(load_autoencoder(whole), plain))
