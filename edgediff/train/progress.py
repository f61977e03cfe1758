"""How far a training has come: what a checkpoint keeps beside weights and random states."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

# Told what is being done, and the share of it that is done.
Say = Callable[[str, float], None]


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        visits: What checkpoints are numbered by: rounds learnt from, or updates.
        updates: Optimizer steps.
        losses: Of each update.
        seconds: Spent so far, in all runs.
    """

    visits: int = 0
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's state.

        Args:
            state: What `state_dict` gave.
        """
        for name, value in state.items():
            setattr(self, name, value)


def recent(losses: list[float]) -> float:
    """Mean over the last tenth of the losses.

    Args:
        losses: One for each update.

    Returns:
        The mean; NaN where there are none.
    """
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


def silent(what: str, share: float) -> None:
    """Tells nobody."""
