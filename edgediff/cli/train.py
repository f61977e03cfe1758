"""``edgediff train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgediff.cli.app import (
    ClockOption,
    GuidanceOption,
    JsonOption,
    LevelOption,
    PointOption,
    StepsOption,
    app,
    err,
    out,
    print_json,
    progress,
    toolchain,
)
from edgediff.errors import ConfigError

train = typer.Typer(help="Train what a model needs for the edge.", no_args_is_help=True)
app.add_typer(train, name="train")


@train.command(
    epilog="Examples:  edgediff train adaptor grocery-32 -o my-adaptor   |   edgediff train adaptor grocery-32 -o four "
    "--clock 4 --rollout student   |   accelerate launch -m edgediff train adaptor --config training.yaml -o trained"
)
def adaptor(
    model: Annotated[str | None, typer.Argument(help="A diffusers directory, or a built-in name.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the adaptor is to be.")] = Path("adaptor"),
    config: Annotated[Path | None, typer.Option(help="Settings, a YAML file.")] = None,
    kind: Annotated[str | None, typer.Option("--adaptor", help="resnet, unet or unet-light.")] = None,
    level: LevelOption = None,
    point: PointOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    scheduler: Annotated[str | None, typer.Option(help="dpmpp_2m, dpmpp_2m_karras, ddim or euler.")] = None,
    guidance_scale: GuidanceOption = None,
    rollout: Annotated[
        str | None, typer.Option(help="teacher (the paper's), or student: its own outputs are fed back.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="How many times trajectories are drawn.")] = None,
    images: Annotated[int | None, typer.Option(help="Trajectories of a round.")] = None,
    conditioning: Annotated[
        Path | None, typer.Option(help="Embeddings of prompts, .safetensors or .npz; for models with text.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, labels, noise and order.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adaptor on unrolled trajectories; an interrupted training goes on where it stopped."""
    settings = toolchain("edgediff.train.settings", "train adaptor")
    import msgspec

    asked: dict[str, Any] = {} if config is None else msgspec.to_builtins(settings.load_training(config))
    given = {
        "model": model, "adaptor": kind, "clock": clock, "steps": steps, "scheduler": scheduler,
        "guidance_scale": guidance_scale, "rollout": rollout, "rounds": rounds, "images": images, "seed": seed,
        "conditioning": None if conditioning is None else str(conditioning),
    }  # fmt: skip
    asked.update({key: value for key, value in given.items() if value is not None})
    for key, value in (("level", level), ("point", point)):
        if value is not None:
            asked.setdefault("cut", {})[key] = value
    checked = settings.training_from(asked)
    if checked.model is None:
        raise ConfigError("no model: name a diffusers directory, a built-in one, or settings with a model")
    trainer = toolchain("edgediff.train.adaptor", "train adaptor", "train")
    load = toolchain("edgediff.models.load", "train adaptor")
    try:
        with progress() as say:
            say(f"loading {checked.model}")
            done = trainer.train_adaptor(load.load_model(checked.model), output, checked, progress=say)
    except KeyboardInterrupt:
        err.print("the same command goes on from the last checkpoint", markup=False)
        raise
    if not trainer.is_main_process():
        return
    if as_json:
        print_json({"adaptor": str(output), "trained": done is not None} | ({} if done is None else done.to_dict()))
    elif done is None:
        out.print(f"{output} is already there, trained with the same settings: nothing to do", markup=False)
    else:
        gain = done.gain
        out.print(f"{done.updates} updates, loss {done.loss:.4f} of the identity adaptor's")
        out.print(
            f"PSNR against clock 1, {gain.images} images of unseen seeds: identity {gain.identity:.2f} dB, "
            f"learned {gain.learned:.2f} dB"
        )
        out.print(f"adaptor: {done.path}", markup=False)
