"""The command line: the only place that prints or exits.

Results go to standard output, progress and errors to standard error. Exit codes: 0 fine, 1 a check failed, 2 usage or
bad input, 130 interrupted. Commands import what they need when they run: `run`, `verify`, `inspect` of a bundle and
`doctor` work on the light install, without torch.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edgediff.errors import ConfigError, EdgediffError, MissingExtraError, VerificationError
from edgediff_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edgediff.placement import Note
    from edgediff.verify.rows import ParityReport
    from edgediff_runtime import Step

app = typer.Typer(
    name="edgediff",
    help="Takes trained diffusion UNets to edge devices.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True, highlight=False)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle: the directory that export wrote.", metavar="BUNDLE")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
LevelOption = Annotated[int | None, typer.Option(help="High-resolution levels that stay outside of lowres.")]
PointOption = Annotated[str | None, typer.Option(help="Where lowres ends: before_upsample or after_upsample.")]
ClockOption = Annotated[str | None, typer.Option(help="Period (2) or mask (1,0,1,0; 1 = full) of the full steps.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")]


# Typer carries click within itself since 0.26 and takes the installed one before: the base of what it raises is asked.
UsageFault: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130


def main() -> None:
    """Runs the command line; what the user can put right is one line on standard error."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # newer Typer returns the code where older ones raise Abort
            raise KeyboardInterrupt
    except VerificationError as e:
        code = _say_error(e, 1)
    except (EdgediffError, EdgeRuntimeError) as e:
        code = _say_error(e, 2)
    except UsageFault as e:
        # A bare `edgediff` shows its help and raises with nothing to say.
        code = _say_error(e.format_message(), 2) if e.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        code = _say_error("interrupted; what was there is as it was", INTERRUPTED)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        code = _say_error(f"{e.strerror or e}{where}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"edgediff {metadata.version('edgediff')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


def _say_error(message: object, code: int) -> int:
    err.print("[red]error:[/red]", end=" ")
    err.print(" ".join(str(message).split()), markup=False)
    return code


def _toolchain(module: str, command: str) -> Any:
    """Imports a part of the toolchain, or says which extra the command needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] in ("edgediff", "edgediff_runtime"):
            raise
        raise MissingExtraError(f"edgediff {command}", "export") from e


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; where there is no terminal, one line for each thing."""
    if not err.is_terminal:
        yield lambda what: err.print(what, markup=False)
        return
    with Progress(
        TextColumn("[cyan]{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        # The stream as it is now: converters that are kept quiet have theirs redirected for minutes.
        console=Console(file=sys.stderr, soft_wrap=True, highlight=False),
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what: bar.update(task, description=what)


@app.command(
    epilog="Examples:  edgediff export grocery-32 -o bundle   |   edgediff export path/to/diffusers/dir -o bundle "
    "--clock 1,0,0,1,0,0,0,1   |   edgediff export sd15 -o sd --random-weights 0 --verify graphs"
)
def export(
    model: Annotated[str | None, typer.Argument(help="A diffusers directory, or a built-in name.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle is to be.")] = Path("bundle"),
    config: Annotated[str | None, typer.Option(help="A YAML recipe, or the name of a built-in one.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="What to write: onnx, coreml; may be given more than once.")
    ] = None,
    level: LevelOption = None,
    point: PointOption = None,
    adaptor: Annotated[str | None, typer.Option(help="What stands in for lowres on cached steps.")] = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    scheduler: Annotated[str | None, typer.Option(help="dpmpp_2m, dpmpp_2m_karras, ddim or euler.")] = None,
    guidance_scale: GuidanceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of every target: fp32, or fp16 for Core ML (its default).")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="split (four graphs) or pair (a full and a cached step).")] = None,
    deployment_target: Annotated[
        str | None, typer.Option(help="Oldest system for Core ML: iOS16, iOS17 or iOS18.")
    ] = None,
    conditioning: Annotated[
        Path | None, typer.Option(help="Embeddings for the reference, .safetensors or .npz.")
    ] = None,
    random_weights: Annotated[int | None, typer.Option(help="Seed of random weights for a geometry.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the reference trajectory.")] = None,
    verify: Annotated[str | None, typer.Option(help="full, or graphs: no trajectory, for very large models.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model as a verified bundle."""
    import msgspec

    from edgediff.config import ExportConfig, config_from, load_config

    recipe: dict[str, Any] = msgspec.to_builtins(load_config(config) if config is not None else ExportConfig())
    given = {
        "targets": target, "adaptor": adaptor, "clock": clock, "steps": steps, "scheduler": scheduler,
        "guidance_scale": guidance_scale, "layout": layout, "random_weights": random_weights, "seed": seed,
        "conditioning": None if conditioning is None else str(conditioning), "model": model,
    }  # fmt: skip
    recipe.update({key: value for key, value in given.items() if value is not None})
    for section, key, value in (
        ("cut", "level", level), ("cut", "point", point), ("verify", "mode", verify),
        ("coreml", "deployment_target", deployment_target),
        *((section, "dtype", dtype) for section in ("onnx", "coreml") if section in recipe["targets"]),
    ):  # fmt: skip
        if value is not None:
            recipe[section][key] = value
    checked = config_from(recipe)
    if checked.model is None:
        raise ConfigError("no model: name a diffusers directory, a built-in one, or a recipe with a model")
    pipeline = _toolchain("edgediff.export.pipeline", "export")
    load = _toolchain("edgediff.models.load", "export")
    try:
        with _progress() as say:
            say(f"loading {checked.model}")
            done = pipeline.export_bundle(load.load_model(checked.model), output, checked, force=force, progress=say)
    except VerificationError as e:
        if e.report is not None:
            _show_report(e.report, as_json)
        raise
    if as_json:
        _print_json({"bundle": str(done.path), "exported": done.report is not None}
                    | (done.report.to_dict() if done.report else {}))  # fmt: skip
    elif done.report is None:
        out.print(f"{done.path} is already there and valid: nothing was exported", markup=False)
    else:
        _show_report(done.report, as_json)
        out.print(f"bundle: {done.path}", markup=False)


@app.command(epilog="Examples:  edgediff verify bundle   |   edgediff verify bundle --json")
def verify(
    bundle: BundleArgument,
    model: Annotated[str | None, typer.Option(help="The source, where it is not where the manifest says.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Verify this target alone; may be given more than once.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a bundle: every file, every graph, composed steps, the trajectory."""
    from edgediff.verify.parity import verify_bundle

    with _progress() as say:
        report = verify_bundle(bundle, model, progress=say, targets=target)
    _show_report(report, as_json)
    if not report.ok:
        raise VerificationError(f"{bundle} does not hold")


@app.command(
    epilog="Examples:  edgediff run bundle -o out.png --label Orange   |   edgediff run bundle -o out.png "
    "--num-images 9 --steps 20 --clock 4 --seed 7"
)
def run(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png (grid), or .npy for the latents.")] = Path(
        "out.png"
    ),
    backend: Annotated[
        str | None,
        typer.Option(help="onnxruntime, coreml (on a Mac), or mil-reference: Core ML packages evaluated in torch."),
    ] = None,
    compute_units: Annotated[
        str, typer.Option(help="What Core ML may use: all, cpu_only, cpu_and_gpu, cpu_and_ne.")
    ] = "all",
    label: Annotated[str | None, typer.Option(help="Class of all images; left out, one after the other.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Needs a text encoder in the bundle.")] = None,
    conditioning: Annotated[
        Path | None, typer.Option(help="Embeddings instead of a prompt, .safetensors or .npz.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="How many images.")] = 16,
    steps: StepsOption = None,
    clock: ClockOption = None,
    guidance_scale: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    scale: Annotated[int, typer.Option(help="Each pixel becomes a square of this many.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Generate images with a bundle."""
    from edgediff.verify.backends import open_session, usual_backend
    from edgediff_runtime import EdgePipeline, open_bundle
    from edgediff_runtime.image import check_output, write_output
    from edgediff_runtime.pipeline import Result

    request: dict[str, Any] = {"label": label, "prompt": prompt, "num_images": num_images, "seed": seed}
    request |= {"num_inference_steps": steps, "clock": clock, "guidance_scale": guidance_scale}
    if conditioning is not None:
        from edgediff.arrays import load_arrays, prompt_arguments

        request |= prompt_arguments(load_arrays(conditioning))
    with _progress() as say:
        say(f"opening {bundle}")
        opened = open_bundle(bundle)
        chosen = usual_backend(opened) if backend is None else backend
        pipe = EdgePipeline(opened.manifest, open_session(opened, chosen, compute_units))
        check_output(output, scale, pipe.manifest.sample.space)
        result = Result.of(_telling(pipe.stream(**request), say), pipe.manifest)
    write_output(result, output, scale)
    if as_json:
        ledger = [{"step": step.index, "full": step.full, "ms": step.ms} for step in result.ledger]
        _print_json({"images": [str(output)], "mask": result.mask, "ledger": ledger})
    else:
        from edgediff.tables import ledger_table

        out.print(ledger_table(result))
        out.print(f"{num_images} images: {output}", markup=False)


@app.command(epilog="Examples:  edgediff inspect sd15   |   edgediff inspect bundle --clock 4 --steps 20 --json")
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model (directory or built-in name) or a bundle.", metavar="MODEL|BUNDLE")
    ],
    level: LevelOption = None,
    point: PointOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    batch: Annotated[int | None, typer.Option(help="UNet rows in a step; left out, 2 where there is guidance.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show parts, parameters, operations and cache of a model or a bundle, and what a clock saves.

    Of a bundle also what is known to fall off the Neural Engine or ONNX Runtime's mobile accelerators, with a source
    for each line.
    """
    from edgediff.survey import survey_bundle

    if (Path(model) / "manifest.json").is_file():
        if level is not None or point is not None:
            raise ConfigError("--level and --point belong to a model; this is a bundle, its cut is made")
        found = survey_bundle(Path(model), clock, steps, batch)
        notes = _placement(Path(model))
    else:
        notes = None
        survey = _toolchain("edgediff.models.survey", "inspect MODEL")
        found = survey.survey_model(model, level, point, clock, steps, batch)
    if as_json:
        _print_json(found.to_dict() | ({} if notes is None else {"placement": [note.to_dict() for note in notes]}))
    else:
        from edgediff.tables import placement_table, survey_tables

        for table in survey_tables(found):
            out.print(table)
        if notes is not None:
            out.print(placement_table(notes))


def _placement(bundle: Path) -> "tuple[Note, ...] | None":
    """What is known to fall off accelerators; None on the light install, which cannot read graphs."""
    from edgediff.placement import lint_bundle

    try:
        return lint_bundle(bundle)
    except (EdgediffError, EdgeRuntimeError) as e:
        err.print(f"no placement: {e}", markup=False)
        return None


@app.command(epilog="Examples:  edgediff doctor   |   edgediff doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Say which versions are installed, what this machine can and cannot do, and which pairs are known to fail."""
    from edgediff.doctor import examine

    found = examine()
    if as_json:
        _print_json(found.to_dict())
    else:
        from edgediff.tables import doctor_tables

        for table in doctor_tables(found):
            out.print(table)
    if found.known_bad:
        raise VerificationError(f"{len(found.known_bad)} known-bad pair(s) of versions: {found.known_bad[0]}")


@app.command(epilog="Example:  edgediff demo -o demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle and the pictures.")] = Path(
        "out/demo"
    ),
) -> None:
    """Do the main job on the built-in model: export, verify, generate at clock 1 and clock 2, compare."""
    _toolchain("edgediff.export.pipeline", "demo")
    from edgediff.demo import run_demo
    from edgediff.tables import demo_tables

    with _progress() as say:
        shown = run_demo(output, say)
    for table in demo_tables(shown):
        out.print(table)
    if not shown.report.ok:
        raise VerificationError(f"{shown.bundle} does not hold")


def _telling(steps: Iterable["Step"], say: Callable[[str], None]) -> Iterator["Step"]:
    for step in steps:
        say(f"step {step.index + 1}: t = {step.timestep:g}, {'full' if step.full else 'cached'}")
        yield step


def _show_report(report: "ParityReport", as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
    else:
        from edgediff.tables import report_tables

        for table in report_tables(report):
            out.print(table)


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=1))
