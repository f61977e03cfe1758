"""Graphs as ONNX Runtime has optimized them for this machine, kept in a folder.

Opening a graph, ONNX Runtime optimizes it and lays out its weights for the processor, which takes nearly all of the
time and a copy of the weights in memory. Kept, the result is opened next time as it is, with its weights mapped from
the file: pages that the system may drop and read again. It is as large as the weights, or larger, and of use on the
same processor with the same version alone, so it is not part of a bundle.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgediff_runtime.bundle import Bundle
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import Graph

log = logging.getLogger(__name__)

# Smaller numbers stay in the graph's own file.
MAPPED_BYTES = 1024
STAMPS = "stamps.json"
_CPUINFO = Path("/proc/cpuinfo")

# Opens a graph's file in ONNX Runtime with these options, and checks it against the manifest.
Open = Callable[[Graph, str, Any], Any]


def load_cached(
    bundle: Bundle, graphs: tuple[Graph, ...], options: Callable[[], Any], open_graph: Open, cache: Path, settings: str
) -> dict[str, Any]:
    """Loads the graphs that have a file from a cache, or from the bundle, and keeps what becomes of them.

    What is found in the cache was made of files whose hashes were those of this manifest: the bundle's files are not
    read again. Kept files that were changed since are made anew.

    Args:
        options: Makes ONNX Runtime's options anew for each graph.
        cache: The folder; it is made where it is missing, and may be deleted at any time.
        settings: What else than the files, the version and the processor the result depends on.

    Returns:
        Sessions by the graphs' names.

    Raises:
        BundleError: As `Bundle.hold` and `open_graph` raise it; never since the cache is damaged or cannot be written.
    """
    graphs = tuple(graph for graph in graphs if graph.file is not None)

    def opened(file: Callable[[Graph], Path], options: Callable[[], Any]) -> dict[str, Any]:
        return {graph.name: open_graph(graph, os.fspath(file(graph)), options()) for graph in graphs}

    place = cache / _key(bundle, graphs, settings)
    if place.is_dir():
        try:
            _check_stamps(place)
            return opened(lambda graph: place / f"{graph.name}.onnx", lambda: _as_it_is(options()))
        except BundleError as e:
            log.warning("%s is damaged and made again: %s", place, e)
            shutil.rmtree(place, ignore_errors=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
    except OSError as e:
        log.warning("%s cannot be used as a cache: %s", cache, e.strerror)
        with bundle.hold(graphs):
            return opened(lambda graph: bundle.path / str(graph.file), options)
    try:
        with bundle.hold(graphs):
            sessions = {graph.name: _open_and_keep(bundle, graph, options, open_graph, scratch) for graph in graphs}
        # At once, and only where all graphs are there; another process may have been faster.
        if all((scratch / f"{graph.name}.onnx").is_file() for graph in graphs):
            with suppress(OSError):
                (scratch / STAMPS).write_text(json.dumps(_stamps(scratch)), encoding="utf-8")
                scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sessions


def _open_and_keep(bundle: Bundle, graph: Graph, options: Callable[[], Any], open_graph: Open, folder: Path) -> Any:
    """Opens a graph of the bundle; what it was made into lies in the folder, unless there is no room for it."""
    file = os.fspath(bundle.path / str(graph.file))
    keeping = options()
    keeping.optimized_model_filepath = os.fspath(folder / f"{graph.name}.onnx")
    for name, value in (
        ("optimized_model_external_initializers_file_name", f"{graph.name}.bin"),
        ("optimized_model_external_initializers_min_size_in_bytes", str(MAPPED_BYTES)),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        keeping.add_session_config_entry(f"session.{name}", value)
    try:
        return open_graph(graph, file, keeping)
    except BundleError as e:
        # Either the graph cannot be loaded, which the next line says again, or the cache cannot be written.
        session = open_graph(graph, file, options())
        log.warning("%s is not kept in the cache: %s", graph.name, e)
        (folder / f"{graph.name}.onnx").unlink(missing_ok=True)
        return session


def _stamps(place: Path) -> dict[str, list[int]]:
    """Size and time of the last change of each kept file: hashing gigabytes would take longer than all the rest."""
    found = {file.name: file.stat() for file in sorted(place.iterdir()) if file.name != STAMPS}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _check_stamps(place: Path) -> None:
    try:
        said = json.loads((place / STAMPS).read_bytes())
    except (OSError, ValueError) as e:
        raise BundleError(f"{STAMPS} cannot be read") from e
    changed = {name for name, stamp in _stamps(place).items() if said.get(name) != stamp}
    if changed:
        raise BundleError(f"{', '.join(sorted(changed))} changed")


def _as_it_is(options: Any) -> Any:
    import onnxruntime as ort

    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _key(bundle: Bundle, graphs: tuple[Graph, ...], settings: str) -> str:
    """A name that differs wherever the optimized graphs may."""
    import onnxruntime as ort

    names = sorted({name for graph in graphs for name in graph.files})
    hashes = {name: entry.sha256 for name in names if (entry := bundle.manifest.files.get(name)) is not None}
    known = [hashes, [graph.name for graph in graphs], ort.__version__, settings, _processor()]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


@functools.cache
def _processor() -> list[str]:
    """What the layout of weights depends on: the kind of processor and, where the system says, what it can do."""
    found = {platform.machine(), platform.processor()}
    if _CPUINFO.is_file():
        kinds = ("model name", "flags", "Features", "CPU part")
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        found |= {line for line in lines if line.startswith(kinds)}
    return sorted(found)
