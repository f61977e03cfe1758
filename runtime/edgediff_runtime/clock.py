"""The clock: which denoising steps are full and which are cached (Clockwork Diffusion, section 3).

Every call of the UNet is a step of the clock. Heun and pndm call it more often than once in each of
``num_inference_steps``.
"""

from collections.abc import Iterable

from edgediff_runtime.errors import RequestError
from edgediff_runtime.schedulers import sampler_of

MAX_STEPS = 10_000
PERIOD_OR_MASK = "a period such as 2 or a mask such as 1,0,1,0"

ClockSpec = int | str | list[int] | tuple[int, ...]


def clock_mask(
    clock: ClockSpec, num_inference_steps: int, scheduler: str | None = None, start: int = 0
) -> tuple[bool, ...]:
    """Reads a clock: for each call of the UNet that is run whether it is full; the first always is.

    Args:
        clock: A period N (every N-th step is full, beginning with the first), as an integer or its digits; or a mask
            with one entry for each call, 1 = full, as text such as ``1,0,1,0`` or as a sequence.
        num_inference_steps: Denoising steps, 1 to 10,000.
        scheduler: A sampler's name, as recipes and manifests have it; None calls the UNet once in each step.
        start: The first call that is run, for editing; the clock begins there.

    Raises:
        RequestError: It is no period above 0, and no mask of that many entries, 0 or 1, that begins with 1; or the
            scheduler is unknown.

    >>> clock_mask(3, 5)
    (True, False, False, True, False)
    >>> clock_mask(2, 2, "heun")
    (True, False, True)
    """
    _check_steps(num_inference_steps)
    calls = num_inference_steps if scheduler is None else sampler_of(scheduler).calls(num_inference_steps)
    calls -= start
    if isinstance(clock, str):
        clock = _parse(clock)
    if isinstance(clock, bool) or not isinstance(clock, int | list | tuple):
        raise RequestError(f"clock is {clock!r}; expected {PERIOD_OR_MASK}")
    if isinstance(clock, int):
        if clock < 1:
            raise RequestError(f"clock is {clock}; expected a period of 1 or more")
        return tuple(i % clock == 0 for i in range(calls))
    shown = format_mask(clock)
    if any(bit not in (0, 1) for bit in clock):
        raise RequestError(f"clock mask is {shown}; each entry is 0 (cached) or 1 (full)")
    if len(clock) != calls:
        raise RequestError(
            f"clock mask {shown} has {len(clock)} entries for {calls_in_words(num_inference_steps, scheduler, start)}; "
            "expected one each"
        )
    if not clock[0]:
        raise RequestError(f"clock mask {shown} begins with 0; the first step is always full")
    return tuple(bool(bit) for bit in clock)


def remaining_clock(clock: ClockSpec, start: int) -> ClockSpec:
    """A clock of a whole generation for one that begins at a later call: of a mask the rest, its first entry full.

    >>> remaining_clock("1,0,1,0,0", 3), remaining_clock(2, 3)
    ([1, 0], 2)
    """
    spec = _parse(clock) if isinstance(clock, str) else clock
    return [1, *list(spec)[start + 1 :]] if start and isinstance(spec, list | tuple) else spec


def calls_in_words(num_inference_steps: int, scheduler: str | None, start: int = 0) -> str:
    """How many entries a mask has, and why, for messages; `start` is the first call that is run.

    >>> calls_in_words(4, "ddim"), calls_in_words(4, "heun")
    ('4 steps', '7 model calls (4 steps: heun calls the model twice in each step but the last)')
    """
    sampler = None if scheduler is None else sampler_of(scheduler)
    if sampler is None or not sampler.calls_words:
        whole = f"{num_inference_steps} steps"
        return f"the last {num_inference_steps - start} of {whole}, which the strength leaves" if start else whole
    calls = sampler.calls(num_inference_steps)
    whole = f"{calls} model calls ({num_inference_steps} steps: {sampler.calls_words})"
    return f"the last {calls - start} of {whole}, which the strength leaves" if start else whole


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise RequestError(f"steps is {steps!r}; expected a whole number above 0")
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"steps is {steps}; expected a whole number above 0, {MAX_STEPS} at most")


def _parse(text: str) -> int | list[int]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isascii() and entry.isdigit() for entry in entries):
        raise RequestError(f"clock is {text!r}; expected {PERIOD_OR_MASK}")
    # Python converts at most 4300 digits; a period of more steps than there can be is as good as any other.
    numbers = [int(entry[:20]) for entry in (entry.lstrip("0") or "0" for entry in entries)]
    return numbers[0] if len(numbers) == 1 else numbers


def format_mask(mask: Iterable[object]) -> str:
    """A mask as options, recipes and messages have it: ``1,0,1``."""
    return ",".join(str(int(bit) if isinstance(bit, bool) else bit) for bit in mask)


def letters(mask: Iterable[int]) -> str:
    """A mask as tables and pictures show it: F full, c cached."""
    return "".join("F" if full else "c" for full in mask)
