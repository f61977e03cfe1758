"""The Typer application and what its commands share: consoles, options, progress, errors as one line."""

import gc
import importlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edgediff.errors import ConfigError, EdgediffError, MissingExtraError, VerificationError
from edgediff_runtime.errors import EdgeRuntimeError, one_line, warnings_told
from edgediff_runtime.schedulers import SCHEDULER_NAMES

app = typer.Typer(
    name="edgediff",
    help="Takes trained diffusion UNets to edge devices.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In less, tables lose cells, with COLUMNS=0 all of them; a narrower terminal wraps lines itself.
NARROWEST = 80


def _console(**where: Any) -> Console:
    """A console that prints text as it is: a file may be named ``[red]`` or ``:smile:``."""
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False, **where)
    if console.width < NARROWEST:
        console.width = NARROWEST
    return console


out = _console()
err = _console(stderr=True)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle: the directory that export wrote.", metavar="BUNDLE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
LevelOption = Annotated[int | None, typer.Option(help="High-resolution levels that stay outside of lowres.")]
PointOption = Annotated[str | None, typer.Option(help="Where lowres ends: before_upsample, after_upsample or block:N.")]
ClockOption = Annotated[str | None, typer.Option(help="Period (2) or mask (1,0,1,0; 1 = full) of the full steps.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.")]
SchedulerOption = Annotated[str | None, typer.Option(help=f"Of a model: {', '.join(SCHEDULER_NAMES)}.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")]


def read_only(options: list[str] | None) -> dict[str, str] | None:
    """Files of values by column, from options COLUMN=FILE."""
    pairs = [option.partition("=") for option in options or ()]
    for option, (column, _, file) in zip(options or (), pairs, strict=True):
        if not column or not file:
            raise ConfigError(f"--only {option}: expected COLUMN=FILE")
    return {column: file for column, _, file in pairs} or None


# Typer vendors click since 0.26 and used the installed one before: take the base class of its own errors.
UsageFault: Any = typer.BadParameter.__mro__[2]
# As a shell reports a program that a signal ended: SIGINT, SIGPIPE.
INTERRUPTED, CLOSED_PIPE = 130, 141
# ExecuTorch brings torchao, which diffusers imports in every command and which logs what it was not built for.
OF_TORCHAO = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")
SHARES_EVERY_S = 10


def main() -> None:
    """Runs the command line; what the user can put right is one line on standard error."""
    try:
        code = _run()
    except SystemExit:  # what rich and Typer raise where the reader of a pipe has left; no command exits by itself
        code = CLOSED_PIPE
    sys.exit(code)


def _run() -> int:
    """Runs the command that was asked for and gives its exit code."""
    for name in OF_TORCHAO:
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII terminal gets escapes, not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings_told(say_warning):
            code = app(standalone_mode=False)
        if code == INTERRUPTED:  # newer Typer returns the code where older ones raise Abort
            raise KeyboardInterrupt
    except VerificationError as e:
        code = _say_error(e, 1)
    except (EdgediffError, EdgeRuntimeError) as e:
        code = _say_error(e, 2)
    except UsageFault as e:
        # A bare `edgediff` shows its help and raises without a message.
        code = _say_error(e.format_message(), 2) if e.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        code = _say_error("interrupted; what was there is as it was", INTERRUPTED)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        code = _say_error(f"{e.strerror or e}{where}", 2)
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"edgediff {metadata.version('edgediff')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


def _say_error(message: object, code: int) -> int:
    err.print("error:", style="red", end=" ")
    err.print(one_line(message, limit=None))
    return code


def say_warning(message: str) -> None:
    """Prints a warning on standard error."""
    err.print("warning:", style="yellow", end=" ")
    err.print(message)


def toolchain(module: str, command: str, extra: str = "export") -> Any:
    """Imports a part of the toolchain, or says which extra the command needs."""
    try:
        found = importlib.import_module(module)
        gc.collect()
        gc.freeze()  # half a million long-lived objects, which each collection would visit again
        return found
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] in ("edgediff", "edgediff_runtime"):
            raise
        raise MissingExtraError(f"edgediff {command}", extra) from e


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A line that says what is being done, and the share of it that is done where that is known.

    Where there is no terminal, one line for each thing; of what advances by shares, one every ten seconds.
    """
    if not err.is_terminal:
        last = -math.inf

        def say(what: str, share: float | None = None) -> None:
            nonlocal last
            if share is None or share >= 1 or time.monotonic() - last >= SHARES_EVERY_S:
                last = time.monotonic()
                err.print(what)

        yield say
        return
    with Progress(
        TextColumn("{task.description}", style="cyan", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        # The stream as it is now: converters that are kept quiet have theirs redirected for minutes.
        console=_console(file=sys.stderr),
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, share=None: bar.update(task, description=what, completed=share or 0, total=share and 1)


def print_json(data: object, indent: int | None = 1) -> None:
    """Prints plain data as indented JSON, or on one line."""
    print(json.dumps(data, indent=indent), flush=True)
