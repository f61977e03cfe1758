"""A contender's own process: opens the bundle, is held to the reference, then runs whenever it is told to.

One JSON object a line: the task comes first, then ``round`` for each turn. A process of its own keeps each backend's
memory, threads and faults to itself.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from edgediff.bench.contenders import Backend, Whole, export_undivided, named, opened
from edgediff.bench.machine import peak_gflops, peak_memory
from edgediff.bundle.feed import run_step
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, Reference, load_reference, reference_request
from edgediff.errors import EdgediffError
from edgediff_runtime import Bundle, EdgePipeline, Manifest, open_bundle
from edgediff_runtime.errors import EdgeRuntimeError
from edgediff_runtime.sessions import Session


class Task(msgspec.Struct, frozen=True):
    """What a process is to do.

    Attributes:
        bundle: The bundle's directory; None measures the machine's peak.
        backend: The backend's name.
        undivided: Whether the undivided UNet is run in the place of the bundle's graphs.
        whole: That in ONNX.
        steps: Denoising steps; the bundle's where None.
        clock: The bundle's where None.
        num_images: Images at once.
        guidance_scale: The bundle's where None.
        threads: How many may be at work.
        export_to: A directory: the undivided UNet is written there, and nothing is timed.
    """

    bundle: str | None
    backend: str = ""
    undivided: bool = False
    whole: Whole | None = None
    steps: int | None = None
    clock: str | None = None
    num_images: int = 1
    guidance_scale: float | None = None
    threads: int | None = None
    export_to: str | None = None


class Said(msgspec.Struct, frozen=True):
    """What a process answers.

    Attributes:
        says: Why it cannot go on; empty where it can.
        wrong: Whether that is because its output is not the reference's.
        psnr_db: Of a step's output against the reference, the worst of them.
        peak_mib: Most memory held until now.
        mask: The steps as they were run.
        rows: UNet rows in a step.
        parts: Milliseconds by part of this turn.
        gflops: The machine's peak, from the process that measures it.
        whole: The undivided UNet, from the process that writes it.
    """

    says: str = ""
    wrong: bool = False
    psnr_db: float | None = None
    peak_mib: float | None = None
    mask: tuple[int, ...] = ()
    rows: int = 0
    parts: dict[str, list[float]] = msgspec.field(default_factory=dict)
    gflops: float | None = None
    whole: Whole | None = None


def main() -> None:
    """Serves one contender until its input ends."""
    with os.fdopen(os.dup(1), "wb") as answers:
        # Whatever libraries print goes to the errors: answers have their own way out.
        os.dup2(2, 1)
        task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
        try:
            for said in _turns(task):
                _answer(answers, said)
                if not sys.stdin.buffer.readline():
                    return
        except (EdgediffError, EdgeRuntimeError) as e:
            _answer(answers, Said(says=str(e)))
        except Exception as e:  # a backend's own errors share no base class; the others are to go on
            _answer(answers, Said(says=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"))


def _answer(answers: IO[bytes], said: Said) -> None:
    answers.write(msgspec.json.encode(said) + b"\n")
    answers.flush()


def _turns(task: Task) -> Iterator[Said]:
    if task.bundle is None:
        while True:
            yield Said(gflops=peak_gflops())
    bundle = open_bundle(Path(task.bundle))
    reference = load_reference(bundle.file(REFERENCE))
    if task.export_to is not None:
        yield Said(whole=export_undivided(bundle, reference.steps[0].tensors, Path(task.export_to)))
        return
    yield from _contend(task, bundle, reference)


def _contend(task: Task, bundle: Bundle, reference: Reference) -> Iterator[Said]:
    """Opens, runs once, checks; then two generations for each turn."""
    backend = named(task.backend)
    start = time.perf_counter()
    session = opened(bundle, backend, task.threads, task.undivided, task.whole)
    load_ms = 1e3 * (time.perf_counter() - start)
    pipe = EdgePipeline(bundle.manifest, session, warn=False)
    given = {"num_inference_steps": task.steps, "clock": task.clock, "guidance_scale": task.guidance_scale}
    request = reference_request(bundle.manifest, reference.conditioning) | {"num_images": task.num_images, "seed": 0}
    # The reference's clock is spelt out for its own steps; left out, it is the bundle's.
    del request["clock"]
    request |= {name: value for name, value in given.items() if value is not None}
    # Some backends compile a graph when it first runs, and for its number of rows: none of that is a turn's time.
    first = _generate(pipe, request | {"clock": 1}, "")
    if not task.undivided:
        _generate(pipe, request, "")
    worst = check(session, reference, only_full=task.undivided)
    floor = _floor(bundle.manifest, backend)
    if worst < floor:
        says = f"a step is {worst:.1f} dB of the reference" if math.isfinite(worst) else "a step is not finite"
        yield Said(says=f"{says}; expected {floor:g} dB", wrong=True, psnr_db=worst)
        return
    yield Said(psnr_db=worst, peak_mib=peak_memory(), parts={"load": [load_ms], "first_call": first.parts["full"][:1]})
    while True:
        always = _generate(pipe, request | {"clock": 1}, "loop_clock1")
        if task.undivided:
            loop = always.parts["loop_clock1"]
            said = Said(parts={"undivided": always.parts["full"], "undivided_loop": loop}, rows=always.rows)
        else:
            clocked = _generate(pipe, request, "loop")
            names = (*clocked.parts, "loop_clock1")
            parts = {name: [*clocked.parts.get(name, []), *always.parts.get(name, [])] for name in names}
            said = Said(parts=parts, mask=clocked.mask, rows=clocked.rows)
        yield msgspec.structs.replace(said, peak_mib=peak_memory())


def _floor(manifest: Manifest, backend: Backend) -> float:
    """What a step is held to; torch, which has no graphs, to the strictest of the targets."""
    if backend.floor_db is not None:
        return backend.floor_db
    name = backend.target(manifest)
    return max(target.unet.floors.composed for target in manifest.targets if name in (None, target.target))


def _generate(pipe: EdgePipeline, request: dict[str, Any], loop: str) -> Said:
    """One generation: milliseconds of each part in each step, and of all of them together."""
    nothing = {graph.name for graph in pipe.session.graphs if graph.file is None}
    parts: dict[str, list[float]] = {}
    mask = []
    rows = 0
    total = 0.0
    for step in pipe.stream(**request):
        whole = sum(step.ms.values())
        total += whole
        mask.append(int(step.full))
        rows = len(step.latents) * (2 if step.guided else 1)
        for name, ms in {**step.ms, "full" if step.full else "cached": whole}.items():
            if name not in nothing:
                parts.setdefault(name, []).append(ms)
    return Said(parts=parts | ({loop: [total]} if loop else {}), mask=tuple(mask), rows=rows)


def check(session: Session, reference: Reference, only_full: bool = False) -> float:
    """Runs each recorded step on its recorded inputs.

    Args:
        session: What runs its graphs.
        reference: What torch computed.
        only_full: Leave cached steps out, which the undivided UNet has none of.

    Returns:
        PSNR of ``out_sample`` in dB, the worst of the steps.
    """
    steps = [step for step in reference.steps if step.full or not only_full]
    made = [run_step(session, step, session.graphs, ("out_sample",))["out_sample"] for step in steps]
    return min(psnr_db(step.tensors["out_sample"], out) for step, out in zip(steps, made, strict=True))


if __name__ == "__main__":
    main()
