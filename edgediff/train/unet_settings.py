"""What a training of a UNet is asked to do, teacher or student: frozen structs, read from strict YAML."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edgediff.config.recipes import find_recipe
from edgediff.config.strict import check_ranges, read_yaml, retyped, strict
from edgediff.errors import ConfigError
from edgediff.models.wavelet import check_wavelet

POSITIVE = ("updates", "batch", "learning_rate", "checkpoint_minutes", "sample_every", "clip")
# More is a slip of the pen, and would be found out only after hours or out of memory.
MOST = {"updates": 100_000_000, "batch": 65_536, "size": 8_192, "num_train_timesteps": 100_000, "width": 65_536}
# What a training that has begun may change; none of it makes other weights.
FREE = ("data", "held_out", "checkpoint_minutes", "sample_every")
# Where features are compared: what each level hands on on the way down (after its downsampler), after the mid block,
# what each level makes on the way up (before its upsampler), and the prediction itself. A cut is at such places.
POINTS = ("down", "mid", "up", "out")


class UNetTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What trainings of teachers and of students have in common.

    Attributes:
        data: A folder of images, a subfolder for each class where there are classes.
        held_out: A folder of images that are not learnt from; None holds back a tenth of each class of `data`.
        updates: Optimizer steps.
        batch: Images of an update, in each process.
        learning_rate: AdamW's highest.
        warmup: Updates in which it rises from 0.
        schedule: ``cosine`` down to zero at the end, or ``constant``.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient.
        ema: Decay of the averaged weights, which are what is kept.
        flip: Whether images are mirrored at random.
        label_dropout: Share of the images whose class is replaced by the null class, for guidance.
        precision: ``bf16`` mixes precisions, which pays on accelerators and not on most CPUs.
        sample_every: Updates between sample grids and held-out losses; None makes them at the end only.
        checkpoint_minutes: Between checkpoints.
        seed: Of weights, order and noise.
    """

    data: str | None = None
    held_out: str | None = None
    updates: int = 10_000
    batch: int = 64
    learning_rate: float = 4e-4
    warmup: int = 200
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    flip: bool = True
    label_dropout: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    sample_every: int | None = None
    checkpoint_minutes: float = 5.0
    seed: int = 0


class StudentTraining(UNetTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A slim UNet and its distillation (Spectral Diffusion, section 4; lambdas and alpha are the paper's).

    With both lambdas at 0 there is no distillation: what is learnt is the data alone, and the teacher lends its
    geometry, schedule and classes.

    Attributes:
        teacher: A diffusers directory or a built-in name.
        student: A model to go on from, by directory or name, with a schedule of its own; None makes a new one of the
            teacher's geometry, which `width`, `gating`, `wavelet` and `gate_takes_time` then shape.
        width: Channels of the student's highest level; None keeps the teacher's.
        gating: Wavelet gating; without it the student is the plain small UNet.
        wavelet: The gating's filter.
        gate_takes_time: Whether gates look at the time embedding.
        spatial: Lambda of the spatial term.
        frequency: Lambda of the frequency term.
        alpha: Exponent of the frequency weights; 0 weighs all frequencies alike.
        points: Where features are compared: ``down``, ``mid``, ``up`` (after each level) and ``out`` (the prediction).
    """

    teacher: str | None = None
    student: str | None = None
    width: int | None = None
    gating: bool = True
    wavelet: str = "haar"
    gate_takes_time: bool = False
    spatial: float = 0.1
    frequency: float = 0.1
    alpha: float = -1.0
    points: tuple[Literal["down", "mid", "up", "out"], ...] = POINTS  # type: ignore[assignment]

    @property
    def distils(self) -> bool:
        """Whether the teacher's features are learnt from."""
        return self.spatial > 0 or self.frequency > 0


class TeacherTraining(UNetTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A UNet trained from scratch.

    Attributes:
        model: Whose geometry is trained: a diffusers directory or a built-in name, without its weights.
        unet: Or the geometry itself: settings of a diffusers UNet, ``_class_name`` among them.
        size: Height and width of the images in pixels; None takes what the geometry has.
        classes: Whether the folder's classes are learnt; without, the model is conditioned on nothing.
        prediction_type: What the UNet predicts.
        beta_schedule: Of the noise.
        num_train_timesteps: Time steps of the noise.
        autoencoder: Settings of a small KL autoencoder whose latents are learnt in the place of pixels, or a directory
            of one; None learns pixels.
    """

    model: str | None = None
    unet: dict[str, Any] | None = None
    size: int | None = None
    classes: bool = True
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    autoencoder: str | dict[str, Any] | None = None


T = TypeVar("T", bound=UNetTraining)


def load_training(path: str | Path, kind: type[T]) -> T:
    """Reads a YAML file of settings strictly.

    Args:
        path: The file, or the name of a built-in recipe.
        kind: `StudentTraining` or `TeacherTraining`.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The file cannot be read, or a key in it is unknown, mistyped or out of range.
    """
    return read_yaml(find_recipe(path, "train"), lambda data: training_from(data, kind), "settings")


def training_from(data: Any, kind: type[T]) -> T:
    """Builds checked settings from plain data.

    Args:
        data: A mapping as YAML gives it.
        kind: `StudentTraining` or `TeacherTraining`.

    Returns:
        The checked settings.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), mistyped or out of range.

    >>> training_from({"alpha": 0}, StudentTraining).alpha
    0.0
    """
    return check_training(strict(data, kind))


def check_training(settings: T) -> T:
    """Holds the rules that types cannot.

    Args:
        settings: Any settings, also built by hand.

    Returns:
        The same, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    settings = retyped(settings)
    check_ranges(settings, POSITIVE, ("warmup", "weight_decay"), ("ema", "label_dropout"))
    for name, most in MOST.items():
        value = getattr(settings, name, None)
        if value is not None and value > most:
            raise ConfigError(f"'{name}' is {value}; expected at most {most}")
    if isinstance(settings, StudentTraining):
        _check_student(settings)
    if isinstance(settings, TeacherTraining):
        _check_teacher(settings)
    return settings


def _check_student(settings: StudentTraining) -> None:
    check_wavelet(settings.wavelet)
    if settings.student is not None and settings.width is not None:
        raise ConfigError("'student' and 'width' were given: a student that is there has its width; leave one out")
    check_ranges(settings, from_0=("spatial", "frequency"))
    if not -4 <= settings.alpha <= 4:
        raise ConfigError(f"'alpha' is {settings.alpha}; expected -4 to 4 (the paper's is -1)")
    if not settings.points or len(set(settings.points)) != len(settings.points):
        raise ConfigError(f"'points' is {list(settings.points)}; expected one or more of {', '.join(POINTS)}")


def _check_teacher(settings: TeacherTraining) -> None:
    if (settings.model is None) == (settings.unet is None):
        given = "neither" if settings.model is None else "both"
        raise ConfigError(f"'model' and 'unet': {given} given; expected one geometry, by name or by its settings")
    if settings.size is not None and settings.size < 1:
        raise ConfigError(f"'size' is {settings.size}; expected a number of pixels")
    if settings.num_train_timesteps < 2:
        raise ConfigError(f"'num_train_timesteps' is {settings.num_train_timesteps}; expected 2 or more")
