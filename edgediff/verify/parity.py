"""Verification: three numbers, never mixed.

Each graph against the same module in torch; a step composed from the graphs against torch (a full one against the
undivided UNet, which the split equals bit for bit); and the trajectory, where the conversion error (backend against
torch, same clock) is separate from the caching error (clock N against clock 1, same backend). Inputs are recorded along
a real trajectory.
"""

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from edgediff.bundle.feed import count_rows, groups, guided, run_rows, run_step, undivided_step
from edgediff.bundle.files import PARITY_SCRATCH, check_files
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import (
    REFERENCE,
    Reference,
    at_size,
    check_reference,
    load_reference,
    prompt_request,
    recorded_request,
    step_inputs,
)
from edgediff.bundle.rows import Check, Finding, ParityReport, Row, judged, not_run
from edgediff.errors import MissingExtraError
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_session
from edgediff.verify.source import torch_latents
from edgediff_runtime import Bundle, EdgePipeline, Manifest, RequestError, open_bundle
from edgediff_runtime.bundle import PARITY
from edgediff_runtime.errors import NotFiniteError
from edgediff_runtime.loop import LOWRES_FEATURE
from edgediff_runtime.manifest import TIMESTEP, Graph, Target, share_rows
from edgediff_runtime.pipeline import DECODER
from edgediff_runtime.sessions import Session

log = logging.getLogger(__name__)

TOOLS = ("edgediff", "numpy", "onnxruntime")
PROGRAM_NOTE = "fp32 arithmetic, against torch with weights of fp16"
Progress = Callable[[str], None]
# By number of the step and name of the graph.
Outputs = Mapping[tuple[int, str], Mapping[str, np.ndarray]]


def verify_bundle(
    path: str | Path,
    model: object = None,
    progress: Progress | None = None,
    record: bool = True,
    targets: Iterable[str] | None = None,
) -> ParityReport:
    """Verifies a bundle: every file's hash, then every number.

    Args:
        model: The source: a loaded `Model`, a directory or a built-in name; None looks where the manifest says. Where
            there is none, or no torch, the trajectory is compared with the evidence's final latents.
        record: Write the report to ``evidence/parity.json``; not done where `targets` leaves one out.
        targets: Which targets to verify; None verifies all.

    Raises:
        BundleError: A file is damaged, missing, not listed or unsafe, or a target is not in the bundle.
        ModelError: `model` was named and is not the bundle's source.
    """
    say = progress if progress is not None else log.debug
    bundle = open_bundle(path)
    say("hashing the files")
    check_files(bundle)
    reference = load_reference(bundle.path / REFERENCE)
    manifest = bundle.manifest
    check_reference(reference, manifest)
    all_targets = [target.target for target in manifest.targets]
    wanted = [manifest.target(name) for name in dict.fromkeys(all_targets if targets is None else targets)]
    source = _Source(manifest, reference, model, say)
    rows: list[Row] = []
    findings: list[Finding] = []
    for entry in wanted:
        form = TARGETS[entry.target]
        for backend in form.verifiers:
            target = entry.with_unet(floors=form.floors_on(backend, entry.unet.floors))
            made, found = _measure(bundle, target, source, backend, say)
            rows += [msgspec.structs.replace(row, target=target.target) for row in made]
            findings += [msgspec.structs.replace(each, target=target.target) for each in found]
    report = ParityReport(tuple(rows), manifest.evidence.verified, tuple(t.target for t in wanted), tuple(findings))
    if record and len(wanted) == len(all_targets):
        _write(bundle, report)
    return report


@dataclass
class _Source:
    """The trajectory that backends are compared with; computed once in torch, where the source is found."""

    manifest: Manifest
    reference: Reference
    model: object
    say: Progress

    @cached_property
    def latents(self) -> tuple[list[np.ndarray], str]:
        """Final latents to compare with, and where they came from."""
        self.say("trajectory of the source")
        request = recorded_request(self.manifest, self.reference.conditioning)
        anew, note = torch_latents(self.manifest, request, self.model)
        found = [latents for latents in (anew, self.reference.latents) if latents is not None]
        return found, note if anew is not None or not found else f"against the evidence's latents: {note}"


