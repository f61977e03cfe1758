"""``edgediff train``."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from edgediff.cli.app import (
    ClockOption,
    GuidanceOption,
    JsonOption,
    LevelOption,
    PointOption,
    SchedulerOption,
    StepsOption,
    app,
    err,
    out,
    print_json,
    progress,
    read_only,
    toolchain,
)
from edgediff.errors import ConfigError
from edgediff.zoo import check_source

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The folder of the result.")]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Settings: a YAML file, or the name of one in export_configs/train.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Images to learn from: a folder with a subfolder for each class, or images alone; with captions in "
        "metadata.jsonl, or in a .txt file beside each image."
    ),
]
HeldOutOption = Annotated[
    Path | None, typer.Option(help="Images that are not learnt from; without it, a tenth of --data is held out.")
]
UpdatesOption = Annotated[int | None, typer.Option(help="Optimizer steps.")]
BatchOption = Annotated[int | None, typer.Option(help="Images of an update.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of weights, order and noise.")]
SizeOption = Annotated[int | None, typer.Option(help="Height and width of the images, in pixels.")]
RoundsOption = Annotated[int | None, typer.Option(help="How many times trajectories are drawn.")]
TrajectoriesOption = Annotated[int | None, typer.Option(help="Trajectories of a round.")]
ConditioningOption = Annotated[
    Path | None,
    typer.Option(help="For models with text: prompts, one a line (.txt), or embeddings (.safetensors, .npz)."),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN=FILE", help="Learn only images with captions whose column has a value of the file's."),
]

train = typer.Typer(help="Train what a model needs for the edge.", no_args_is_help=True)
app.add_typer(train, name="train")


@train.command(
    epilog="Examples:  edgediff train adaptor grocery-32 -o my-adaptor   |   edgediff train adaptor grocery-32 -o four "
    "--clock 4 --rollout student   |   accelerate launch -m edgediff train adaptor --config training.yaml -o trained"
)
def adaptor(
    model: Annotated[str | None, typer.Argument(help="A diffusers directory, or a built-in name.")] = None,
    output: OutputOption = Path("adaptor"),
    config: Annotated[Path | None, typer.Option(help="Settings, a YAML file.")] = None,
    kind: Annotated[str | None, typer.Option("--adaptor", help="resnet, unet or unet-light.")] = None,
    level: LevelOption = None,
    point: PointOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    guidance_scale: GuidanceOption = None,
    rollout: Annotated[
        str | None, typer.Option(help="teacher (the paper's), or student: its own outputs are fed back.")
    ] = None,
    rounds: RoundsOption = None,
    images: TrajectoriesOption = None,
    conditioning: ConditioningOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adaptor on unrolled trajectories; the same command resumes an interrupted training."""
    if model is not None:
        check_source(model)
    given = {
        "model": model, "adaptor": kind, "clock": clock, "steps": steps, "scheduler": scheduler,
        "guidance_scale": guidance_scale, "rollout": rollout, "rounds": rounds, "images": images, "seed": seed,
        "conditioning": conditioning, "cut": {"level": level, "point": point},
    }  # fmt: skip
    asked = _asked("adaptor", config, given)
    if asked.model is None:
        raise ConfigError("no model: name a diffusers directory, a built-in one, or settings with a model")
    trainer = toolchain("edgediff.train.adaptor", "train adaptor", "train")
    load = toolchain("edgediff.models.load", "train adaptor")

    def run(say: Callable[..., None]) -> Any:
        say(f"loading {asked.model}")
        return trainer.train_adaptor(load.load_model(asked.model), output, asked, progress=say)

    done = _train("adaptor", run, output, as_json, key="adaptor")
    if done is not None:
        gain = done.gain
        out.print(f"{done.updates} updates, loss {done.loss:.4f} of the identity adaptor's")
        out.print(
            f"PSNR against clock 1, {gain.images} images of unseen seeds: identity {gain.identity:.2f} dB, "
            f"learned {gain.learned:.2f} dB"
        )
        out.print(f"adaptor: {done.path}")
        out.print(f"next: edgediff export {asked.model} --adaptor {done.path}")


