"""Generations that begin alike share their beginning.

A mask that caches step 5 alone does until then what clock 1 does. The planner measures dozens of masks on the same
noise, so whatever a generation has in common with the one before it is taken from there and not run again. This stands
in a session, where all work is done; the loop is the runtime's own and knows nothing of it.
"""

from typing import Any

from edgediff_runtime.manifest import Graph
from edgediff_runtime.sessions import Array, Session


class ReplaySession:
    """A session that runs a graph only from where a generation first differs from the one before it.

    Two generations from the same request (but for the clock) are the same as long as they run the same graphs in the
    same order. Masks in the order of `sorted` share the most; the tensors of one generation stay in memory. One
    generation at a time.

    Attributes:
        graphs: As in the session behind it.
        batch: The same.
        runs: How many graphs were run, and not taken from before.
    """

    def __init__(self, session: Session) -> None:
        self.graphs = session.graphs
        self.batch = session.batch
        self.runs = 0
        self._session = session
        self._calls: list[tuple[Graph, dict[str, Any]]] = []
        self._request: object = None
        self._at = 0
        self._alike = False

    def begin(self, request: object) -> None:
        """Tells that a generation begins.

        Args:
            request: What it is asked to do but for the clock; only one that equals the last is the same generation.
        """
        if request != self._request:
            self._calls.clear()
        self._request, self._at, self._alike = request, 0, True

    def put(self, array: Array) -> Any:
        """Takes an array into the backend's form."""
        return self._session.put(array)

    def get(self, value: Any) -> Array:
        """Gives a tensor back as an array of its own."""
        return self._session.get(value)

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        """Runs a graph, or puts what it gave in the last generation among the tensors.

        Args:
            graph: One of `graphs`.
            tensors: By name; the outputs are added.
        """
        self._alike = self._alike and self._at < len(self._calls) and self._calls[self._at][0] is graph
        if self._alike:
            tensors.update(self._calls[self._at][1])
        else:
            del self._calls[self._at :]
            self._session.run(graph, tensors)
            self.runs += 1
            self._calls.append((graph, {tensor.name: tensors[tensor.name] for tensor in graph.outputs}))
        self._at += 1