def _measure(
    bundle: Bundle, target: Target, source: _Source, backend: str, say: Progress
) -> tuple[list[Row], list[Finding]]:
    """Every row of a target in a backend, and what fp16 may damage in it.

    A session is let go of before the next one is opened: a large model is not in memory twice.
    """
    manifest, reference, form = bundle.manifest, source.reference, TARGETS[target.target]
    say(f"{backend}: loading")
    try:
        session: Session | None = open_session(bundle, backend)
    except (RequestError, MissingExtraError) as e:
        log.debug("%s: %s", backend, e)
        return _none_run(target, manifest, reference, backend, str(e)), []
    assert session is not None
    cases = _cases(manifest, target, reference)
    graphs, composed = _step_rows(cases, session, backend, say)
    trajectories = _trajectory_rows(target, source, session, backend)
    picture = _picture_rows(bundle, target, reference, session, backend, say)
    batch = session.batch
    if not form.lends_session:
        session = None
    graphs += _program_rows(bundle, cases, session, backend, say)
    found: list[Finding] = []
    looks = backend == form.verifiers[0]
    if looks:
        measured = [*graphs, *composed, *trajectories, *picture]
        is_finite = all(row.psnr_db is not None for row in measured if row.status == "measured")
        found += _findings(bundle, target, reference, "unet", session, batch, 1 if is_finite else None, say)
    session = None
    components: list[Row] = []
    for name in target.components:
        if name != "unet":
            rows, damaged = _measure_component(bundle, cases, name, backend, looks, say)
            components += rows
            found += damaged
    undivided = _undivided_rows(bundle, target, reference, backend, say) if looks else []
    found.sort(key=lambda each: each.kind != "overflow")
    return [*graphs, *composed, *trajectories, *components, *picture, *undivided], found


@dataclass(frozen=True)
class _Case:
    """A target's components for one size of the picture, and what torch computed of it.

    Attributes:
        size: In words, for further sizes; empty for the usual one.
    """

    target: Target
    reference: Reference
    size: str = ""

    def named(self, rows: Iterable[Row]) -> list[Row]:
        """Rows that say which size they are of."""
        return [msgspec.structs.replace(row, part=f"{row.part} {self.size}".rstrip()) for row in rows]


def _cases(manifest: Manifest, target: Target, reference: Reference) -> list[_Case]:
    """The usual size, then the further ones, for which only components that have a size are there."""
    cases = [_Case(target, reference)]
    each = manifest.pixels_of_latent
    for height, width in manifest.evidence.sizes:
        sized = at_size(manifest, (height, width)).target(target.target).with_unet(floors=target.unet.floors)
        cases.append(_Case(sized, reference.sizes[height, width], f"{each * width}x{each * height}"))
    return cases


def _step_rows(cases: Iterable[_Case], session: Session, backend: str, say: Progress) -> tuple[list[Row], list[Row]]:
    """Each graph on its own, and the steps composed of them."""
    rows, composed = [], []
    for case in cases:
        target, reference = case.target, _shared(case.target, case.reference)
        say(f"{backend}: graphs {case.size}".rstrip())
        alone = _run_alone(target, reference, session)
        recorded = {(step.index, graph.name): step.tensors for step in reference.steps for graph in target.unet.graphs}
        rows += case.named(_graph_rows("graph", target, backend, alone, recorded, target.unet.floors.graph))
        say(f"{backend}: composed steps {case.size}".rstrip())
        composed += case.named(_composed_rows(target, reference, session, backend, alone))
    return rows, composed


def _shared(target: Target, reference: Reference) -> Reference:
    """Graphs that share rows are checked on shared rows even where the reference has none."""
    if not share_rows(target.unet.graphs):
        return reference
    return replace(reference, steps=tuple(map(guided, reference.steps)))


