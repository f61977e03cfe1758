"""Verification: three numbers, never mixed.

Each graph against the same module in torch; a step composed from the graphs against torch (a full one: the undivided
UNet, which the split equals bit for bit); and the trajectory, where the conversion error (backend against torch, same
clock) stands apart from the caching error (clock N against clock 1, same backend). The inputs are real ones, taken
along a real trajectory.
"""

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgediff.verify.files import PARITY_SCRATCH, check_files
from edgediff.verify.psnr import psnr_db
from edgediff.verify.reference import REFERENCE, Reference, check_reference, load_reference, reference_request
from edgediff.verify.source import torch_latents
from edgediff_runtime import Bundle, EdgePipeline, Manifest, open_bundle
from edgediff_runtime.bundle import PARITY
from edgediff_runtime.loop import CACHE
from edgediff_runtime.manifest import Target
from edgediff_runtime.sessions import Session, open_session

log = logging.getLogger(__name__)

TOOLS = ("edgediff", "numpy", "onnxruntime")
BACKEND_OF_TARGET = {"onnx": "onnxruntime"}
Progress = Callable[[str], None]


class Row(msgspec.Struct, frozen=True):
    """One number and whether it holds.

    Attributes:
        check: ``graph``, ``composed``, ``trajectory`` or ``caching``.
        part: A part's name; ``full`` or ``cached`` for composed; ``latents`` for trajectory and caching.
        backend: What ran the graphs.
        output: The output that was worst, or None where nothing was measured.
        psnr_db: The worst PSNR over outputs and steps; None where nothing was measured or the result was not finite.
        floor_db: What it must reach; None is not judged.
        ok: Whether it does; None where it is not judged or was not measured.
        status: ``measured`` or ``not_run``.
        note: Why it was not run, or what it was compared with.
    """

    check: Literal["graph", "composed", "trajectory", "caching"]
    part: str
    backend: str
    output: str | None
    psnr_db: float | None
    floor_db: float | None
    ok: bool | None
    status: Literal["measured", "not_run"]
    note: str = ""


