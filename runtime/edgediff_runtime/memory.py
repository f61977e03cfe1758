"""What memory is available, and the peak that a stage of a generation took."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

_MEMINFO, _STATUS, _CLEAR = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping; where only the installed memory is known, that; else None."""
    found = _entry(_MEMINFO, "MemAvailable")
    if found is not None:
        return found
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def resident_bytes() -> int | None:
    """What this process has in memory now; None where the system does not say."""
    return _entry(_STATUS, "VmRSS")


def _entry(path: Path, name: str) -> int | None:
    """A size in one of Linux' tables."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


class Usage:
    """Time and peak memory of each stage of one generation.

    Attributes:
        ms: Milliseconds of each component from its opening to its end, by its name.
        peak_bytes: Peak resident memory of the process while a component ran, by its name; empty where it is not
            measured. Linux alone resets a process's peak; where it does not let us, this is what was resident at
            the stage's end. Stages of other threads count too.
    """

    def __init__(self, measures_memory: bool) -> None:
        """Measures time, and memory too if asked."""
        self.ms: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._measures_memory = measures_memory

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what runs in the block as the component's, once what the one before it left has been given back."""
        if self._measures_memory:
            give_back()
        reset = self._measures_memory and _reset_peak()
        before = perf_counter()
        try:
            yield
        finally:
            self.ms[name] = 1e3 * (perf_counter() - before)
            if self._measures_memory:
                peak = _entry(_STATUS, "VmHWM" if reset else "VmRSS")
                if peak is not None:
                    self.peak_bytes[name] = peak


def give_back() -> None:
    """Gives freed memory back to the system, which glibc else keeps for later; other systems need no asking."""
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Makes the present size the peak; False where the system does not let us."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
