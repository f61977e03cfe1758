"""Contenders in turns (A B C A B C), each in a process of its own, so that memory, threads and faults are its own.

A process reads lines of JSON and answers each with one: first a `Call`, answered when what is to be timed is open and
found right; then ``"round"`` for each turn. `edgediff.bench.worker` serves Python functions so; a program in another
environment may speak the same lines.
"""

import contextlib
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import msgspec

from edgediff.bench.ledger import Status
from edgediff.bench.machine import free_memory

Say = Callable[[str], None]
WORKER = (sys.executable, "-m", "edgediff.bench.worker")
# Seconds that a process is given to end by itself.
END_S = 5.0
# Environment variables by which maths libraries take their number of threads.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Said(msgspec.Struct, frozen=True):
    """What a process answers.

    Attributes:
        says: Why it cannot go on; empty where it can.
        wrong: Whether that is because its output is not the reference's.
        psnr_db: Of its output against the reference, the worst.
        peak_mib: Peak memory until now; the worker adds it.
        mask: The steps as they were run, 1 = full.
        rows: UNet rows in a step.
        parts: Samples of this turn by part, in milliseconds.
    """

    says: str = ""
    wrong: bool = False
    psnr_db: float | None = None
    peak_mib: float | None = None
    mask: tuple[int, ...] = ()
    rows: int = 0
    parts: dict[str, list[float]] = msgspec.field(default_factory=dict)


def parts_of(
    steps: Iterable[tuple[bool, Mapping[str, float]]], stages: Mapping[str, float], loop: str
) -> dict[str, list[float]]:
    """Samples of each part of one generation, in milliseconds.

    Args:
        steps: Whether each is full, and its milliseconds by part.
        stages: Of each component beside the UNet; where there are any, all of them and the loop are ``picture``.
        loop: What all steps together are called.

    Returns:
        ``full`` and ``cached`` are whole steps, also where a graph of that name has a time of its own.

    >>> parts_of([(True, {"full": 3.0, "other": 1.0})], {"vae_decoder": 2.0}, "loop")
    {'full': [4.0], 'other': [1.0], 'loop': [4.0], 'vae_decoder': [2.0], 'picture': [6.0]}
    """
    parts: dict[str, list[float]] = {}
    whole = 0.0
    for full, times in steps:
        step = sum(times.values())
        whole += step
        for name, ms in {**times, "full" if full else "cached": step}.items():
            parts.setdefault(name, []).append(ms)
    parts[loop] = [whole]
    parts |= {name: [ms] for name, ms in stages.items()}
    if stages:
        parts["picture"] = [whole + sum(stages.values())]
    return parts


class Call(msgspec.Struct, frozen=True):
    """What a process is to time.

    Attributes:
        function: ``package.module:name`` or ``file.py:name``: a generator that opens what it times and checks it,
            yields a `Said`, then one for each turn.
        given: Its keyword arguments, as JSON has them.
    """

    function: str
    given: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Iterator[Said]], **given: Any) -> "Call":
        """The call of a function of edgediff's, or of a script's."""
        module = function.__module__
        where = module if module.startswith("edgediff.") else inspect.getfile(inspect.unwrap(function))
        return cls(f"{where}:{function.__name__}", given)


@dataclass
class Runner:
    """A contender and its process.

    Attributes:
        name: For people.
        call: What it is told first.
        needs: Bytes that it will hold, estimated.
        threads: How many its libraries may use; their own choice where None.
        command: What is started.
        status: As of a `Contender`; nothing is started where it is not ``measured``.
        says: Why it was not measured.
        heard: What its process has said.
        psnr_db: Of its output against the reference.
    """

    name: str
    call: Call
    needs: int = 0
    threads: int | None = None
    command: Sequence[str] = WORKER
    status: Status = "measured"
    says: str = ""
    heard: list[Said] = field(default_factory=list)
    psnr_db: float | None = None
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = None

    @property
    def parts(self) -> dict[str, list[float]]:
        """Milliseconds by part, over all turns."""
        parts: dict[str, list[float]] = {}
        for said in self.heard:
            for name, samples in said.parts.items():
                parts.setdefault(name, []).extend(samples)
        return parts

    def start(self) -> None:
        """Starts the process and hears whether it is ready."""
        free = free_memory()
        if free is not None and self.needs > free:
            self._end("refused", f"needs about {self.needs / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with the process
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(self.threads),
        )
        self._tell(msgspec.json.encode(self.call))

    def turn(self) -> None:
        """Asks for one turn; nothing happens where the process has ended."""
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
        if not answer.endswith(b"\n"):  # nothing, or half an answer
            self._end("died", self._last_words(process))
            return
        said = msgspec.json.decode(answer, type=Said)
        self.psnr_db = said.psnr_db if said.psnr_db is not None else self.psnr_db
        if said.says:
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

    def _end(self, status: Status, says: str) -> None:
        self.status, self.says = status, says
        self.close()


def take_turns(runners: Sequence[Runner], rounds: int, progress: Say = lambda what: None) -> None:
    """Opens contenders one after the other, asks each once a round, and ends them.

    Args:
        runners: Those that cannot be measured say why in `Runner.says`; the others go on.
        rounds: How often each is asked; 0 only opens them.
        progress: Told what is being done.
    """
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.close)
            if runner.status == "measured":
                progress(f"opening {runner.name}")
                runner.start()
        for i in range(rounds):
            for runner in runners:
                if runner.status != "measured":
                    continue
                progress(f"round {i + 1} of {rounds}: {runner.name}")
                runner.turn()


def _environment(threads: int | None) -> dict[str, str]:
    return {**os.environ, **({} if threads is None else dict.fromkeys(THREADS, str(threads)))}
