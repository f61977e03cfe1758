"""Recorded rows through a session, divided as graphs of a fixed batch want them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import msgspec
import numpy as np

from edgediff.bundle.reference import Recorded, step_inputs
from edgediff_runtime import Bundle
from edgediff_runtime.manifest import ATTENTION_ROWS, FEATURE_ROWS, SAMPLE, Graph, has_rows, share_rows
from edgediff_runtime.sessions import Session


def run_rows(
    session: Session, graphs: Iterable[Graph], given: Mapping[str, np.ndarray], wanted: Iterable[str]
) -> dict[str, np.ndarray]:
    """Runs graphs, each of which has a file, one after the other on any number of rows; gives the wanted tensors back.

    `given` are inputs by name in the dtypes that the graphs declare, [rows, ...] where they have rows.
    """
    graphs, wanted = tuple(graphs), tuple(wanted)
    made: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    rows = count_rows(given)
    for group in groups(given, rows if session.batch is None else session.batch):
        tensors = {name: session.put(array) for name, array in handed_over(graphs, group).items()}
        for graph in graphs:
            session.run(graph, tensors)
        for name in wanted:
            made[name].append(session.get(tensors[name]))
    return {name: np.concatenate(arrays)[:rows] for name, arrays in made.items()}


def run_step(session: Session, step: Recorded, graphs: Iterable[Graph], wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Runs a whole recorded step on what it took from outside: what one graph makes, the next one is given.

    Of the session's graphs, those that have no file or do not run in such a step are left out.
    """
    running = [graph for graph in graphs if graph.file is not None and graph.runs(step.full)]
    inside = {tensor.name for graph in running for tensor in graph.outputs}
    inputs = {name: value for graph in running for name, value in step_inputs(step, graph).items()}
    return run_rows(session, running, {name: value for name, value in inputs.items() if name not in inside}, wanted)


def handed_over(graphs: Iterable[Graph], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the loop would hand to graphs of all these rows: a sample that rows of an image share, once."""
    if not (share_rows(graphs) and is_guided(given[SAMPLE])):
        return dict(given)
    return {**given, SAMPLE: given[SAMPLE][: len(given[SAMPLE]) // 2]}


def is_guided(sample: np.ndarray) -> bool:
    """Whether each image's sample is there twice, as guidance lays rows out.

    >>> is_guided(np.array([1, 2, 1, 2])), is_guided(np.array([1, 1, 2, 2])), is_guided(np.array([1]))
    (True, False, False)
    """
    half, left = divmod(len(sample), 2)
    return not left and np.array_equal(sample[:half], sample[half:])


def guided(step: Recorded) -> Recorded:
    """Every row twice, as guidance would lay out a step that was recorded without; itself where it is so already."""
    if is_guided(step.tensors[SAMPLE]):
        return step
    tensors = {
        name: np.concatenate([array, array]) if has_rows(name) else array for name, array in step.tensors.items()
    }
    return replace(step, tensors=tensors)


def groups(given: Mapping[str, np.ndarray], batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Divides [rows, ...] by name into [batch, ...]; the last group is filled up with the last row, as in the loop.

    >>> [group["x"].tolist() for group in groups({"x": np.arange(3)}, 2)]
    [[0, 1], [2, 2]]
    """
    rows = count_rows(given)
    order = np.minimum(np.arange(rows + -rows % batch), rows - 1)
    for chosen in order.reshape(-1, batch):
        yield {name: _chosen(name, array, chosen) if has_rows(name) else array for name, array in given.items()}


def _chosen(name: str, array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Some rows of a tensor; where they name other rows, as injection does, these are numbered within the group."""
    rows = np.ascontiguousarray(array[chosen])
    if name not in (ATTENTION_ROWS, FEATURE_ROWS):
        return rows
    numbered = rows[:, None] == chosen
    assert numbered.any(axis=1).all(), "a row takes one of another group"
    places: np.ndarray = numbered.argmax(axis=1).astype(rows.dtype)
    return places


def count_rows(given: Mapping[str, np.ndarray]) -> int:
    """The rows of tensors by name; ``timestep`` [1] has none, nor have low-rank factors."""
    return next(len(array) for name, array in given.items() if has_rows(name))


def undivided_step(bundle: Bundle, target: str) -> Bundle | None:
    """The bundle with one graph in a target, the undivided step that other tools open; None where there is none."""
    entry = bundle.manifest.target(target)
    if entry.unet.model is None:
        return None
    alone = entry.with_unet(graphs=(entry.unet.model,))
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, targets=(alone,)))