def _program_rows(
    bundle: Bundle, cases: Sequence[_Case], session: Session | None, backend: str, say: Progress
) -> list[Row]:
    """Each graph that computes in fp16, in fp32 arithmetic: without rounding a slightly wrong program shows."""
    target = cases[0].target
    floor = target.unet.floors.program
    if floor is None:
        return []
    say(f"{backend}: graphs in fp32 arithmetic")
    unrounded = TARGETS[target.target].unrounded(bundle, backend, session)
    if unrounded is None:
        return []
    rows = []
    with unrounded as exactly:
        for case in cases:
            reference = _shared(case.target, case.reference)
            exact = _run_alone(case.target, reference, exactly)
            half = {
                (step.index, graph.name): reference.half.get((target.target, step.index, graph.name), {})
                for step in reference.steps
                for graph in target.unet.graphs
            }
            rows += case.named(_graph_rows("program", case.target, backend, exact, half, floor, PROGRAM_NOTE))
    return rows


def _undivided_rows(bundle: Bundle, target: Target, reference: Reference, backend: str, say: Progress) -> list[Row]:
    """The undivided step that other tools open, against torch in the recorded full steps."""
    whole, model = undivided_step(bundle, target.target), target.unet.model
    if whole is None or model is None:
        return []
    say(f"{backend}: the undivided step")
    steps = [step for step in reference.steps if step.full]
    whole_times = any(tensor.name == TIMESTEP and "int" in tensor.dtype for tensor in model.inputs)
    kept = [step for step in steps if not whole_times or float(step.tensors[TIMESTEP][0]).is_integer()]
    floor = target.unet.floors.graph
    if not kept:
        return [not_run("graph", model.name, backend, floor, "it takes whole timesteps, the sampler gives fractions")]
    session = open_session(whole, backend)
    numbers = [
        (psnr_db(step.tensors[name], value), name)
        for step in kept
        for name, value in run_rows(session, (model,), step_inputs(step, model), ("out_sample",)).items()
    ]
    return [judged("graph", model.name, backend, numbers, floor)]


def _measure_component(
    bundle: Bundle, cases: Sequence[_Case], name: str, backend: str, looks: bool, say: Progress
) -> tuple[list[Row], list[Finding]]:
    """A component beside the UNet on its recorded inputs, against torch; and, if asked, what fp16 may damage in it."""
    say(f"{backend}: {name}")
    target, reference = cases[0].target, cases[0].reference
    form, component = TARGETS[target.target], target.components[name]
    cases = [case for case in cases if name in case.target.components]
    session: Session | None = open_session(bundle, backend, component=name)
    assert session is not None
    rows = []
    for case in cases:
        numbers = _component_numbers(session, case, name, case.reference.components[name])
        rows += case.named([judged("graph", name, backend, numbers, component.floors.graph)])
    batch = session.batch
    if not form.lends_session:
        session = None
    floor = component.floors.program
    unrounded = None if floor is None else form.unrounded(bundle, backend, session, name)
    if floor is not None and unrounded is not None:
        with unrounded as exactly:
            for case in cases:
                half = case.reference.half[target.target, 0, name]
                numbers = _component_numbers(exactly, case, name, half)
                rows += case.named([judged("program", name, backend, numbers, floor, PROGRAM_NOTE)])
        del unrounded, exactly
    found = _findings(bundle, target, reference, name, session, batch, None, say) if looks else []
    return rows, found


def _component_numbers(
    session: Session, case: _Case, name: str, want: Mapping[str, np.ndarray]
) -> list[tuple[float, str]]:
    """PSNR of each output of a component, on its recorded inputs."""
    (graph,) = case.target.components[name].graphs
    outputs = [tensor.name for tensor in graph.outputs]
    made = run_rows(session, (graph,), _component_inputs(case.reference, name, graph), outputs)
    return [(psnr_db(want[output], made[output]), output) for output in outputs]


