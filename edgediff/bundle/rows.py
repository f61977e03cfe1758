"""What verification found: numbers, and whether each reaches its floor."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

Check = Literal["graph", "program", "composed", "trajectory", "caching", "picture"]


class Row(msgspec.Struct, frozen=True):
    """One number and whether it reaches its floor.

    Attributes:
        check: ``graph``, ``program`` (an fp16 graph in fp32 arithmetic), ``composed``, ``trajectory``, ``caching`` or
            ``picture`` (the whole pipeline, from the prompt to the pixels).
        part: A graph's name; ``full`` or ``cached`` for composed; ``latents`` for trajectory and caching; ``pixels``.
        output: The worst output, or None where nothing was measured.
        psnr_db: The worst PSNR over outputs and steps; None where nothing was measured or the result was not finite.
        ok: Whether it reaches `floor_db`; None where that is None, or nothing was measured.
    """

    check: Check
    part: str
    backend: str
    output: str | None
    psnr_db: float | None
    floor_db: float | None
    ok: bool | None
    status: Literal["measured", "not_run"]
    note: str = ""
    target: str = ""


class Finding(msgspec.Struct, frozen=True):
    """A tensor that fp16 may damage: no fault by itself.

    Attributes:
        kind: ``overflow`` (results that are not finite), ``headroom`` (one of the largest) or ``small-constant`` (one
            that fp16 holds only as a subnormal number, which some hardware takes for zero).
        value: How many numbers are not finite; the largest magnitude as a share of fp16's 65504; the constant's largest
            magnitude.
        warns: Whether there is something to do about it: a headroom of less than one half is only shown.
        largest: The largest magnitude of an overflow, where it was computed in fp32 arithmetic.
    """

    kind: Literal["overflow", "headroom", "small-constant"]
    graph: str
    tensor: str
    op: str
    value: float
    warns: bool = True
    component: str = "unet"
    target: str = ""
    largest: float | None = None

    def __str__(self) -> str:
        """An overflow in words, with what to do about it."""
        how = f"{self.value:,.0f} numbers are not finite" if self.largest is None else f"largest {self.largest:.2g}"
        return (
            f"{self.component}: fp16 overflows in {self.tensor} of the {self.target} graph {self.graph} ({how}, fp16 "
            f"holds 65504); keep it in fp32: --dtype {self.component}=fp32"
        )


class ParityReport(msgspec.Struct, frozen=True):
    """All rows of a verification; findings are the worst first."""

    rows: tuple[Row, ...]
    verified: str
    targets: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """No row is below its floor, nothing overflows, and all that the export measured was measured."""
        failed = any(row.ok is False for row in self.rows) or bool(self.overflows)
        return bool(self.targets) and not self._unmeasured and not failed

    @property
    def overflows(self) -> list[Finding]:
        """What fp16 cannot hold, in the order in which it arises."""
        return [finding for finding in self.findings if finding.kind == "overflow"]

    @property
    def failure(self) -> str:
        """Why the report is not `ok`, in one line: the first overflow, the worst row, or what was not measured."""
        if self.overflows:
            return str(self.overflows[0])
        failed = [row for row in self.rows if row.ok is False]
        if not failed:
            unmeasured = ", ".join(self._unmeasured) or "any target"
            return f"not measured: {unmeasured}; install the backend that the report names"
        worst = min(failed, key=lambda row: -math.inf if row.psnr_db is None else row.psnr_db)
        number = "not finite" if worst.psnr_db is None else f"{worst.psnr_db} dB"
        floor = "a finite number" if worst.floor_db is None else f"{worst.floor_db} dB"
        return (
            f"{len(failed)} of {len(self.rows)} numbers are below their floor, the worst: {worst.check} {worst.part} "
            f"({worst.output}, {worst.backend}) is {number}, expected {floor}"
        )

    @property
    def _unmeasured(self) -> list[str]:
        """The checks of each target that the export measured and this verification did not."""
        needed = ("graph", "composed", "trajectory") if self.verified == "full" else ("graph", "composed")
        measured = {(row.target, row.check) for row in self.rows if row.status == "measured"}
        return [f"{target} {check}" for target in self.targets for check in needed if (target, check) not in measured]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ``ok`` first."""
        return {
            "ok": self.ok,
            "rows": [msgspec.to_builtins(row) for row in self.rows],
            "findings": [msgspec.to_builtins(finding) for finding in self.findings],
        }


def judged(
    check: Check,
    part: str,
    backend: str,
    numbers: Iterable[tuple[float, str]],
    floor: float | None,
    note: str = "",
) -> Row:
    """Makes a row of PSNRs in dB and outputs' names, of which the worst is kept; `floor` None is not judged."""
    number, output = min(numbers)
    finite = math.isfinite(number)
    ok = (finite and number >= floor) if floor is not None else (None if finite else False)
    psnr_db = round(number, 2) if finite else None
    return Row(check, part, backend, output, psnr_db, floor, ok, "measured", note)


def not_run(check: Check, part: str, backend: str, floor: float | None, note: str) -> Row:
    """Makes a row of what was not measured, with the reason."""
    return Row(check, part, backend, None, None, floor, None, "not_run", note)
