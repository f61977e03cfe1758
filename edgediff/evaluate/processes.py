"""The processes that an evaluation runs on: one, or as many as `accelerate launch` or `torchrun` started.

Work is dealt in turns, results are gathered in order, and the main process goes on alone. accelerate is imported only
where processes were launched.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from edgediff.errors import ConfigError, MissingExtraError

# Launchers set these: how many processes there are, and whether the CPU was asked for.
LAUNCHED = ("WORLD_SIZE", "ACCELERATE_USE_CPU")

CPU = torch.device("cpu")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, number `index` of `count` that were started together; the first is the main one."""

    index: int = 0
    count: int = 1
    device: torch.device = CPU

    @classmethod
    def launched(cls) -> "Processes":
        """Joins the other processes, if any; on a GPU where there is one.

        Raises:
            ConfigError: The environment is not what a launcher sets.
            MissingExtraError: Several were started, and accelerate is not installed.
        """
        if not any(name in os.environ for name in LAUNCHED):
            return cls(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env
        except ModuleNotFoundError as e:
            raise MissingExtraError("an evaluation on several processes", "train") from e
        try:
            # Without `cpu`, PartialState takes processes without a GPU for one each.
            state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        except (ValueError, RuntimeError) as e:
            found = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHED if name in os.environ)
            raise ConfigError(
                f"the environment has {found}, but is not a launcher's ({e}); start the command with accelerate launch "
                "or torchrun, or unset them"
            ) from e
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process compares and reports."""
        return self.index == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's share of the work: every `count`-th piece, beginning with its own.

        >>> Processes(1, 3).share([0, 1, 2, 3, 4])
        [1, 4]
        """
        return list(work[self.index :: self.count])

    def gather(self, results: Sequence[T]) -> list[T]:
        """Brings the results of all shares together, in the order of the work; every process must call this."""
        if self.count == 1:
            return list(results)
        from accelerate.utils import gather_object

        shares: list[list[T]] = gather_object([list(results)])
        return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]

    def leave(self) -> None:
        """Parts from the others, after the last `gather`."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
