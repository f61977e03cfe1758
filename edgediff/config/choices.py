"""What several recipes choose from: where the UNet is divided, and the sampler."""

from typing import TYPE_CHECKING, Literal

import msgspec

from edgediff_runtime.schedulers import SCHEDULER_NAMES

POINTS = ("before_upsample", "after_upsample")
VerifyMode = Literal["full", "graphs"]
if TYPE_CHECKING:
    SchedulerName = str
else:
    SchedulerName = Literal[SCHEDULER_NAMES]


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the UNet is divided (Clockwork Diffusion, section 3).

    Attributes:
        level: How many high-resolution levels stay outside of the low-resolution part; 1 is the paper's stage 1.
        point: Where the low-resolution part ends: ``before_upsample`` (the paper's: the upsampler belongs to the
            high-resolution side, the cache is four times smaller), ``after_upsample`` (the authors' public code), or
            ``block:N`` (level 1 only; DeepCache's branch N: conv_in and the first N layers of the first block stay
            outside, and the last N + 1 layers of the last).
    """

    level: int = 1
    point: str = "before_upsample"


def block_of(point: str) -> int | None:
    """The N of a cut point ``block:N``; None of another.

    >>> block_of("block:2"), block_of("before_upsample")
    (2, None)
    """
    name, _, number = point.partition(":")
    digits = number.isascii() and number.isdigit() and len(number) <= 4
    return int(number) if name == "block" and digits else None
