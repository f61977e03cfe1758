"""What a training is asked to do: frozen structs, read from strict YAML. README.md explains every key."""

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from edgediff.config.choices import Cut, SchedulerName
from edgediff.config.recipes import find_recipe
from edgediff.config.strict import check_ranges, clock_to_text, read_yaml, retyped, strict
from edgediff.errors import ConfigError
from edgediff.models.adaptors import Kind
from edgediff.models.wavelet import check_wavelet
from edgediff.outputs import as_text
from edgediff_runtime.clock import clock_mask
from edgediff_runtime.conditioning import MAX_IMAGES
from edgediff_runtime.errors import RequestError

# Where features are compared: the output of each level on the way down (after its downsampler), the mid block's, the
# output of each level on the way up (before its upsampler), and the prediction itself. A cut is at such places.
POINTS = ("down", "mid", "up", "out")
# More is a typing error, and would show only after hours or as a lack of memory.
MOST = {
    "updates": 100_000_000, "batch": 65_536, "size": 8_192, "num_train_timesteps": 100_000, "width": 65_536,
    "images": MAX_IMAGES, "draws": 1_000_000, "rounds": 2**20 - 1, "vocab_size": 65_536,
    "max_position_embeddings": 1024,
}  # fmt: skip
ABOVE_0 = (
    "updates", "draws", "steps", "teacher_steps", "batch", "learning_rate", "checkpoint_minutes", "sample_every",
    "clip", "rounds", "images", "passes", "store_gb", "guidance_scale", "latent_channels", "layers_per_block",
    "norm_num_groups", "size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads",
    "intermediate_size",
)  # fmt: skip
FROM_0 = ("warmup", "weight_decay", "output_weight", "spatial", "frequency", "kl_weight", "edge_weight", "latent_noise")
MOST_BLOCKS = 64
SHARES = ("ema", "label_dropout")
# All bytes, alone and at the end of a word, and two tokens around a caption.
SMALLEST_VOCABULARY = 2 * 256 + 2


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all trainings have in common; `free` are the settings that may differ when one is resumed."""

    batch: int = 64
    learning_rate: float = 4e-4
    ema: float = 0.999
    checkpoint_minutes: float = 5.0
    seed: int = 0

    free: ClassVar[tuple[str, ...]] = ("learning_rate", "checkpoint_minutes")

    def check(self) -> None:
        """Checks what neither types nor ranges of single fields say; a ConfigError where it does not fit."""


class AdaptorTraining(Training, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An adaptor's (Clockwork Diffusion, section 3.3; the paper's: Adam, 1e-4, batch 16, plain L2 on r_out).

    Attributes:
        steps, scheduler, guidance_scale: What is learnt for; None takes what the model is usually sampled with.
        rollout: Whose trajectories are learnt from: ``teacher`` runs every step in full, as the paper does; ``student``
            runs the clock with the adaptor so far, so that its own outputs are fed back.
        images: Trajectories of a round, in each process.
        batch: Rows of a cached step in an update.
        output_weight: Weight of a second loss on ``out_sample``, relative to the identity's; 0 leaves it out.
        strengths: Of edits that are learnt from too, 0 to 1: with two of them, every third round has pictures as usual,
            the next edits at the first strength, and so on. An edit's picture is one that the model drew of another
            prompt. Empty has no edits, and 1 is from noise.
        store_gb: Most GB (1e9 bytes) of trajectories to store and to learn from in every pass; None draws new ones.
    """

    model: str | None = None
    adaptor: Kind = "resnet"
    takes_text: bool = False
    cut: Cut = Cut()
    clock: int | str = 2
    steps: int | None = None
    scheduler: SchedulerName | None = None
    guidance_scale: float | None = None
    rollout: Literal["teacher", "student"] = "teacher"
    rounds: int = 200
    images: int = 16
    passes: int = 1
    batch: int = 16
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    output_weight: float = 0.0
    strengths: tuple[float, ...] = ()
    store_gb: float | None = None
    conditioning: str | None = None

    free: ClassVar[tuple[str, ...]] = (*Training.free, "store_gb")

    def check(self) -> None:
        """Checks the store, the strengths, and the clock where the steps are known."""
        for strength in self.strengths:
            if not 0 < strength <= 1:
                raise ConfigError(f"'strengths' has {strength:g}; expected numbers above 0, 1 at most")
        if self.store_gb is not None and self.rollout == "student":
            raise ConfigError(
                "'store_gb' with rollout student: its trajectories change with the adaptor and cannot be stored; "
                "leave store_gb out, or learn from the teacher's"
            )
        if self.steps is not None and self.scheduler is not None:
            check_clock(self.clock, self.steps, self.scheduler)


