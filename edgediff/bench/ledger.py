"""The ledger: what a run of `edgediff bench` measured, with everything that the figures belong to. It is the JSON."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import msgspec

from edgediff.errors import DataError
from edgediff_runtime.manifest import Struct

FORMAT = 1
Parts = Mapping[str, Iterable[float]]


class Machine(Struct, frozen=True):
    """What the figures were measured on.

    Attributes:
        processor: Its name, as the system gives it.
        flags: What it has of the instruction sets that matter here.
        cores: How many the system shows.
        memory_mib: All of it.
        system: Name and release.
        python: Version.
        versions: Of every tool that had a part.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_mib: int
    system: str
    python: str
    versions: dict[str, str]

    def differs(self, other: "Machine") -> str | None:
        """What makes it another machine, in words; versions may change, the rest may not."""
        for name in ("processor", "cores", "system"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs!r} there, {mine!r} here"
        return None


class Settings(Struct, frozen=True):
    """What was run.

    Attributes:
        steps: Denoising steps.
        clock: As it was given; None where each bundle's own was run.
        num_images: Images at once.
        guidance_scale: As it was given; None where each bundle's own was taken.
        rounds: Times that every contender was asked, in turns.
        threads: How many a backend might use; None where it was left to the backend.
    """

    steps: int | None
    clock: str | None
    num_images: int
    guidance_scale: float | None
    rounds: int
    threads: int | None


class Contender(Struct, frozen=True):
    """One bundle in one backend.

    Attributes:
        bundle: The bundle's directory, as it was given.
        backend: The backend's name.
        model_sha256: Of the source.
        status: ``measured``; ``absent`` where the backend is not to be had, ``refused`` where it would not do,
            ``wrong`` where its output was not the reference's, ``died`` where its process ended.
        says: Why it was not measured, or the undivided UNet beside it was not; empty where both were.
        psnr_db: Of a step's output against the reference, the worst of them; None where it was not asked, or is not
            finite.
        mask: The steps as they were run, 1 = full.
        rows: UNet rows in a step.
        peak_mib: Most memory that its process held, a GPU's not counted.
        undivided: What `time_saved` is taken against: ``undivided``, the whole UNet in the same backend; or ``own``,
            the bundle's own graphs at clock 1, where the source is not at hand, the backend has no other, or the graphs
            are of eight bits, which the undivided one is not.
        flops_saved: Share of the operations that the clock saves, attention matmuls included.
        time_saved: Share of the loop's time: the median of the rounds', each against the same round's.
        time_saved_spread: The 10th and the 90th percentile of them; None of one round.
        share_of_peak: GFLOP/s of a full and of a cached step over the machine's peak.
    """

    bundle: str
    backend: str
    model_sha256: str
    status: Literal["measured", "absent", "refused", "wrong", "died"]
    says: str = ""
    psnr_db: float | None = None
    mask: tuple[int, ...] = ()
    rows: int = 0
    peak_mib: float | None = None
    undivided: Literal["undivided", "own"] = "own"
    flops_saved: float | None = None
    time_saved: float | None = None
    time_saved_spread: tuple[float, float] | None = None
    share_of_peak: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Time saved over FLOPs saved; None where the clock saves no operations, or nothing was measured."""
        return self.time_saved / self.flops_saved if self.time_saved is not None and self.flops_saved else None

    @property
    def ratio_spread(self) -> tuple[float, float] | None:
        """The 10th and the 90th percentile of the rounds' ratios; None where there is no ratio, or one round."""
        if self.time_saved_spread is None or not self.flops_saved:
            return None
        low, high = self.time_saved_spread
        return low / self.flops_saved, high / self.flops_saved


class Row(Struct, frozen=True):
    """One part of one contender.

    Attributes:
        bundle: As of its contender.
        backend: As of its contender.
        part: A graph; ``full`` or ``cached``, a whole step; ``guidance``, ``scheduler``, ``other`` (hand-off); ``loop``
            and ``loop_clock1``, all steps; ``undivided`` and ``undivided_loop``; ``load`` and ``first_call``.
        median_ms: Milliseconds.
        p10_ms: The 10th percentile.
        p90_ms: The 90th percentile.
        samples_ms: All of them, as they came.
        peak_mib: Of the contender's process.
    """

    bundle: str
    backend: str
    part: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    samples_ms: tuple[float, ...]
    peak_mib: float | None


class Ledger(Struct, frozen=True):
    """A run, whole.

    Attributes:
        machine: Where.
        settings: What.
        peak_gflops: Of a large fp32 matrix product in the same run; None where it could not be measured.
        contenders: Each bundle in each backend, also those that were not measured.
        rows: What was measured.
        time_saved_over_flops_saved: By backend: 1 = every operation saved was time saved.
        imported: Ledgers of other machines, never compared with this one's rows.
        format: Version of this form.
    """

    machine: Machine
    settings: Settings
    peak_gflops: float | None
    contenders: tuple[Contender, ...]
    rows: tuple[Row, ...]
    time_saved_over_flops_saved: dict[str, float]
    imported: tuple["Ledger", ...] = ()
    format: int = FORMAT


def rows_of(bundle: str, backend: str, parts: Parts, peak_mib: float | None) -> tuple[Row, ...]:
    """Sums samples up.

    Args:
        bundle: As of the contender.
        backend: As of the contender.
        parts: Milliseconds by part; those without any are left out.
        peak_mib: Of the contender's process.

    Returns:
        A row for each.
    """
    rows = []
    for part, given in parts.items():
        samples = tuple(round(sample, 4) for sample in given)
        if samples:
            low, high = spread(samples)
            rows.append(Row(bundle, backend, part, round(median(samples), 4), low, high, samples, peak_mib))
    return tuple(rows)


def spread(samples: tuple[float, ...]) -> tuple[float, float]:
    """The 10th and the 90th percentile, between the samples themselves.

    >>> spread((1.0,)), spread((0.0, 5.0, 10.0))
    ((1.0, 1.0), (1.0, 9.0))
    """
    if len(samples) == 1:
        return samples[0], samples[0]
    tenths = quantiles(samples, n=10, method="inclusive")
    return round(tenths[0], 4), round(tenths[-1], 4)


def write_ledger(ledger: Ledger, path: Path) -> None:
    """Writes a ledger as indented JSON.

    Args:
        ledger: The run.
        path: The file.
    """
    path.write_bytes(msgspec.json.format(msgspec.json.encode(ledger), indent=1) + b"\n")


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger.

    Args:
        path: The file.

    Returns:
        The run.

    Raises:
        DataError: There is none, or it is of another form.
    """
    try:
        ledger = msgspec.json.decode(path.read_bytes(), type=Ledger)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is no ledger of edgediff bench: {e}") from e
    if ledger.format != FORMAT:
        raise DataError(f"{path} is of form {ledger.format}; expected {FORMAT}")
    return ledger
