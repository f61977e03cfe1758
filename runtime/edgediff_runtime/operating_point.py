"""Whether a generation is what a bundle's adaptor was trained for.

A learned adaptor belongs to one operating point: steps, sampler, clock and guidance. Others run, and look worse; the
user is told once.
"""

from collections.abc import Sequence

from edgediff_runtime.clock import ClockSpec, clock_mask, format_mask
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import Manifest, TrainedFor
from edgediff_runtime.schedulers import steps_of


def departure(
    manifest: Manifest,
    mask: tuple[bool, ...],
    guidance: Sequence[float],
    asked: ClockSpec,
    start: int = 0,
    scheduler: str | None = None,
) -> str | None:
    """Says in what a generation differs from what the bundle's adaptor was trained for.

    Args:
        mask: The clock, an entry for each call of the UNet that is run.
        guidance: Guidance scale of each call; 1 or less is off.
        asked: The clock as it was given, for the message.
        start: First call that is run, in editing: the steps after it are those of a whole generation, and a period
            begins there.
        scheduler: The sampler, where it is not the bundle's.

    Returns:
        One line; None where nothing differs, nothing was trained, or no step is cached, so that the adaptor never runs.
    """
    trained = manifest.adaptor.trained_for
    if trained is None or all(mask):
        return None
    sampler = manifest.operating_point.scheduler if scheduler is None else scheduler
    differs = []
    steps = steps_of(sampler, start + len(mask))
    if steps != trained.num_inference_steps:
        differs.append(f"{steps} steps")
    if sampler != trained.scheduler:
        differs.append(sampler)
    if not _same_clock(mask, trained, steps, sampler, start):
        differs.append(f"clock {format_mask(asked) if isinstance(asked, list | tuple) else asked}")
    if any(max(scale, 1.0) != max(trained.guidance_scale, 1.0) for scale in guidance):
        differs.append(f"guidance {', '.join(f'{scale:g}' for scale in dict.fromkeys(guidance))}")
    if not differs:
        return None
    point = f"{trained.num_inference_steps} steps of {trained.scheduler}, clock {trained.clock}"
    return (
        f"adaptor {manifest.adaptor.name} was trained for {point}, guidance {trained.guidance_scale:g}; "
        f"this is {', '.join(differs)}: images may be worse"
    )


def _same_clock(mask: tuple[bool, ...], trained: TrainedFor, steps: int, sampler: str, start: int) -> bool:
    if len(mask) == len(trained.mask):
        return mask == trained.mask
    try:
        return clock_mask(trained.clock, steps, sampler, start) == mask
    except RequestError:  # a mask for another number of calls
        return False