@train.command(
    epilog="Examples:  edgediff train teacher grocery-32 --data photographs -o mine   |   edgediff train teacher "
    "--config grocery-64-teacher --data photographs -o teacher   |   accelerate launch -m "
    "edgediff train teacher --config teacher.yaml -o teacher"
)
def teacher(
    model: Annotated[
        str | None, typer.Argument(help="Whose geometry is trained: a diffusers directory, or a built-in name.")
    ] = None,
    output: OutputOption = Path("teacher"),
    start: Annotated[
        str | None, typer.Option("--from", help="A model to train further: a diffusers directory, or a built-in name.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    held_out: HeldOutOption = None,
    only: OnlyOption = None,
    size: SizeOption = None,
    updates: UpdatesOption = None,
    batch: BatchOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a UNet of any geometry on a folder of images; the same command resumes an interrupted training."""
    given = {
        "model": model, "start": start, "data": data, "held_out": held_out, "only": read_only(only), "size": size,
        "updates": updates, "batch": batch, "seed": seed,
    }  # fmt: skip
    _train_unet("teacher", output, config, given, as_json)


@train.command(
    epilog="Examples:  edgediff train student grocery-32 --data photographs --width 16 -o student   |   edgediff train "
    "student grocery-32 --data photographs --width 16 --no-gating --spatial 0 --frequency 0 -o lite"
)
def student(
    teacher: Annotated[str | None, typer.Argument(help="A diffusers directory, or a built-in name.")] = None,
    output: OutputOption = Path("student"),
    config: ConfigOption = None,
    data: DataOption = None,
    held_out: HeldOutOption = None,
    only: OnlyOption = None,
    width: Annotated[int | None, typer.Option(help="Channels of the highest level, a multiple of 8.")] = None,
    gating: Annotated[bool | None, typer.Option(help="Wavelet gating, or plain resampling.")] = None,
    wavelet: Annotated[str | None, typer.Option(help="The gating's filter: haar, db2, sym4 and others.")] = None,
    spatial: Annotated[float | None, typer.Option(help="Lambda of the spatial term.")] = None,
    frequency: Annotated[float | None, typer.Option(help="Lambda of the frequency term.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Exponent of the frequency weights.")] = None,
    updates: UpdatesOption = None,
    batch: BatchOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a slim student of a teacher (Spectral Diffusion); the same command resumes an interrupted training."""
    given = {
        "teacher": teacher, "data": data, "held_out": held_out, "only": read_only(only), "width": width,
        "gating": gating, "wavelet": wavelet, "spatial": spatial, "frequency": frequency, "alpha": alpha,
        "updates": updates, "batch": batch, "seed": seed,
    }  # fmt: skip
    _train_unet("student", output, config, given, as_json)


@train.command(
    epilog="Examples:  edgediff train decoder stable-diffusion --data photographs -o decoder   |   edgediff train "
    "decoder my-drawings --config drawings-64-decoder --data drawings -o tiny"
)
def decoder(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Whose latents are decoded: the directory of a pipeline or an autoencoder, or a built-in name."
        ),
    ] = None,
    output: OutputOption = Path("decoder"),
    config: ConfigOption = None,
    data: DataOption = None,
    held_out: HeldOutOption = None,
    only: OnlyOption = None,
    size: SizeOption = None,
    updates: UpdatesOption = None,
    batch: BatchOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a decoder for a pipeline's latents, for --vae; the same command resumes an interrupted training."""
    given = {
        "model": model, "data": data, "held_out": held_out, "only": read_only(only), "size": size, "updates": updates,
        "batch": batch, "seed": seed,
    }  # fmt: skip
    if model is not None:
        check_source(model)
    asked = _asked("decoder", config, given)
    trainer = toolchain("edgediff.train.decoder", "train decoder", "train")
    done = _train("decoder", lambda say: trainer.train_decoder(output, asked, progress=say), output, as_json, key="vae")
    if done is not None:
        if done.skipped:
            err.print(done.skipped)
        out.print(f"{done.updates} updates on {done.images} images: {done.psnr:.2f} dB; {done.before:.2f} dB before")
        out.print(f"autoencoder: {done.path}")


@train.command(
    name="few-steps",
    epilog="Examples:  edgediff train few-steps my-model --conditioning prompts.txt -o four   |   edgediff train "
    "few-steps my-student --teacher my-model --steps 2 --clock 1 --conditioning prompts.txt -o two",
)
def few_steps(
    model: Annotated[str | None, typer.Argument(help="A diffusers directory, or a built-in name.")] = None,
    output: OutputOption = Path("few-steps"),
    config: ConfigOption = None,
    teacher: Annotated[
        str | None, typer.Option(help="Whose trajectories are learnt from; without it, the model's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the result.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(help="A multiple of them; without it, four times.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="The teacher's sampler; without it, its usual one.")] = None,
    clock: ClockOption = None,
    guidance_scale: GuidanceOption = None,
    rounds: RoundsOption = None,
    images: TrajectoriesOption = None,
    passes: Annotated[int | None, typer.Option(help="How often each trajectory is learnt from.")] = None,
    conditioning: ConditioningOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a model to a few steps without guidance, with an adaptor beside it; the same command resumes."""
    for source in (model, teacher):
        if source is not None:
            check_source(source)
    given = {
        "model": model, "teacher": teacher, "steps": steps, "teacher_steps": teacher_steps, "clock": clock,
        "scheduler": scheduler, "guidance_scale": guidance_scale, "rounds": rounds, "images": images, "passes": passes,
        "conditioning": conditioning, "seed": seed,
    }  # fmt: skip
    asked = _asked("few-steps", config, given)
    trainer = toolchain("edgediff.train.few_steps", "train few-steps", "train")
    run = partial(trainer.train_few_steps, output, asked)
    done = _train("few-steps", lambda say: run(progress=say), output, as_json, key="model")
    if done is not None:
        near = done.nearness
        cached = "" if near.cached is None else f", {near.cached:.2f} dB at clock {asked.clock}"
        out.print(f"{done.updates} updates: unseen seeds {near.full:.2f} dB{cached}; {near.before:.2f} dB before")
        out.print(f"model: {done.path}")


def _asked(what: str, config: Path | None, given: dict[str, Any]) -> Any:
    """The settings of a file, overridden by the options that were given."""
    import msgspec

    settings = toolchain("edgediff.train.settings", f"train {what}")
    kind = getattr(settings, f"{what.title().replace('-', '')}Training")
    asked: dict[str, Any] = {} if config is None else msgspec.to_builtins(settings.load_training(config, kind))
    for name, value in given.items():
        if isinstance(value, dict):
            asked[name] = (asked.get(name) or {}) | {key: part for key, part in value.items() if part is not None}
        elif value is not None:
            asked[name] = str(value) if isinstance(value, Path) else value
    return settings.training_from(asked, kind)


def _train(what: str, run: Callable[..., Any], output: Path, as_json: bool, key: str) -> Any:
    """Runs a training; returns its result, or None where there is nothing more to print."""
    try:
        with progress() as say:
            done = run(say)
    except KeyboardInterrupt:
        err.print("the same command resumes from the last checkpoint")
        raise
    if not toolchain("edgediff.train.claim", f"train {what}", "train").is_main_process():
        return None
    if as_json:
        result = {} if done is None else asdict(done) | {"path": str(done.path)}
        print_json({key: str(output), "trained": done is not None} | result)
        return None
    if done is None:
        out.print(f"{output} is already there, trained with the same settings: nothing to do")
    return done


def _train_unet(what: str, output: Path, config: Path | None, given: dict[str, Any], as_json: bool) -> None:
    asked = _asked(what, config, given)
    trainer = toolchain(f"edgediff.train.{what}", f"train {what}", "train")
    run = partial(getattr(trainer, f"train_{what}"), output, asked)
    done = _train(what, lambda say: run(progress=say), output, as_json, key="model")
    if done is not None:
        if done.skipped:
            err.print(done.skipped)
        if done.cut:
            err.print(f"{done.cut} captions were longer than the text encoder takes, and were cut")
        out.print(f"{done.updates} updates on {done.images} images: loss {done.loss:.4f}, held out {done.held_out:.4f}")
        out.print(f"model: {done.path}")
