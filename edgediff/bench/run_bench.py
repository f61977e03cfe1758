"""One run: every contender in a process of its own, asked in turns (A B C A B C), right before it is timed."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO

import msgspec

from edgediff.bench.contenders import BACKENDS, NOT_BY_DEFAULT, Backend, Whole, named
from edgediff.bench.ledger import Contender, Ledger, Row, Settings, rows_of, spread
from edgediff.bench.machine import describe_machine, free_memory
from edgediff.bench.worker import Said, Task
from edgediff.errors import ConfigError
from edgediff_runtime import Bundle, Manifest, clock_mask, make_scheduler, open_bundle

Say = Callable[[str], None]
# Runtimes keep weights a second time, laid out for their kernels.
WEIGHTS_TIMES = 2.2
# Tracing a model takes it twice.
EXPORT_TIMES = 2
BASE_BYTES = 300 * 2**20
# Seconds that a process is given to end by itself.
END_S = 5.0
# What the libraries that backends multiply with ask for their number of threads.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_bench(
    bundles: Sequence[Path],
    backends: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    clock: str | None = None,
    num_images: int = 1,
    guidance_scale: float | None = None,
    rounds: int = 10,
    threads: int | None = None,
    undivided: bool = True,
    progress: Say = lambda what: None,
) -> Ledger:
    """Times bundles in backends.

    Args:
        bundles: Their directories.
        backends: Names; all that there are if None, but those that are there to be right and not to be fast.
        steps: Denoising steps; each bundle's own if None.
        clock: Period or mask; each bundle's own if None.
        num_images: Images at once.
        guidance_scale: Each bundle's own if None; 1 halves the rows.
        rounds: How often each contender is asked; a round is a generation at the clock and one at clock 1.
        threads: How many a backend may use; its own choice if None.
        undivided: Whether to export the undivided UNet and run it too; else the bundles' own graphs at clock 1 are what
            time is saved against.
        progress: Told what is being done.

    Returns:
        The ledger. What could not be measured is in it with the reason.

    Raises:
        BundleError: A bundle is damaged.
        ConfigError: There is no bundle, or a number is out of range.
        RequestError: The clock or the number of steps is none.
        UnsupportedError: A backend is unknown.
    """
    for name, number in (("num_images", num_images), ("rounds", rounds), ("threads", threads)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; expected a whole number above 0")
    if not bundles:
        raise ConfigError("no bundle was given")
    chosen = [named(name) for name in dict.fromkeys(backends)] if backends else [
        backend for backend in BACKENDS if backend.name not in NOT_BY_DEFAULT
    ]  # fmt: skip
    opened = [(str(path), open_bundle(path)) for path in dict.fromkeys(bundles)]
    for _, bundle in opened:
        point = bundle.manifest.operating_point
        count = point.num_inference_steps if steps is None else steps
        make_scheduler(bundle.manifest.scheduler, count)
        clock_mask(point.clock if clock is None else clock, count)
    asked = Task(None, steps=steps, clock=clock, num_images=num_images, guidance_scale=guidance_scale, threads=threads)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgediff-bench-")))
        runners = list(_runners(opened, chosen, asked, folder if undivided else None, progress))
        peak = _Runner(Contender("", "peak", "", "measured"), asked)
        for runner in (peak, *runners):
            stack.callback(runner.close)
            runner.start(progress)
        for i in range(rounds):
            for runner in (peak, *runners):
                progress(f"round {i + 1} of {rounds}: {runner.words}")
                runner.turn()
        gflops = [said.gflops for said in peak.heard if said.gflops is not None]
        for runner in (peak, *runners):
            runner.close()
    settings = Settings(steps, clock, num_images, guidance_scale, rounds, threads)
    manifests = {name: bundle.manifest for name, bundle in opened}
    return _ledger(runners, manifests, median(gflops) if gflops else None, settings)


@dataclass
class _Runner:
    """A contender and its process.

    Attributes:
        contender: What is known of it.
        task: What its process is told.
        needs: Bytes that it will hold, guessed.
        heard: What its process has said.
        without: Why there is no undivided UNet beside it.
    """

    contender: Contender
    task: Task
    needs: int = 0
    heard: list[Said] = field(default_factory=list)
    without: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the undivided UNet."""
        return self.task.undivided

    @property
    def words(self) -> str:
        """Its name for people."""
        known = self.contender
        return f"{known.bundle} in {known.backend}{', undivided' if self.is_whole else ''}" if known.bundle else "peak"

    def start(self, say: Say) -> None:
        """Starts the process and hears whether it is ready."""
        if self.contender.status != "measured":
            return
        free = free_memory()
        if free is not None and self.needs > free:
            self._end("refused", f"needs about {self.needs / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
            return
        say(f"opening {self.words}")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgediff.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(self.task.threads),
        )
        self._tell(msgspec.json.encode(self.task))

    def turn(self) -> None:
        """Asks for one turn."""
        if self._process is not None:
            self._tell(b'"round"')

    def close(self) -> None:
        """Ends the process: it is asked to, then killed."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._wait(self._process)
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> int:
        try:
            code = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        assert process.stdout is not None
        process.stdout.close()
        return code

    def _tell(self, line: bytes) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer.endswith(b"\n"):  # nothing, or the half of an answer
            self._end("died", self._last_words(process))
            return
        said = msgspec.json.decode(answer, type=Said)
        if said.says:
            self.contender = msgspec.structs.replace(self.contender, psnr_db=said.psnr_db)
            self._end("wrong" if said.wrong else "refused", said.says)
            return
        self.heard.append(said)

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        code = self._wait(process)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {how}{f': {lines[-1].strip()}' if lines else ''}"

    def _end(self, status: str, says: str) -> None:
        self.contender = msgspec.structs.replace(self.contender, status=status, says=says)
        self.close()


def _runners(
    opened: Sequence[tuple[str, Bundle]], chosen: Sequence[Backend], asked: Task, folder: Path | None, say: Say
) -> Iterator[_Runner]:
    """A runner for each bundle in each backend, and beside it one for the undivided UNet where that can be had."""
    for number, (name, bundle) in enumerate(opened):
        manifest = bundle.manifest
        there = [target.target for target in manifest.targets]
        whole, reason = None, ""
        # The undivided UNet is in fp32: beside it, graphs of eight bits would have saved what the clock did not.
        alike = [target for target in manifest.targets if target.target == "onnx" and target.dtype == "fp32"]
        runs_onnx = any(backend.is_installed and backend.target(manifest) == "onnx" for backend in chosen)
        if folder is not None and runs_onnx and alike:
            whole, reason = _whole(name, manifest, folder / str(number), say)
        for backend in chosen:
            known = Contender(name, backend.name, manifest.source.sha256, "measured")
            target = backend.target(manifest)
            if not backend.is_installed:
                known = msgspec.structs.replace(known, status="absent", says=f"not installed: {backend.install}")
            elif backend.targets and target is None:
                says = f"runs {' or '.join(backend.targets)} graphs, the bundle has {', '.join(there)}"
                known = msgspec.structs.replace(known, status="absent", says=says)
            task = msgspec.structs.replace(asked, bundle=name, backend=backend.name)
            needs = _needs(manifest)
            without = reason if target == "onnx" and known.status == "measured" else ""
            yield _Runner(known, task, needs, without=without)
            has_whole = folder is not None if not backend.targets else target == "onnx" and whole is not None
            if known.status == "measured" and has_whole:
                yield _Runner(known, msgspec.structs.replace(task, undivided=True, whole=whole), needs)


def _environment(threads: int | None) -> dict[str, str]:
    return {**os.environ, **({} if threads is None else dict.fromkeys(THREADS, str(threads)))}


def _needs(manifest: Manifest) -> int:
    parameters = manifest.cost["full"].parameters + manifest.cost["adaptor"].parameters
    return BASE_BYTES + int(4 * WEIGHTS_TIMES * parameters)


def _whole(name: str, manifest: Manifest, folder: Path, say: Say) -> tuple[Whole | None, str]:
    """The undivided UNet in ONNX, written by a process of its own; None and the reason where it cannot be had."""
    folder.mkdir()
    known = Contender(name, "export", manifest.source.sha256, "measured")
    runner = _Runner(known, Task(name, export_to=str(folder)), EXPORT_TIMES * _needs(manifest))
    say(f"exporting the undivided UNet of {name}")
    try:
        runner.start(say)
    finally:
        runner.close()
    return runner.heard[0].whole if runner.heard else None, runner.contender.says


def _ledger(
    runners: Sequence[_Runner], manifests: dict[str, Manifest], peak: float | None, settings: Settings
) -> Ledger:
    """Sums everything up."""
    contenders: list[Contender] = []
    rows: list[Row] = []
    saved: dict[str, float] = {}
    whole = {(r.contender.bundle, r.contender.backend): r for r in runners if r.is_whole}
    for runner in runners:
        known = runner.contender
        if runner.is_whole:
            continue
        key = known.bundle, known.backend
        beside = whole.get(key)
        parts = _together(runner)
        # Beside a contender that was never asked, the undivided UNet has nothing to be compared with.
        asked = bool(parts.get("loop"))
        beside_parts = _together(beside) if beside is not None and asked else {}
        if asked:
            known = _judged(runner, parts, beside_parts, manifests[known.bundle], peak)
        without = runner.without if beside is None else beside.contender.says
        if known.status == "measured" and without:
            known = msgspec.structs.replace(known, says=f"the undivided UNet: {without}")
        contenders.append(known)
        rows += rows_of(*key, parts, known.peak_mib)
        wanted = {name: samples for name, samples in beside_parts.items() if name in ("undivided", "undivided_loop")}
        rows += rows_of(*key, wanted, beside.heard[-1].peak_mib if beside is not None and beside.heard else None)
        if known.ratio is not None:
            label = known.backend if len(manifests) == 1 else f"{known.backend} ({known.bundle})"
            saved[label] = round(known.ratio, 4)
    return Ledger(
        machine=describe_machine(),
        settings=settings,
        peak_gflops=None if peak is None else round(peak, 1),
        contenders=tuple(contenders),
        rows=tuple(rows),
        time_saved_over_flops_saved=saved,
    )


def _together(runner: _Runner) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for said in runner.heard:
        for name, samples in said.parts.items():
            parts.setdefault(name, []).extend(samples)
    return parts


def _judged(
    runner: _Runner,
    parts: dict[str, list[float]],
    beside: dict[str, list[float]],
    manifest: Manifest,
    peak: float | None,
) -> Contender:
    """What the clock saved, and how near the machine's peak the steps came."""
    last = runner.heard[-1]
    cost = {name: manifest.cost[name] for name in ("full", "cached")}
    macs = {name: found.macs + found.macs_attention for name, found in cost.items()}
    flops_saved = 1 - sum(macs["full" if full else "cached"] for full in last.mask) / (len(last.mask) * macs["full"])
    always = beside.get("undivided_loop") or parts["loop_clock1"]
    # Each round against itself: what a machine does in the course of a run would not be the clock's doing. A process
    # that died has fewer rounds.
    saved = tuple(round(1 - loop / whole, 4) for loop, whole in zip(parts["loop"], always, strict=False))
    gflop = {name: 2e-9 * last.rows * count for name, count in macs.items()}
    return msgspec.structs.replace(
        runner.contender,
        psnr_db=runner.heard[0].psnr_db,
        mask=last.mask,
        rows=last.rows,
        peak_mib=last.peak_mib,
        undivided="undivided" if "undivided_loop" in beside else "own",
        flops_saved=round(flops_saved, 4),
        time_saved=round(median(saved), 4),
        time_saved_spread=spread(saved) if len(saved) > 1 else None,
        share_of_peak={
            name: round(gflop[name] / (1e-3 * median(parts[name])) / peak, 4)
            for name in ("full", "cached")
            if peak is not None and parts.get(name) and named(runner.contender.backend).on_cpu
        },
    )