def _picture_rows(
    bundle: Bundle, target: Target, reference: Reference, session: Session, backend: str, say: Progress
) -> list[Row]:
    """The picture that the whole pipeline draws of the reference's prompt, against torch's."""
    manifest, decoder = bundle.manifest, target.components.get(DECODER)
    if decoder is None or manifest.evidence.verified != "full":
        return []
    say(f"{backend}: the picture")

    def open_component(name: str) -> Session:
        return session if name == "unet" else open_session(bundle, backend, component=name)

    pipe = EdgePipeline.of_bundle(bundle, (target.target,), open_component, warn=False)
    request = recorded_request(manifest, reference.conditioning) | prompt_request(pipe, reference.conditioning)
    try:
        pixels = pipe(**request).pixels
    except NotFiniteError as e:
        return [judged("picture", "pixels", backend, [(-math.inf, "sample")], target.unet.floors.trajectory, str(e))]
    assert pixels is not None
    number = psnr_db(reference.components[DECODER]["sample"], pixels[:1])
    return [judged("picture", "pixels", backend, [(number, "sample")], target.unet.floors.trajectory)]


def _run_alone(target: Target, reference: Reference, session: Session) -> Outputs:
    """Every graph on its recorded inputs, in each recorded step in which it runs."""
    return {
        (step.index, graph.name): run_rows(
            session, (graph,), step_inputs(step, graph), [tensor.name for tensor in graph.outputs]
        )
        for graph in target.unet.graphs
        for step in reference.steps
        if graph.file is not None and graph.runs(step.full)
    }


def _graph_rows(
    check: Check, target: Target, backend: str, made: Outputs, want: Outputs, floor: float, note: str = ""
) -> list[Row]:
    rows = []
    for graph in target.unet.graphs:
        numbers = [
            (psnr_db(want[key][name], value), name)
            for key, outputs in made.items()
            if key[1] == graph.name
            for name, value in outputs.items()
        ]
        if numbers:
            rows.append(judged(check, graph.name, backend, numbers, floor, note))
        elif graph.file is not None:
            rows.append(not_run(check, graph.name, backend, floor, "the clock never runs it"))
    return rows


def _composed_rows(target: Target, reference: Reference, session: Session, backend: str, alone: Outputs) -> list[Row]:
    composed: dict[bool, list[tuple[float, str]]] = {}
    for step in reference.steps:
        graphs = tuple(graph for graph in target.unet.graphs if graph.file is not None and graph.runs(step.full))
        if len(graphs) == 1:
            made = alone[step.index, graphs[0].name]
        else:
            made = run_step(session, step, graphs, ("out_sample", LOWRES_FEATURE))
        numbers = [(psnr_db(step.tensors[name], value), name) for name, value in made.items()]
        composed.setdefault(step.full, []).extend(numbers)
    return [
        judged("composed", "full" if full else "cached", backend, composed[full], target.unet.floors.composed)
        for full in sorted(composed, reverse=True)
    ]


def _findings(
    bundle: Bundle,
    target: Target,
    reference: Reference,
    name: str,
    session: Session | None,
    batch: int | None,
    most: int | None,
    say: Progress,
) -> list[Finding]:
    """What fp16 may damage in a component.

    Args:
        batch: Rows that its graphs take; None for any number.
        most: On how many of the recorded steps each graph of the UNet is looked at; None for all.
    """
    form, component, found = TARGETS[target.target], target.components[name], []
    if component.dtype != "fp16":
        return []
    say(f"{target.target}: headroom of {name}")
    for graph in component.graphs:
        for given in _given(reference, graph, name, most):
            first = next(groups(given, count_rows(given) if batch is None else batch))
            said = form.findings(bundle, session, graph, first)
            found += [msgspec.structs.replace(each, component=name) for each in said]
    return found


