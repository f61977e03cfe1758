"""What is timed: a bundle in a backend, and the undivided UNet that it was made of in the same one."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgediff.bench.in_browser import WEB
from edgediff.bench.machine import peak_gflops
from edgediff.bench.turns import Said, parts_of
from edgediff.bundle.feed import run_step, undivided_step
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, Reference, load_reference, prompt_request, reference_request
from edgediff.errors import UnsupportedError
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_session
from edgediff.targets.base import Backend
from edgediff.verify.source import open_source
from edgediff_runtime import Bundle, EdgePipeline, Manifest, open_bundle
from edgediff_runtime.components import UNET
from edgediff_runtime.pipeline import PREVIEW
from edgediff_runtime.sessions import Session
from edgediff_runtime.text_encoding import run_one

IMAGE_ENCODER = "vae_encoder"
TORCH = 'pip install "edgediff[export]"'
BACKENDS = (
    Backend("torch", (), ("torch",), TORCH),
    Backend("torch-compile", (), ("torch",), TORCH),
    *(backend for target in TARGETS.values() for backend in target.backends),
    WEB,
)


def named(name: str) -> Backend:
    """Finds a backend.

    Raises:
        UnsupportedError: There is none of that name; the choices are listed.
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise UnsupportedError(f"no backend {name!r}; choices: {', '.join(backend.name for backend in BACKENDS)}")


# What a worker is told to serve


def time_peak() -> Iterator[Said]:
    """The machine's peak in GFLOP/s, as the part ``gflops``."""
    while True:
        yield Said(parts={"gflops": [peak_gflops()]})


def time_bundle(
    bundle: str | Bundle,
    backend: str,
    *,
    undivided: bool = False,
    threads: int | None = None,
    num_images: int = 1,
    **request: Any,
) -> Iterator[Said]:
    """Opens a bundle, runs it, checks each recorded step; then a turn is a generation at the clock and one at clock 1.

    Args:
        undivided: Run the undivided UNet instead: a turn is one generation at clock 1.
        threads: How many may be at work; the backend's own choice if None.
        request: ``num_inference_steps``, ``clock``, ``guidance_scale``; where None, the bundle's.
    """
    bundle = open_bundle(Path(bundle)) if isinstance(bundle, str) else bundle
    reference = load_reference(bundle.file(REFERENCE))
    chosen = named(backend)
    start = time.perf_counter()
    session = _open(bundle, chosen, threads, undivided)
    load_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    others = {} if undivided else _open_components(bundle, chosen, threads)
    load_others_ms = 1e3 * (time.perf_counter() - start)
    pipe = _pipeline(bundle, chosen, {UNET: session, **others})
    asked = reference_request(bundle.manifest, reference.conditioning) | {"num_images": num_images, "seed": 0}
    # The reference's clock is a mask for its own number of steps; left out, the clock is the bundle's.
    del asked["clock"]
    asked |= {name: value for name, value in request.items() if value is not None}
    asked["output_type"] = "latent"
    whole = asked | prompt_request(pipe, reference.conditioning) | ({"output_type": "image"} if pipe.can_decode else {})
    # Some backends compile a graph when it first runs, and for its number of rows: none of that is a turn's time.
    first = _generate(pipe, asked | {"clock": 1}, "loop_clock1")
    if not undivided:
        _generate(pipe, whole, "loop")
    worst, floor = check(session, reference, only_full=undivided), _floor(bundle.manifest, chosen)
    if worst < floor:
        says = f"a step is {worst:.1f} dB of the reference" if math.isfinite(worst) else "a step is not finite"
        yield Said(says=f"{says}; expected {floor:g} dB", wrong=True, psnr_db=worst)
        return
    once = {"load": [load_ms], "first_call": first.parts["full"][:1]}
    yield Said(psnr_db=worst, parts=once | ({"load_components": [load_others_ms]} if others else {}))
    while True:
        always = _generate(pipe, asked | {"clock": 1}, "loop_clock1")
        if undivided:
            parts = {"undivided": always.parts["full"], "undivided_loop": always.parts["loop_clock1"]}
            yield Said(parts=parts, rows=always.rows)
            continue
        clocked = _generate(pipe, whole, "loop")
        clocked.parts.update(_encode_image(others, reference))
        names = (*clocked.parts, "loop_clock1")
        parts = {name: [*clocked.parts.get(name, []), *always.parts.get(name, [])] for name in names}
        yield Said(parts=parts, mask=clocked.mask, rows=clocked.rows)


