"""Two ledgers of one machine and one model: what is faster or slower than the noise of both can explain."""

from dataclasses import dataclass

from edgediff.bench.ledger import Contender, Ledger, Row
from edgediff.errors import DataError
from edgediff_runtime.clock import letters

# What is measured once for each process has no noise that could be known.
ONCE = ("load", "first_call")


@dataclass(frozen=True)
class Change:
    """A part that both ledgers have.

    Attributes:
        old: As it was.
        new: As it is.
    """

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New median over old."""
        return self.new.median_ms / self.old.median_ms

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the ranges from the 10th to the 90th percentile do not meet."""
        return self.new.p10_ms > self.old.p90_ms or self.new.p90_ms < self.old.p10_ms


def compare_ledgers(old: Ledger, new: Ledger) -> tuple[Change, ...]:
    """Compares what two runs have in common: bundles of the same directory, backend and part.

    Args:
        old: The earlier one.
        new: The later one.

    Returns:
        Every part that both have measured more than once, in the new one's order.

    Raises:
        DataError: They are of different machines, settings or models, or have nothing in common.
    """
    differs = new.machine.differs(old.machine)
    if differs is not None:
        raise DataError(f"the ledgers are of different machines: {differs}")
    for name in ("steps", "clock", "num_images", "guidance_scale", "threads"):
        mine, theirs = getattr(new.settings, name), getattr(old.settings, name)
        if mine != theirs:
            raise DataError(f"the ledgers are of different settings: {name} {theirs!r} there, {mine!r} here")
    models = {contender.bundle: contender.model_sha256 for contender in old.contenders}
    for contender in new.contenders:
        known = models.get(contender.bundle, contender.model_sha256)
        if known != contender.model_sha256:
            raise DataError(
                f"the ledgers are of different models: {contender.bundle} was of sha256 {known[:12]}, "
                f"is of {contender.model_sha256[:12]}"
            )
    ran = {(c.bundle, c.backend): c for c in old.contenders if c.mask}
    for contender in new.contenders:
        other = ran.get((contender.bundle, contender.backend))
        if other is not None and contender.mask and (other.mask, other.rows) != (contender.mask, contender.rows):
            raise DataError(
                f"the ledgers are of different settings: {contender.bundle} in {contender.backend} ran "
                f"{_spell(other)} there, {_spell(contender)} here"
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


def _spell(contender: Contender) -> str:
    return f"{letters(contender.mask)} of {contender.rows} row(s)"
