"""What a training of an adaptor is asked to do: a frozen struct, read from strict YAML."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from edgediff.config.choices import Cut, SchedulerName
from edgediff.config.strict import check_ranges, read_yaml, retyped, spell_clock, strict
from edgediff.errors import ConfigError
from edgediff.models.adaptors import Kind
from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import RequestError
from edgediff_runtime.pipeline import MAX_IMAGES

POSITIVE = ("rounds", "images", "passes", "batch", "learning_rate", "checkpoint_minutes", "store_gb", "guidance_scale")


class AdaptorTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training (Clockwork Diffusion, section 3.3; the paper's: Adam, 1e-4, batch 16, plain L2 on r_out).

    Attributes:
        model: A diffusers directory or a built-in name.
        adaptor: Which adaptor.
        takes_text: Whether it looks at the text (the paper found that to add nothing).
        cut: Where the UNet is divided.
        clock: Period or mask; the loss is taken where it says cached.
        steps: Denoising steps.
        scheduler: The sampler.
        guidance_scale: Classifier-free guidance; None takes what the model is usually sampled with.
        rollout: Whose trajectories are learnt from: ``teacher`` runs every step in full, as the paper does; ``student``
            runs the clock with the adaptor as it is, so that its own outputs are fed back, which clocks with
            consecutive cached steps need.
        rounds: How many times trajectories are drawn.
        images: Trajectories of a round, for each process.
        passes: How often what is drawn is learnt from.
        batch: Samples (rows of a cached step) of an update.
        learning_rate: Adam's.
        schedule: ``constant``, or ``cosine`` down to zero at the end.
        output_weight: Weight of a second loss on ``out_sample``, relative to the identity's; 0 leaves it out.
        ema: Decay of the averaged weights, which are what is kept.
        seed: Of weights, labels, noise and order.
        store_gb: Bound in GB (1e9 bytes) of trajectories stored on disk and learnt from again in each pass; None makes
            them anew in each round.
        checkpoint_minutes: Between checkpoints.
        conditioning: A file with the embeddings of prompts, for models with text.
    """

    model: str | None = None
    adaptor: Kind = "resnet"
    takes_text: bool = False
    cut: Cut = Cut()
    clock: int | str = 2
    steps: int = 8
    scheduler: SchedulerName = "dpmpp_2m"
    guidance_scale: float | None = None
    rollout: Literal["teacher", "student"] = "teacher"
    rounds: int = 200
    images: int = 16
    passes: int = 1
    batch: int = 16
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    output_weight: float = 0.0
    ema: float = 0.999
    seed: int = 0
    store_gb: float | None = None
    checkpoint_minutes: float = 5.0
    conditioning: str | None = None


def load_training(path: str | Path) -> AdaptorTraining:
    """Reads a YAML file of settings strictly.

    Args:
        path: The file.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The file cannot be read, or a key in it is unknown, mistyped or out of range.
    """
    return read_yaml(Path(path), training_from, "settings")


def training_from(data: Any) -> AdaptorTraining:
    """Builds checked settings from plain data.

    Args:
        data: A mapping as YAML gives it.

    Returns:
        The checked settings.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), mistyped or out of range.

    >>> training_from({"clock": 4, "rollout": "student"}).rounds
    200
    """
    return check_training(strict(spell_clock(data), AdaptorTraining))


def check_training(settings: AdaptorTraining) -> AdaptorTraining:
    """Holds the rules that types cannot.

    Args:
        settings: Any settings, also built by hand.

    Returns:
        The same, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    settings = retyped(settings)
    if isinstance(settings.clock, str) and settings.clock.isdecimal():
        settings = msgspec.structs.replace(settings, clock=int(settings.clock[:20]))
    check_ranges(settings, POSITIVE, ("output_weight",), ("ema",))
    if settings.images > MAX_IMAGES:
        raise ConfigError(f"'images' is {settings.images}; expected {MAX_IMAGES} at most")
    if settings.rounds >= 2**20:
        raise ConfigError(f"'rounds' is {settings.rounds}; expected fewer than 2^20")
    if settings.store_gb is not None and settings.rollout == "student":
        raise ConfigError(
            "'store_gb' with rollout student: its trajectories change with the adaptor and cannot be stored; "
            "leave store_gb out, or learn from the teacher's"
        )
    try:
        mask = clock_mask(settings.clock, settings.steps)
    except RequestError as e:
        raise ConfigError(str(e)) from e
    if all(mask):
        raise ConfigError(
            f"clock {settings.clock} over {settings.steps} steps has no cached step: there is nothing to train; "
            "expected a clock with one, such as 2"
        )
    return settings
