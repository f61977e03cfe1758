"""Training a teacher: any diffusers UNet geometry, from scratch, on images or on the latents of an autoencoder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from edgediff.errors import ConfigError
from edgediff.models.card import Card
from edgediff.models.clockwork import check_size
from edgediff.models.conditioning import Conditioning, TensorSpec, looks_at_text
from edgediff.models.load import UNETS, Model, load_model
from edgediff.models.model_files import BAD_SETTINGS
from edgediff.models.slim import plain_config
from edgediff.models.undivided import predict
from edgediff.train.autoencoder import check_autoencoder, train_autoencoder
from edgediff.train.dataset import read_data
from edgediff.train.latents import FOLDER, factor_of, hash_of_autoencoder, load_autoencoder
from edgediff.train.loop import Say, begin
from edgediff.train.settings import MOST, AutoencoderTraining, TeacherTraining, check_training, training_from
from edgediff.train.unet import UNetTrained, train_unet
from edgediff_runtime.errors import one_line

# Conditioning of a geometry that images in folders do not have.
_UNCLASSED = {"class_embed_type": None, "num_class_embeds": None}


def train_teacher(path: str | Path, settings: TeacherTraining, *, progress: Say | None = None) -> UNetTrained | None:
    """Trains a UNet from scratch in the folder `path`, or resumes an interrupted training of the same settings.

    Returns:
        None where the model is there already.

    Raises:
        ConfigError: The settings, the geometry and the images do not fit together.
        DataError: The images cannot be read.
        ModelError: The geometry or the autoencoder cannot be loaded.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
        UnsupportedError: The geometry's levels do not divide the size.
    """
    settings = check_training(settings)
    path = Path(path)
    accelerator, say = begin(path, progress, settings.precision)
    kind, config = geometry_of(settings)
    own = settings.autoencoder
    given = load_autoencoder(own) if isinstance(own, str) else None
    asked = training_from(own, AutoencoderTraining) if isinstance(own, dict) else None
    factor, latent = 1, None
    if given is not None:
        factor, latent = factor_of(given), given.config.latent_channels
    elif asked is not None:
        factor, latent = asked.factor, asked.latent_channels
    size = factor * _side(config) if settings.size is None else settings.size
    if size % factor:
        raise ConfigError(f"'size' is {size}; expected a multiple of {factor}, which the autoencoder divides by")
    if asked is not None:
        check_autoencoder(asked, size)
    data = read_data(settings, size, say)
    labels = data[0].names if settings.classes else ()
    model = _teacher(path, kind, config, labels, settings, size // factor, latent)
    sources = {"another geometry": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()}
    if given is not None:
        sources["another autoencoder"] = hash_of_autoencoder(given)

    def autoencoder() -> AutoencoderKL:
        if given is not None:
            return given.to(accelerator.device)
        return train_autoencoder(data[0], asked, path / FOLDER, accelerator=accelerator, held_out=data[1], progress=say)

    made = None if latent is None else autoencoder
    return train_unet(model, data, path, settings, accelerator=accelerator, autoencoder=made, sources=sources, say=say)


def geometry_of(settings: TeacherTraining) -> tuple[Any, dict[str, Any]]:
    """The UNet's class and its arguments, of the model or the settings that are given.

    Raises:
        ConfigError: The class is unknown.
        ModelError: The model cannot be loaded.
    """
    if settings.model is not None:
        unet = load_model(settings.model).unet
        return type(unet), plain_config(unet)
    assert settings.unet is not None
    config = dict(settings.unet)
    name = config.pop("_class_name", None)
    if str(name) not in UNETS:
        raise ConfigError(f"'unet' has _class_name {name!r}; choices: {', '.join(UNETS)}")
    return UNETS[str(name)], {key: value for key, value in config.items() if not key.startswith("_")}


def _teacher(
    path: Path,
    kind: Any,
    config: dict[str, Any],
    labels: tuple[str, ...],
    settings: TeacherTraining,
    side: int,
    latent: int | None,
) -> Model:
    """The model that the training begins with, `side` high and wide; `latent` is the number of latent channels."""
    channels = 3 if latent is None else latent
    config = config | _UNCLASSED | {"sample_size": side, "in_channels": channels, "out_channels": channels}
    tensors: dict[str, TensorSpec] = {}
    if labels:
        config["num_class_embeds"] = len(labels) + 1
        tensors["class_labels"] = TensorSpec((), torch.int64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            unet = kind(**config).eval()
    except BAD_SETTINGS as e:
        raise ConfigError(f"the geometry does not make a {kind.__name__}: {one_line(e)[:200]}") from e
    whole = {**unet.config, "_class_name": kind.__name__}
    if whole.get("addition_embed_type") is not None or looks_at_text(whole):
        raise ConfigError("the geometry is conditioned on text; expected classes, or no condition")
    check_size(side, side, 2 ** sum(1 for block in unet.down_blocks if block.downsamplers is not None))
    _check_runs(unet, channels, side, len(labels))
    scheduler = DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction_type,
        clip_sample=latent is None,
    )
    return Model(
        name=path.resolve().name,
        unet=unet,
        scheduler=scheduler,
        conditioning=Conditioning("class" if labels else "none", tensors, labels, len(labels) if labels else None),
        space="pixel" if latent is None else "latent",
        card=Card("unknown", None, ""),
        sha256="",
        path=path,
        home=path,
    )


@torch.no_grad()
def _check_runs(unet: Any, channels: int, side: int, null_label: int) -> None:
    """Runs the UNet once, at the least noise: some settings fail only then, or give NaN there."""
    cond = {"class_labels": torch.tensor([null_label])} if null_label else {}
    try:
        out = predict(unet, torch.zeros(1, channels, side, side), torch.zeros(1), cond)
    except BAD_SETTINGS as e:
        raise ConfigError(f"the geometry cannot run at {side}x{side}: {one_line(e)[:200]}") from e
    if out.shape != (1, channels, side, side):
        raise ConfigError(f"the geometry makes {list(out.shape)} of {[1, channels, side, side]}; expected the same")
    if not out.isfinite().all():
        raise ConfigError("the geometry gives NaN or infinity at time step 0, before anything is learnt")


def _side(config: dict[str, Any]) -> int:
    size = config.get("sample_size")
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST["size"]:
        raise ConfigError(f"the geometry has sample_size {size!r}; expected one number, or 'size' in the settings")
    return size