class ParityReport(msgspec.Struct, frozen=True):
    """All rows of a verification.

    Attributes:
        rows: In the order of the checks.
        verified: What the export verified: ``full`` or ``graphs``.
    """

    rows: tuple[Row, ...]
    verified: str

    @property
    def ok(self) -> bool:
        """No row is false, and all was measured that the export measured."""
        measured = {row.check for row in self.rows if row.status == "measured"}
        needed = {"graph", "composed"} | ({"trajectory"} if self.verified == "full" else set())
        return not any(row.ok is False for row in self.rows) and needed <= measured

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ``ok`` first."""
        return {"ok": self.ok, "rows": [msgspec.to_builtins(row) for row in self.rows]}


def verify_bundle(
    path: str | Path, model: object = None, progress: Progress | None = None, record: bool = True
) -> ParityReport:
    """Verifies a bundle: every file's hash, then every number.

    Args:
        path: The bundle.
        model: The source: a loaded `Model`, a directory or a built-in name; None looks where the manifest says. Where
            it is not at hand, or torch is not installed, the trajectory is held to the evidence's final latents.
        progress: Told what is being done.
        record: Write the report to ``evidence/parity.json``.

    Returns:
        The report.

    Raises:
        BundleError: A file is damaged, missing, not listed or unsafe.
        ModelError: `model` was named and is not the bundle's source.
    """
    say = progress if progress is not None else log.debug
    bundle = open_bundle(path)
    say("hashing the files")
    check_files(bundle)
    reference = load_reference(bundle.path / REFERENCE)
    manifest = bundle.manifest
    check_reference(reference, manifest)
    rows: list[Row] = []
    for target in manifest.targets:
        backend = BACKEND_OF_TARGET[target.target]
        say(f"{backend}: loading")
        session = open_session(bundle, backend)
        say(f"{backend}: graphs")
        rows += _graph_rows(target, manifest.floors.graph, reference, session, backend)
        say(f"{backend}: composed steps")
        rows += _composed_rows(target, manifest.floors.composed, reference, session, backend)
        say(f"{backend}: trajectories")
        rows += _trajectory_rows(manifest, reference, session, backend, model, say)
    report = ParityReport(tuple(rows), manifest.verified)
    if record:
        _write(bundle, report)
    return report


def _graph_rows(target: Target, floor: float, reference: Reference, session: Session, backend: str) -> list[Row]:
    rows = []
    for graph in target.graphs:
        if graph.file is None:
            continue
        numbers: list[tuple[float, str]] = []
        for step in reference.steps:
            if not graph.runs(step.full):
                continue
            tensors = {tensor.name: session.put(step.tensors[tensor.name]) for tensor in graph.inputs}
            session.run(graph, tensors)
            for tensor in graph.outputs:
                got = session.get(tensors[tensor.name])
                numbers.append((psnr_db(step.tensors[tensor.name], got), tensor.name))
        rows.append(_row("graph", graph.name, backend, numbers, floor))
    return rows


def _composed_rows(target: Target, floor: float, reference: Reference, session: Session, backend: str) -> list[Row]:
    numbers: dict[bool, list[tuple[float, str]]] = {}
    graphs = target.graphs
    made = {tensor.name for graph in graphs for tensor in graph.outputs}
    for step in reference.steps:
        given = {name: value for name, value in step.tensors.items() if name not in made}
        if step.cache is not None:
            given[CACHE] = step.cache
        tensors = {name: session.put(value) for name, value in given.items()}
        for graph in graphs:
            if graph.file is not None and graph.runs(step.full):
                session.run(graph, tensors)
        for name in ("out_sample", CACHE):
            number = psnr_db(step.tensors[name], session.get(tensors[name]))
            numbers.setdefault(step.full, []).append((number, name))
    return [
        _row("composed", "full" if full else "cached", backend, numbers[full], floor)
        for full in sorted(numbers, reverse=True)
    ]


def _trajectory_rows(
    manifest: Manifest, reference: Reference, session: Session, backend: str, model: object, say: Progress
) -> list[Row]:
    floors = manifest.floors
    if manifest.verified == "graphs" and model is None:
        note = "the bundle was exported with --verify graphs"
        return [
            _not_run("trajectory", backend, floors.trajectory, note),
            _not_run("caching", backend, floors.caching, note),
        ]
    pipe = EdgePipeline(manifest, session)
    request = reference_request(manifest, reference.conditioning)
    latents = pipe(**request).latents
    say("trajectory of the source")
    anew, note = torch_latents(manifest, request, model)
    numbers = [(psnr_db(want, latents), "latents") for want in (anew, reference.latents) if want is not None]
    rows = [_row("trajectory", "latents", backend, numbers, floors.trajectory, note)]
    if all(manifest.operating_point.mask):
        return [*rows, _not_run("caching", backend, floors.caching, "the clock has no cached step")]
    say(f"{backend}: clock 1")
    always = pipe(**request, clock=1).latents
    note = f"clock {manifest.operating_point.clock} against clock 1"
    return [
        *rows,
        _row("caching", "latents", backend, [(psnr_db(always, latents), "latents")], floors.caching, note),
    ]


def _row(
    check: Any,
    part: str,
    backend: str,
    numbers: Iterable[tuple[float, str]],
    floor: float | None,
    note: str = "",
) -> Row:
    number, output = min(numbers)
    finite = math.isfinite(number)
    return Row(
        check=check,
        part=part,
        backend=backend,
        output=output,
        psnr_db=round(number, 2) if finite else None,
        floor_db=floor,
        ok=(finite and number >= floor) if floor is not None else (None if finite else False),
        status="measured",
        note=note,
    )


def _not_run(check: Any, backend: str, floor: float | None, note: str) -> Row:
    return Row(check, "latents", backend, None, None, floor, None, "not_run", note)


def _write(bundle: Bundle, report: ParityReport) -> None:
    """Replaces evidence/parity.json in one step; a bundle on read-only media is verified all the same."""
    evidence = {
        **report.to_dict(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {tool: version(tool) for tool in TOOLS},
    }
    path = bundle.path / PARITY
    scratch = bundle.path / PARITY_SCRATCH
    try:
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(evidence), indent=1) + b"\n")
        os.replace(scratch, path)
    except OSError as e:
        log.warning("the report could not be written to %s: %s", path, e)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
