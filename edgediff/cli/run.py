"""``edgediff run``."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgediff.cli.app import (
    BundleArgument,
    ClockOption,
    GuidanceOption,
    JsonOption,
    StepsOption,
    app,
    out,
    print_json,
    progress,
)
from edgediff.targets.backends import BACKENDS

if TYPE_CHECKING:
    from edgediff_runtime import Step


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
        typer.Option(
            help=f"One of: {', '.join(BACKENDS)}; left out, the usual one of the bundle. `edgediff doctor` says which "
            "run here."
        ),
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
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the backend; left out, its own choice. Core ML has none.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images with a bundle."""
    from edgediff.targets.backends import open_session, usual_backend
    from edgediff_runtime import EdgePipeline, open_bundle
    from edgediff_runtime.image import check_output, write_output
    from edgediff_runtime.pipeline import Result

    request: dict[str, Any] = {"label": label, "prompt": prompt, "num_images": num_images, "seed": seed}
    request |= {"num_inference_steps": steps, "clock": clock, "guidance_scale": guidance_scale}
    opened = open_bundle(bundle)
    check_output(output, scale, opened.manifest.sample.space)
    if conditioning is not None:
        from edgediff.data.arrays import load_arrays, prompt_arguments

        request |= prompt_arguments(load_arrays(conditioning))
    with progress() as say:
        say(f"opening {bundle}")
        chosen = usual_backend(opened) if backend is None else backend
        pipe = EdgePipeline(opened.manifest, open_session(opened, chosen, compute_units, threads))
        result = Result.of(_telling(pipe.stream(**request), say), pipe.manifest)
    write_output(result, output, scale)
    if as_json:
        ledger = [step.to_dict() for step in result.ledger]
        print_json({"images": [str(output)], "mask": result.mask, "ledger": ledger})
    else:
        from edgediff.cli.render.tables import ledger_table

        out.print(ledger_table(result))
        out.print(f"{num_images} images: {output}")


def _telling(steps: Iterable["Step"], say: Callable[[str], None]) -> Iterator["Step"]:
    for step in steps:
        say(f"step {step.index + 1}: t = {step.timestep:g}, {'full' if step.full else 'cached'}")
        yield step