def check(session: Session, reference: Reference, only_full: bool = False) -> float:
    """Runs each recorded step, or each full one, on its recorded inputs: the worst PSNR of ``out_sample`` in dB."""
    steps = [step for step in reference.steps if step.full or not only_full]
    made = [run_step(session, step, session.graphs, ("out_sample",))["out_sample"] for step in steps]
    return min(psnr_db(step.tensors["out_sample"], out) for step, out in zip(steps, made, strict=True))


def _floor(manifest: Manifest, backend: Backend) -> float:
    """The least PSNR of a step; torch, which has no graphs, takes the strictest of the targets'."""
    if backend.floor_db is not None:
        return backend.floor_db
    name = backend.target(manifest)
    return max(target.unet.floors.composed for target in manifest.targets if name in (None, target.target))


def _generate(pipe: EdgePipeline, request: dict[str, Any], loop: str) -> Said:
    """One generation: milliseconds of each part in each step, and of all steps as the part `loop`.

    Where components beside the UNet ran, also of each of them, and of all as the part ``picture``.
    """
    nothing = {graph.name for graph in pipe.session.graphs if graph.file is None}
    result = pipe(**request)
    made = parts_of(((step.full, step.ms) for step in result.ledger), result.stages, loop)
    parts = {name: samples for name, samples in made.items() if name not in nothing}
    rows = len(result.latents) * (2 if result.ledger[-1].guided else 1)
    return Said(parts=parts, mask=result.mask, rows=rows)


def _encode_image(others: Mapping[str, Session], reference: Reference) -> dict[str, list[float]]:
    """Milliseconds of the image encoder on one image, which no generation from text runs; empty where there is none."""
    session = others.get(IMAGE_ENCODER)
    if session is None:
        return {}
    (graph,) = session.graphs
    inputs = {t.name: reference.components[IMAGE_ENCODER][t.name][:1] for t in graph.inputs}
    start = time.perf_counter()
    run_one(session, graph, inputs)
    return {IMAGE_ENCODER: [1e3 * (time.perf_counter() - start)]}


# How it is opened


def _open_components(bundle: Bundle, backend: Backend, threads: int | None) -> dict[str, Session]:
    """The components beside the UNet that a backend runs."""
    target = backend.target(bundle.manifest)
    names = () if target is None else bundle.manifest.target(target).components
    return {
        name: open_session(bundle, backend.name, threads=threads, component=name)
        for name in names
        if name not in (UNET, PREVIEW)  # no generation runs a preview
    }


def _pipeline(bundle: Bundle, backend: Backend, sessions: Mapping[str, Session]) -> EdgePipeline:
    target = backend.target(bundle.manifest)
    if target is None or len(sessions) == 1:
        return EdgePipeline(bundle.manifest, sessions[UNET], warn=False)
    return EdgePipeline.of_bundle(bundle, (target,), lambda name: sessions[name], warn=False)


def _open(bundle: Bundle, backend: Backend, threads: int | None, undivided: bool) -> Session:
    target = backend.target(bundle.manifest)
    if target is None:
        return _open_source(bundle.manifest, backend.name == "torch-compile", undivided)
    whole = undivided_step(bundle, target) if undivided else bundle
    if whole is None:
        raise UnsupportedError(f"the bundle has no undivided step in {target}")
    return open_session(whole, backend.name, threads=threads)


def _open_source(manifest: Manifest, compile_parts: bool, undivided: bool) -> Session:
    """The model in torch, divided as the bundle is or undivided."""
    from edgediff.models.graphs import graph_list
    from edgediff.models.torch_session import TorchSession
    from edgediff.models.undivided import undivided_session

    found, reason = open_source(manifest)
    if found is None:
        raise UnsupportedError(f"{reason}; torch runs the model that the bundle was made of")
    model, divided = found
    whole = undivided_session(model, factors=divided.factors) if undivided else None
    session = whole or TorchSession(divided.parts, graph_list(divided, model))
    if compile_parts:
        import torch

        compiler: Callable[..., Any] = torch.compile
        session.parts = {name: compiler(part) for name, part in session.parts.items()}
    return session
