"""The components of a pipeline at run time: each opened when its stage comes, kept or let go after it."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import Graph, Sample, Sized, graphs_at
from edgediff_runtime.memory import Usage
from edgediff_runtime.sessions import Session

UNET = "unet"


class Components:
    """Opens sessions by the names of components.

    One object may serve several threads: where sessions are not kept, each use has its own.
    """

    def __init__(
        self,
        graphs: Mapping[str, tuple[Graph, ...]],
        open_session: Callable[[str], Session],
        keep: bool = True,
        further: Mapping[str, tuple[Sized, ...]] | None = None,
    ) -> None:
        """Takes what there is, and how it is opened.

        Args:
            graphs: The graphs of each component, known before one is opened.
            open_session: Opens a component by its name.
            keep: Whether sessions stay open; False for a device with little memory, where each generation opens a
                component when its stage comes and drops it after.
            further: The graphs of each component for further sizes.
        """
        self.graphs = dict(graphs)
        self.further = dict(further or {})
        self._open_session = open_session
        self._keep = keep
        self._opened: dict[str, Session] = {}
        self._opening = threading.Lock()
        self._usage = Usage(measures_memory=False)

    @classmethod
    def of(cls, sessions: Mapping[str, Session]) -> "Components":
        """Components whose sessions are open already."""
        return cls({name: session.graphs for name, session in sessions.items()}, lambda name: sessions[name])

    def measured(self, usage: Usage) -> "Components":
        """The same components and sessions, for one generation whose stages `usage` measures."""
        found = copy.copy(self)
        found._usage = usage
        return found

    def graphs_at(self, name: str, sample: Sample, height: int, width: int) -> tuple[Graph, ...] | None:
        """A component's graphs for a latent of this size; None where it has none."""
        self._check(name)
        return graphs_at(self.graphs[name], self.further.get(name, ()), sample, height, width)

    @property
    def keeps(self) -> bool:
        """Whether sessions stay open."""
        return self._keep

    def __contains__(self, name: str) -> bool:
        return name in self.graphs

    def session(self, name: str) -> Session:
        """The session of a component, opened at its first use and kept."""
        with self._opening:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name]

    @contextmanager
    def use(self, name: str) -> Iterator[Session]:
        """The session of a component while its stage lasts."""
        with self._usage.stage(name):
            yield self.session(name) if self._keep or name in self._opened else self._open(name)

    def _open(self, name: str) -> Session:
        self._check(name)
        return self._open_session(name)

    def _check(self, name: str) -> None:
        if name not in self.graphs:
            raise RequestError(f"the bundle has no {name} for this backend; it has: {', '.join(self.graphs)}")
