"""Training a teacher: any diffusers UNet, from scratch or further, on images or latents, with classes or captions."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from edgediff.config.strict import strict
from edgediff.data.image_folder import ImageSet
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
from edgediff.train.latents import FOLDER, Autoencoder, autoencoder_of, factor_of, hash_of_autoencoder, load_autoencoder
from edgediff.train.loop import Say, begin
from edgediff.train.settings import (
    MOST,
    AutoencoderTraining,
    TeacherTraining,
    TextGeometry,
    check_training,
    training_from,
)
from edgediff.train.text import STATES, Text, load_text, new_text, text_of
from edgediff.train.unet import UNetTrained, train_unet
from edgediff_runtime.errors import one_line

# Conditioning of a geometry that images in folders do not have.
_UNCLASSED = {"class_embed_type": None, "num_class_embeds": None}
# diffusers' own, of a geometry that does not say it.
_TEXT_WIDTH = 1280


def train_teacher(path: str | Path, settings: TeacherTraining, *, progress: Say | None = None) -> UNetTrained | None:
    """Trains a UNet in the folder `path`, or resumes an interrupted training of the same settings.

    It begins anew, or as the model `start`, whose autoencoder stays as it is; a text encoder learns beside it unless it
    is given.

    Returns:
        None where the model is there already.

    Raises:
        ConfigError: The settings, the geometry and the images do not fit together.
        DataError: The images cannot be read.
        ModelError: A model, an autoencoder or a text encoder cannot be loaded.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
        UnsupportedError: The geometry's levels do not divide the size, or the model takes more than text or classes.
    """
    settings = check_training(settings)
    if settings.start is None and settings.model is None and settings.unet is None:
        raise ConfigError(
            "no UNet: name a model to train further (--from, or 'start' in the settings), or a geometry ('model' or "
            "'unet')"
        )
    path = Path(path)
    accelerator, say = begin(path, progress, settings.precision)
    if settings.start is not None:
        return _train_further(settings.start, path, settings, accelerator, say)
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
    data = read_data(settings, size, say, captioned=settings.text is not None)
    text = _text(settings, config, data[0])
    labels = data[0].names if settings.classes and text is None else ()
    model = _teacher(path, kind, config, labels, text, settings, size // factor, latent)
    sources = {"another geometry": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()}
    if given is not None:
        sources["another autoencoder"] = hash_of_autoencoder(given)
    if text is not None and not text.learns:
        sources["another text encoder"] = text.digest()

    def autoencoder() -> Autoencoder:
        if given is not None:
            return given.to(accelerator.device)
        return train_autoencoder(data[0], asked, path / FOLDER, accelerator=accelerator, held_out=data[1], progress=say)

    made = None if latent is None else autoencoder
    return train_unet(
        model, data, path, settings, accelerator=accelerator, autoencoder=made, text=text, sources=sources, say=say
    )


def _train_further(
    start: str, path: Path, settings: TeacherTraining, accelerator: Accelerator, say: Say
) -> UNetTrained | None:
    model = load_model(start)
    model.check_schedule()
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights; name it as 'model' to train it from scratch")
    vae, size = autoencoder_of(model)
    sources = {"another model to start from": model.sha256}
    if vae is not None:
        sources["another autoencoder"] = hash_of_autoencoder(vae)
    text = None
    if model.conditioning.kind == "text":
        text = text_of(model, learns=True) if settings.text is None else load_text(str(settings.text))
        if text.conditioning != model.conditioning:
            theirs, own = (each.tensors[STATES].shape for each in (model.conditioning, text.conditioning))
            raise ConfigError(f"the text encoder gives {list(own)}; {model.name} takes {list(theirs)}")
        sources["another text encoder"] = text.digest()
    elif settings.text is not None:
        raise ConfigError(f"'text' was given, but {model.name} takes no text; leave it out")
    return train_unet(
        replace(model, name=path.resolve().name),
        read_data(settings, size, say, captioned=text is not None),
        path,
        settings,
        accelerator=accelerator,
        autoencoder=None if vae is None else lambda: vae.to(accelerator.device),
        text=text,
        sources=sources,
        say=say,
    )


def _text(settings: TeacherTraining, config: dict[str, Any], data: ImageSet) -> Text | None:
    """The text encoder of a new model: a given one, or a new one that has learnt the words of the captions."""
    if settings.text is None:
        return None
    if isinstance(settings.text, str):
        return load_text(settings.text)
    width = config.get("cross_attention_dim", _TEXT_WIDTH)
    if not isinstance(width, int):
        raise ConfigError(f"the geometry has cross_attention_dim {width!r}; expected one number")
    captions = (wording for caption in data.captions for form in caption for wording in form)
    return new_text(strict(settings.text, TextGeometry), width, captions, settings.seed)


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
    text: Text | None,
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
    conditioning = Conditioning("class" if labels else "none", tensors, labels, len(labels) if labels else None)
    if text is not None:
        conditioning = text.conditioning
    _check_text(kind, unet.config, text)
    check_size(side, side, 2 ** sum(1 for block in unet.down_blocks if block.downsamplers is not None))
    _check_runs(unet, channels, side, conditioning)
    scheduler: Any = DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction_type,
        clip_sample=latent is None,
    )
    if text is not None:  # diffusers' pipeline samples with what lies there, and DDPM takes every step
        scheduler = DPMSolverMultistepScheduler.from_config(
            scheduler.config, timestep_spacing="trailing", steps_offset=1
        )
    return Model(
        name=path.resolve().name,
        unet=unet,
        scheduler=scheduler,
        conditioning=conditioning,
        space="pixel" if latent is None else "latent",
        card=Card("unknown", None, ""),
        sha256="",
        path=path,
        home=path,
    )


def _check_text(kind: Any, config: Any, text: Text | None) -> None:
    """Refuses a geometry that looks at text where there is none, and one that does not where there is."""
    looks = looks_at_text({**config, "_class_name": kind.__name__})
    if config.get("addition_embed_type") is not None or (looks and text is None):
        raise ConfigError(
            "the geometry is conditioned on text; expected 'text' in the settings (of a text encoder, or the directory "
            "of one) and no addition_embed_type, or a geometry without text"
        )
    if text is None:
        return
    if not looks:
        raise ConfigError("'text' was given, but the geometry has no cross-attention; leave 'text' out, or add a block")
    given, taken = text.encoder.config.hidden_size, config["cross_attention_dim"]
    if given != taken:
        raise ConfigError(f"the text is {given} wide; the geometry has cross_attention_dim {taken}")


@torch.no_grad()
def _check_runs(unet: Any, channels: int, side: int, known: Conditioning) -> None:
    """Runs the UNet once, at the least noise: some settings fail only then, or give NaN there."""
    cond = {name: torch.zeros(1, *spec.shape, dtype=spec.dtype) for name, spec in known.tensors.items()}
    if known.null_label is not None:
        cond["class_labels"] += known.null_label
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