class FewStepsTraining(Training, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Distillation to a few steps without guidance, with an adaptor beside the UNet; by AdamW.

    Attributes:
        teacher: Whose trajectories are learnt from; None takes the model's own.
        steps: Of the result.
        teacher_steps: A multiple of `steps`; None is four times as many.
        scheduler, guidance_scale: The teacher's; None takes what it is usually sampled with.
        clock: With cached steps, an adaptor learns beside the UNet; 1 has none.
        images: Trajectories of a round, in each process; all are stored, and each is learnt from `passes` times.
        batch: Trajectories of an update, each with all its steps.
        store_gb: Most GB (1e9 bytes) that they may take; None leaves that to the disk.
    """

    model: str | None = None
    teacher: str | None = None
    steps: int = 4
    teacher_steps: int | None = None
    scheduler: SchedulerName | None = None
    guidance_scale: float | None = None
    clock: int | str = 2
    adaptor: Kind = "resnet"
    takes_text: bool = False
    cut: Cut = Cut()
    rounds: int = 64
    images: int = 64
    passes: int = 40
    batch: int = 16
    learning_rate: float = 3e-4
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    store_gb: float | None = None
    conditioning: str | None = None

    free: ClassVar[tuple[str, ...]] = ("checkpoint_minutes", "store_gb")

    @property
    def from_steps(self) -> int:
        """The teacher's steps."""
        return 4 * self.steps if self.teacher_steps is None else self.teacher_steps

    def check(self) -> None:
        """Checks the steps and the clock."""
        if self.from_steps <= self.steps or self.from_steps % self.steps:
            raise ConfigError(
                f"'teacher_steps' is {self.from_steps} for {self.steps} steps; expected a multiple of them: "
                f"{2 * self.steps}, {3 * self.steps}, {4 * self.steps}, ..."
            )
        mask_of(self.clock, self.steps, "ddim")


class AutoencoderTraining(Training, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A small KL autoencoder's, by AdamW.

    Attributes:
        block_out_channels: Channels of each level; every level but the first halves the map.
        kl_weight: Weight of a latent's KL divergence from the standard normal beside the absolute error, both summed,
            as in latent diffusion.
    """

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    updates: int = 5000
    batch: int = 16
    learning_rate: float = 1e-3
    kl_weight: float = 1e-6
    flip: bool = True

    @property
    def factor(self) -> int:
        """How many pixels of a side become one of a latent."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def check(self) -> None:
        """Checks the levels."""
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width < 1 or width % groups for width in widths):
            expected = f"one or more multiples of norm_num_groups: {groups}"
            raise ConfigError(f"'block_out_channels' is {list(widths)}; expected {expected}")


class ImageTraining(Training, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What trainings on a folder of images have in common; all by AdamW.

    Attributes:
        only: By column, a file of the values to learn, one a line.
    """

    data: str | None = None
    held_out: str | None = None
    only: dict[str, str] | None = None
    updates: int = 10_000
    warmup: int = 200
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    flip: bool = True
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    sample_every: int | None = None

    # Of the first three, what is read counts.
    free: ClassVar[tuple[str, ...]] = ("data", "held_out", "only", "checkpoint_minutes", "sample_every")


class DecoderTraining(ImageTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder's, for the latents of a pipeline's autoencoder, which stay as they are.

    Attributes:
        model: The pipeline, a diffusers directory or a built-in name; or the directory of an autoencoder.
        tiny: Channels and blocks of an AutoencoderTiny, which is then trained instead; its encoder learns the latents.
        edge_weight: Weight of the absolute error of the details (Haar's, of `DETAIL_LEVELS` sizes) beside that of the
            pixels.
        latent_noise: Standard deviation of the noise on the latents that are decoded, whose own is about 1: the latents
            that a UNet makes are not exact.
        size: Height and width of the images in pixels; None takes the autoencoder's, where it says so.
    """

    model: str | None = None
    size: int | None = None
    tiny: dict[str, Any] | None = None
    batch: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    edge_weight: float = 1.0
    latent_noise: float = 0.1


class TinyGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The geometry of an AutoencoderTiny, as wide at all sizes.

    Attributes:
        channels: Of all its layers.
        encoder_blocks, decoder_blocks: Residual blocks at each size, the largest first in the encoder and last in the
            decoder; None has one in the encoder and two in the decoder.
    """

    channels: int = 32
    encoder_blocks: tuple[int, ...] | None = None
    decoder_blocks: tuple[int, ...] | None = None

    def check(self) -> None:
        """Checks the numbers; a ConfigError where one does not fit."""
        check_ranges(self, ("channels",))
        if self.channels > MOST["width"]:
            raise ConfigError(f"'tiny.channels' is {self.channels}; expected at most {MOST['width']}")
        for name in ("encoder_blocks", "decoder_blocks"):
            blocks = getattr(self, name)
            if blocks is not None and any(not 0 <= count <= MOST_BLOCKS for count in blocks):
                raise ConfigError(f"'tiny.{name}' is {list(blocks)}; expected 0 to {MOST_BLOCKS} for each size")


class UNetTraining(ImageTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What trainings of teachers and of students have in common.

    Attributes:
        captions: Of a model with text: the forms that captions take, of an image's columns; None is the text itself.
        guidance_scale: Of the sample grids; None takes what the model is usually sampled with.
    """

    captions: tuple[str, ...] | None = None
    label_dropout: float = 0.1
    guidance_scale: float | None = None

    free: ClassVar[tuple[str, ...]] = (*ImageTraining.free, "guidance_scale")

    def check(self) -> None:
        """Checks that captions have a form."""
        if self.captions is not None and not self.captions:
            raise ConfigError("'captions' is empty; expected one or more forms, such as '{text}', or no 'captions'")


class StudentTraining(UNetTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A slim UNet and its distillation (Spectral Diffusion, section 4; lambdas and alpha are the paper's).

    Attributes:
        student: A model to continue from, with a schedule of its own; None makes a new one of the teacher's geometry,
            which `width`, `gating`, `wavelet` and `gate_takes_time` change.
        width: Channels of the student's highest level, or of each level; None keeps the teacher's.
        spatial, frequency: The lambdas; with both at 0 nothing is learnt from the teacher.
        alpha: Exponent of the frequency weights; 0 weighs all frequencies alike.
        draws: Updates for which images, noise and time steps are drawn; after them the same ones come again, and the
            teacher's features of each are computed once, and stored. None draws anew for each update.
    """

    teacher: str | None = None
    student: str | None = None
    width: int | tuple[int, ...] | None = None
    gating: bool = True
    wavelet: str = "haar"
    gate_takes_time: bool = False
    spatial: float = 0.1
    frequency: float = 0.1
    alpha: float = -1.0
    points: tuple[Literal["down", "mid", "up", "out"], ...] = POINTS  # type: ignore[assignment]
    draws: int | None = None

    @property
    def distils(self) -> bool:
        """Whether the teacher's features are learnt from."""
        return self.spatial > 0 or self.frequency > 0

    def check(self) -> None:
        """Checks the student's shape and the terms."""
        super().check()
        check_wavelet(self.wavelet)
        if self.student is not None and self.width is not None:
            raise ConfigError("'student' and 'width' were given: an existing student has its own width; leave one out")
        if not -4 <= self.alpha <= 4:
            raise ConfigError(f"'alpha' is {self.alpha}; expected -4 to 4 (the paper's is -1)")
        if not self.points or len(set(self.points)) != len(self.points):
            raise ConfigError(f"'points' is {list(self.points)}; expected one or more of {', '.join(POINTS)}")


class TextGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A small CLIP text encoder that is trained beside the UNet, as wide as the UNet's cross-attention takes.

    Attributes:
        vocab_size: Of byte pairs that are learnt from the captions: all bytes, alone and at the end of a word, those
            that are joined, and the two that begin and end a caption.
        max_position_embeddings: Tokens of a caption, with those two.
        intermediate_size: Of each layer's MLP; None is four times the width.
    """

    vocab_size: int = 2000
    max_position_embeddings: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int | None = None

    def check(self) -> None:
        """Checks the numbers; a ConfigError where one does not fit."""
        check_ranges(self, tuple(name for name in ABOVE_0 if name in self.__struct_fields__))
        if not SMALLEST_VOCABULARY <= self.vocab_size <= MOST["vocab_size"]:
            raise ConfigError(
                f"'text.vocab_size' is {self.vocab_size}; expected {SMALLEST_VOCABULARY} to {MOST['vocab_size']}"
            )
        if not 3 <= self.max_position_embeddings <= MOST["max_position_embeddings"]:
            raise ConfigError(
                f"'text.max_position_embeddings' is {self.max_position_embeddings}; expected 3 to "
                f"{MOST['max_position_embeddings']}"
            )


class TeacherTraining(UNetTraining, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A UNet trained from scratch, or further.

    Attributes:
        start: A whole model that is trained further, a diffusers directory or a built-in name; its autoencoder stays.
        model: Whose geometry is trained, without its weights: a diffusers directory or a built-in name.
        unet: Or the geometry itself: settings of a diffusers UNet with its ``_class_name``.
        size: Height and width of the images in pixels; None takes the geometry's.
        classes: Whether the model is conditioned on the folder's classes, where it takes no text.
        text: Settings of a small text encoder that is trained beside the UNet, or a directory of one, which stays as it
            is: the model is then conditioned on captions.
        autoencoder: Settings of a small KL autoencoder that is trained first, or a directory of one: the UNet then
            learns latents. None learns pixels.
    """

    start: str | None = None
    model: str | None = None
    unet: dict[str, Any] | None = None
    size: int | None = None
    classes: bool = True
    text: str | dict[str, Any] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    autoencoder: str | dict[str, Any] | None = None

    def check(self) -> None:
        """Checks that there is one geometry, and the schedule's length."""
        super().check()
        given = [name for name in ("start", "model", "unet") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"'{given[0]}' and '{given[1]}' were given; expected one of start, model and unet")
        own = [name for name in _OF_A_NEW_MODEL if getattr(self, name) != _DEFAULTS[name]]
        own += ["text"] if isinstance(self.text, dict) else []
        if self.start is not None and own:
            raise ConfigError(f"'{own[0]}' with 'start': a model that is trained further has its own; leave it out")
        if self.num_train_timesteps < 2:
            raise ConfigError(f"'num_train_timesteps' is {self.num_train_timesteps}; expected 2 or more")


_OF_A_NEW_MODEL = ("size", "classes", "prediction_type", "beta_schedule", "num_train_timesteps", "autoencoder")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(TeacherTraining)}

T = TypeVar("T", bound=Training)


def load_training(path: str | Path, kind: type[T]) -> T:
    """Reads a YAML file of settings strictly; for teachers and students also a built-in recipe, by its name.

    Raises:
        ConfigError: The file cannot be read, or a key in it is unknown, mistyped or out of range.
    """
    file = find_recipe(path, "train") if issubclass(kind, ImageTraining) else Path(path)
    return read_yaml(file, lambda data: training_from(data, kind), "settings")


def training_from(data: Any, kind: type[T]) -> T:
    """Builds checked settings from plain data.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), mistyped or out of range.

    >>> training_from({"clock": 4, "rollout": "student"}, AdaptorTraining).rounds
    200
    """
    return check_training(strict(clock_to_text(data) if "clock" in kind.__struct_fields__ else data, kind))


def mask_of(clock: int | str, steps: int, scheduler: str) -> tuple[bool, ...]:
    """The mask of a clock; a ConfigError where it is not one of so many steps."""
    try:
        return clock_mask(clock, steps, scheduler)
    except RequestError as e:
        raise ConfigError(str(e)) from e


def check_clock(clock: int | str, steps: int, scheduler: str) -> tuple[bool, ...]:
    """The mask of a clock that has cached steps for an adaptor to learn; a ConfigError where it has none."""
    mask = mask_of(clock, steps, scheduler)
    if all(mask):
        raise ConfigError(
            f"clock {clock} over {steps} steps has no cached step: there is nothing to train; expected a clock with "
            "one, such as 2"
        )
    return mask


def check_training(settings: T) -> T:
    """Checks what types cannot; returns the same settings, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    settings = retyped(settings)
    clock = getattr(settings, "clock", None)
    if isinstance(clock, str) and clock.isdecimal():
        settings = msgspec.structs.replace(settings, clock=int(clock[:20]))
    fields = settings.__struct_fields__
    check_ranges(settings, *(tuple(n for n in names if n in fields) for names in (ABOVE_0, FROM_0, SHARES)))
    for name in fields:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if name in MOST and number is not None and number > MOST[name]:
                raise ConfigError(f"'{name}' is {number}; expected at most {MOST[name]}")
        if isinstance(value, str) and as_text(value) != value:
            raise ConfigError(f"'{name}' is {as_text(value)}, which is not UTF-8; rename it")
    settings.check()
    return settings
