"""The clock: which denoising steps are full and which are cached (Clockwork Diffusion, section 3).

A step is full when the low-resolution part of the UNet runs in it, cached when the adaptor stands in for it. The
first step is always full: there is nothing to reuse before it.
"""

from collections.abc import Iterable, Sequence

from edgediff_runtime.auto_clock import AutoClock, is_auto
from edgediff_runtime.errors import RequestError

MAX_STEPS = 10_000
PERIOD_OR_MASK = "a period such as 2 or a mask such as 1,0,1,0"

ClockSpec = int | str | list[int] | tuple[int, ...] | AutoClock


def parse_clock(clock: ClockSpec, num_inference_steps: int) -> tuple[bool, ...] | AutoClock:
    """Reads a clock of any kind.

    Args:
        clock: What `clock_mask` takes; or ``auto:TOL``, ``auto:TOL:BOUND`` or an `AutoClock`, which decides as it runs.
        num_inference_steps: How many steps there are.

    Returns:
        The clock spelt out step by step, or the auto clock.

    Raises:
        RequestError: As `clock_mask`, or the auto clock's tolerance or bound is none.

    >>> parse_clock("2", 3)
    (True, False, True)
    >>> parse_clock("auto:0.2", 3)
    AutoClock(tolerance=0.2, bound=3)
    """
    if isinstance(clock, str) and is_auto(clock):
        clock = AutoClock.parse(clock)
    if not isinstance(clock, AutoClock):
        return clock_mask(clock, num_inference_steps)
    _check_steps(num_inference_steps)
    return clock


def clock_mask(clock: ClockSpec, num_inference_steps: int) -> tuple[bool, ...]:
    """Spells a clock out step by step.

    Args:
        clock: A period N (every N-th step is full, beginning with the first), as an integer or its digits; or a mask
            with one entry for each step, 1 = full, as a string ``"1,0,1,0"`` or a sequence.
        num_inference_steps: How many steps there are.

    Returns:
        One boolean for each step, True where it is full.

    Raises:
        RequestError: The period is not a whole number above 0, or the mask has another length than there are steps,
            an entry that is neither 0 nor 1, or a first step that is not full. Or it is an auto clock, whose mask only
            running tells.

    >>> clock_mask(3, 5)
    (True, False, False, True, False)
    >>> clock_mask("1,0,1,1", 4)
    (True, False, True, True)
    """
    _check_steps(num_inference_steps)
    if is_auto(clock):
        raise RequestError(
            f"clock is {str(clock)!r}, which decides as it runs; expected here {PERIOD_OR_MASK} (auto:TOL is for "
            "export and run)"
        )
    if isinstance(clock, str):
        clock = _parse(clock)
    if isinstance(clock, bool) or not isinstance(clock, int | list | tuple):
        raise RequestError(f"clock is {clock!r}; expected {PERIOD_OR_MASK}")
    if isinstance(clock, int):
        if clock < 1:
            raise RequestError(f"clock is {clock}; expected a period of 1 or more")
        return tuple(i % clock == 0 for i in range(num_inference_steps))
    if any(bit not in (0, 1) for bit in clock):
        raise RequestError(f"clock mask is {_spell(clock)}; each entry is 0 (cached) or 1 (full)")
    if len(clock) != num_inference_steps:
        raise RequestError(
            f"clock mask {_spell(clock)} has {len(clock)} entries for {num_inference_steps} steps; expected one each"
        )
    if not clock[0]:
        raise RequestError(f"clock mask {_spell(clock)} begins with 0; the first step is always full")
    return tuple(bool(bit) for bit in clock)


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


def _spell(mask: Sequence[int]) -> str:
    return ",".join(str(bit) for bit in mask)


def letters(mask: Iterable[int]) -> str:
    """A mask as tables and pictures show it.

    Args:
        mask: One entry for each step, 1 or True = full.

    Returns:
        Such as ``FcFc``.

    >>> letters((True, False, True))
    'FcF'
    """
    return "".join("F" if full else "c" for full in mask)