def _given(reference: Reference, graph: Graph, component: str, most: int | None) -> list[dict[str, np.ndarray]]:
    """Recorded inputs of a graph, of the UNet's in several steps; none where it has no file."""
    if component != "unet":
        return [_component_inputs(reference, component, graph)]
    steps = [step for step in reference.steps if graph.runs(step.full) and graph.file is not None]
    return [step_inputs(step, graph) for step in steps[:most]]


def _component_inputs(reference: Reference, component: str, graph: Graph) -> dict[str, np.ndarray]:
    return {t.name: reference.components[component][t.name].astype(t.dtype) for t in graph.inputs}


def _trajectory_rows(target: Target, source: _Source, session: Session, backend: str) -> list[Row]:
    floors, manifest = target.unet.floors, source.manifest
    checks: tuple[tuple[Check, float | None], ...] = (("trajectory", floors.trajectory), ("caching", floors.caching))
    if manifest.evidence.verified == "graphs" and source.model is None:
        note = "the bundle was exported with --verify graphs"
        return [not_run(check, "latents", backend, floor, note) for check, floor in checks]
    want, note = source.latents
    if not want:
        note = f"no latents to compare with: {note}"
        return [not_run(check, "latents", backend, floor, note) for check, floor in checks]
    source.say(f"{backend}: trajectories")
    point = manifest.operating_point
    request = recorded_request(manifest, source.reference.conditioning)
    # A comparison may differ from what the adaptor was trained for.
    pipe = EdgePipeline(manifest, session, warn=False)
    try:
        latents = pipe(**request).latents
        always = None if all(point.mask) else pipe(**request | {"clock": 1}).latents
    except NotFiniteError as e:
        rows = [judged("trajectory", "latents", backend, [(-math.inf, "latents")], floors.trajectory, str(e))]
        return [*rows, not_run("caching", "latents", backend, floors.caching, str(e))]
    numbers = [(psnr_db(each, latents), "latents") for each in want]
    rows = [judged("trajectory", "latents", backend, numbers, floors.trajectory, note)]
    if always is None:
        note = "the clock has no cached step"
        return [*rows, not_run("caching", "latents", backend, floors.caching, note)]
    note = f"clock {point.clock} against clock 1"
    return [*rows, judged("caching", "latents", backend, [(psnr_db(always, latents), "latents")], floors.caching, note)]


def _none_run(target: Target, manifest: Manifest, reference: Reference, backend: str, note: str) -> list[Row]:
    """A row for everything that a backend would have measured."""
    floors = target.unet.floors
    rows = []
    for case in _cases(manifest, target, reference):
        rows += case.named(_graphs_not_run(case.target, backend, note))
    rows += [
        not_run("composed", "full" if full else "cached", backend, floors.composed, note)
        for full in sorted({step.full for step in reference.steps}, reverse=True)
    ]
    rows.append(not_run("trajectory", "latents", backend, floors.trajectory, note))
    rows.append(not_run("caching", "latents", backend, floors.caching, note))
    return rows


def _graphs_not_run(target: Target, backend: str, note: str) -> list[Row]:
    """A row for each graph of each component."""
    floors = target.unet.floors
    names = [graph.name for graph in target.unet.graphs if graph.file is not None]
    rows = [not_run("graph", name, backend, floors.graph, note) for name in names]
    if backend == TARGETS[target.target].verifiers[0] and floors.program is not None:
        rows += [not_run("program", name, backend, floors.program, note) for name in names]
    return rows + [
        not_run("graph", name, backend, component.floors.graph, note)
        for name, component in target.components.items()
        if name != "unet"
    ]


def _write(bundle: Bundle, report: ParityReport) -> None:
    """Replaces evidence/parity.json in one step; a bundle on read-only media is verified all the same."""
    ran = {row.backend for row in report.rows if row.status == "measured"}
    ours = (TARGETS[name] for name in report.targets)
    tools = dict.fromkeys((*TOOLS, *(tool for form in ours if ran & {*form.verifiers} for tool in form.tools_to_run)))
    evidence = {
        **report.to_dict(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {tool: version(tool) for tool in tools},
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
