"""The ledger: what a run of `edgediff bench` measured, with everything that the figures belong to. It is the JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import msgspec

from edgediff.errors import DataError
from edgediff_runtime.clock import letters
from edgediff_runtime.manifest import Struct

FORMAT = 1
# Measured once in each process: their noise is not known, so two ledgers are not compared by them.
ONCE = ("load", "load_components", "first_call")

Status = Literal["measured", "absent", "refused", "wrong", "died"]


class Machine(Struct, frozen=True):
    """What the figures were measured on.

    Attributes:
        processor: Its name, as the system gives it.
        flags: The instruction sets it has, of those that matter here.
        cores: Logical ones.
        memory_mib: All of it.
        system: Name and release.
        python: Version.
        versions: Of every package that had a part.
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
    """What was asked for; None leaves a number to each bundle, threads to each backend."""

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
        status: ``measured``; ``absent``: the backend or its graphs are not available; ``refused``: it could not be
            opened or run; ``wrong``: its output was not the reference's; ``died``: its process ended.
        says: Why it, or the undivided UNet beside it, was not measured; empty where both were.
        psnr_db: Of a step's output against the reference, the worst step; None where it was not run or is not finite.
        mask: The steps as they were run, 1 = full.
        rows: UNet rows in a step.
        peak_mib: Peak memory of its process, a GPU's not counted.
        undivided: What `time_saved` is taken against: ``undivided``, the whole UNet in the same backend; or ``own``,
            the bundle's own graphs at clock 1, where the source is not available, the backend cannot run it, or the
            graphs are int8, which the undivided UNet is not.
        flops_saved: Share of the operations that the clock saves, attention matmuls included.
        time_saved: Share of the loop's time: the median over the rounds, each against the same round.
        time_saved_spread: Their 10th and 90th percentile; None of one round.
        share_of_peak: GFLOP/s of a full and of a cached step over the machine's peak.
    """

    bundle: str
    backend: str
    model_sha256: str
    status: Status
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
        """The 10th and 90th percentile of the rounds' ratios; None where there is no ratio, or one round."""
        if self.time_saved_spread is None or not self.flops_saved:
            return None
        low, high = self.time_saved_spread
        return low / self.flops_saved, high / self.flops_saved


class Row(Struct, frozen=True):
    """One part of one contender, in milliseconds.

    Attributes:
        bundle: As of its contender.
        backend: As of its contender.
        part: A graph; ``full`` or ``cached``, a whole step; ``guidance``, ``scheduler``, ``other`` (hand-off); ``loop``
            and ``loop_clock1``, all steps; ``undivided`` and ``undivided_loop``; ``load``,
            ``load_components`` and ``first_call``; each component beside the UNet, and ``picture``, all of it.
        median_ms: Of all samples.
        p10_ms: The 10th percentile.
        p90_ms: The 90th percentile.
        samples_ms: In the order in which they were taken.
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
    """One run.

    Attributes:
        machine: Where.
        settings: What.
        peak_gflops: Of a large fp32 matmul in the same run; None where it could not be measured.
        contenders: Each bundle in each backend, also those that were not measured.
        rows: What was measured.
        time_saved_over_flops_saved: By backend: 1 = every operation saved was time saved.
        imported: Ledgers of other machines, never compared with this one's rows.
        format: Version of this format.
    """

    machine: Machine
    settings: Settings
    peak_gflops: float | None
    contenders: tuple[Contender, ...]
    rows: tuple[Row, ...]
    time_saved_over_flops_saved: dict[str, float]
    imported: tuple["Ledger", ...] = ()
    format: int = FORMAT


def rows_of(bundle: str, backend: str, parts: Mapping[str, Iterable[float]], peak_mib: float | None) -> tuple[Row, ...]:
    """A row for each part that has samples (milliseconds)."""
    rows = []
    for part, given in parts.items():
        samples = tuple(round(sample, 4) for sample in given)
        if samples:
            low, high = spread(samples)
            rows.append(Row(bundle, backend, part, round(median(samples), 4), low, high, samples, peak_mib))
    return tuple(rows)


def spread(samples: tuple[float, ...]) -> tuple[float, float]:
    """The 10th and the 90th percentile, interpolated.

    >>> spread((1.0,)), spread((0.0, 5.0, 10.0))
    ((1.0, 1.0), (1.0, 9.0))
    """
    if len(samples) == 1:
        return samples[0], samples[0]
    tenths = quantiles(samples, n=10, method="inclusive")
    return round(tenths[0], 4), round(tenths[-1], 4)


def write_ledger(ledger: Ledger, path: Path) -> None:
    """Writes a ledger as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(ledger), indent=1) + b"\n")


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger.

    Raises:
        DataError: There is none, or it is of another format.
    """
    try:
        ledger = msgspec.json.decode(path.read_bytes(), type=Ledger)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is not a ledger of edgediff bench: {e}") from e
    if ledger.format != FORMAT:
        raise DataError(f"{path} is of format {ledger.format}; expected {FORMAT}")
    return ledger


@dataclass(frozen=True)
class Change:
    """A part that two ledgers have in common."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New median over old."""
        return self.new.median_ms / self.old.median_ms

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the ranges from the 10th to the 90th percentile do not overlap."""
        return self.new.p10_ms > self.old.p90_ms or self.new.p90_ms < self.old.p10_ms


def compare_ledgers(old: Ledger, new: Ledger) -> tuple[Change, ...]:
    """Compares what two runs have in common: bundles of the same directory, backend and part.

    Returns:
        Every part that both measured more than once, in the new one's order.

    Raises:
        DataError: They are of different machines, settings or models, or have nothing in common.
    """
    if (differs := new.machine.differs(old.machine)) is not None:
        raise DataError(f"the ledgers are of different machines: {differs}")
    for name in ("steps", "clock", "num_images", "guidance_scale", "threads"):
        mine, theirs = getattr(new.settings, name), getattr(old.settings, name)
        if mine != theirs:
            raise DataError(f"the ledgers are of different settings: {name} {theirs!r} there, {mine!r} here")
    models = {known.bundle: known.model_sha256 for known in old.contenders}
    ran = {(known.bundle, known.backend): known for known in old.contenders if known.mask}
    for known in new.contenders:
        model = models.get(known.bundle, known.model_sha256)
        if model != known.model_sha256:
            raise DataError(
                f"the ledgers are of different models: {known.bundle} was of sha256 {model[:12]}, "
                f"is of {known.model_sha256[:12]}"
            )
        other = ran.get((known.bundle, known.backend))
        if other is not None and known.mask and (other.mask, other.rows) != (known.mask, known.rows):
            there, here = (f"{letters(each.mask)} of {each.rows} row(s)" for each in (other, known))
            raise DataError(
                f"the ledgers are of different settings: {known.bundle} in {known.backend} ran {there} there, "
                f"{here} here"
            )
    before = {(row.bundle, row.backend, row.part): row for row in old.rows if row.median_ms > 0}
    found = [
        Change(before[row.bundle, row.backend, row.part], row)
        for row in new.rows
        if row.part not in ONCE and (row.bundle, row.backend, row.part) in before and row.median_ms > 0
    ]
    if not found:
        raise DataError("the ledgers have no bundle, backend and part in common")
    return tuple(found)
