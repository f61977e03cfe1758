"""Training a slim student (Spectral Diffusion, section 4): wavelet gating, images and a teacher to learn from."""

from dataclasses import replace
from pathlib import Path

import torch

from edgediff.errors import ConfigError, ModelError
from edgediff.models.load import Model, load_model
from edgediff.models.slim import slim
from edgediff.models.spectral import spectralize
from edgediff.train.dataset import read_data
from edgediff.train.latents import FOLDER, autoencoder_of, hash_of_autoencoder, load_autoencoder
from edgediff.train.learner import check_pair
from edgediff.train.loop import Say, begin
from edgediff.train.settings import StudentTraining, check_training
from edgediff.train.text import text_of
from edgediff.train.unet import UNetTrained, train_unet


def train_student(path: str | Path, settings: StudentTraining, *, progress: Say | None = None) -> UNetTrained | None:
    """Trains a student in the folder `path`, or resumes an interrupted training of the same settings.

    Returns:
        None where the student is there already.

    Raises:
        ConfigError: The settings do not fit, or teacher and student do not: their geometries, autoencoders or text
            encoders differ.
        DataError: The images cannot be read, or do not fit the teacher.
        ModelError: The teacher cannot be loaded, or has no scheduler.
        TargetError: Something else is in the folder, another training runs there, or the disk is full.
        TrainingError: The loss is not finite; the last good checkpoint is kept.
        UnsupportedError: The teacher's resampling cannot be gated.
    """
    settings = check_training(settings)
    if settings.teacher is None:
        raise ConfigError("no teacher: name a diffusers directory or a built-in model, 'teacher' in the settings")
    path = Path(path)
    accelerator, say = begin(path, progress, settings.precision)
    teacher = load_model(settings.teacher)
    teacher.check_schedule()
    if settings.distils and not teacher.has_weights:
        raise ConfigError(f"the teacher {teacher.name} is a geometry without weights: there is nothing to learn from")
    model = student_of(teacher, settings)
    check_pair(teacher, model)
    vae, size = autoencoder_of(teacher)
    text = text_of(teacher, learns=False) if teacher.conditioning.kind == "text" else None
    sources = {"another teacher": teacher.sha256}
    if vae is not None:
        sources["another autoencoder"] = hash_of_autoencoder(vae)
    if text is not None:
        sources["another text encoder"] = text.digest()
    if settings.student is not None:
        sources["another student"] = model.sha256
        check_components(teacher, model, sources)
    return train_unet(
        replace(model, name=path.resolve().name),
        read_data(settings, size, say, captioned=text is not None),
        path,
        settings,
        accelerator=accelerator,
        teacher=teacher,
        autoencoder=None if vae is None else lambda: vae.to(accelerator.device),
        text=text,
        sources=sources,
        say=say,
    )


def check_components(teacher: Model, student: Model, sources: dict[str, str]) -> None:
    """Refuses a student whose autoencoder or text encoder is not the teacher's, of which `sources` has the hashes."""
    found = {}
    if "another autoencoder" in sources:
        if student.space == "pixel":
            raise ConfigError(f"the teacher {teacher.name} works on latents, the student on pixels; expected the same")
        found["another autoencoder"] = hash_of_autoencoder(load_autoencoder(student.home / FOLDER))
    if "another text encoder" in sources:
        found["another text encoder"] = text_of(student, learns=False).digest()
    for what, digest in found.items():
        if digest != sources[what]:
            raise ConfigError(f"the teacher {teacher.name} has {what} than the student: expected the same")


def student_of(teacher: Model, settings: StudentTraining) -> Model:
    """The student that a training begins with: an existing one, or a new one of the teacher's geometry and classes.

    Raises:
        ConfigError: The width does not fit.
        ModelError: The student that is named cannot be loaded, or has no scheduler.
        UnsupportedError: The teacher's resampling cannot be gated.
    """
    if settings.student is not None:
        student = load_model(settings.student)
        if student.scheduler is None or not student.has_weights:
            raise ModelError(f"{student.path} has no scheduler or no weights; expected a whole model to continue from")
        return student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.gating:
            unet = spectralize(teacher.unet, settings.width, settings.wavelet, settings.gate_takes_time)
        else:
            unet = slim(teacher.unet, settings.width)
    return replace(teacher, unet=unet)
