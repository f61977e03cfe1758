"""``edgediff invert``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgediff.cli.app import BundleArgument, ClockOption, JsonOption, StepsOption, app, out, print_json, progress
from edgediff.targets.backends import BACKENDS

if TYPE_CHECKING:
    from edgediff_runtime import Step


@app.command(
    epilog="Then:  edgediff run bundle -o out.png --latents latents.npy --scheduler ddim --steps 20 --guidance-scale 1 "
    "--prompt 'the same, or another'   |   With a bundle exported with --injection:  edgediff invert bundle in.png -o "
    "in.npz   |   edgediff run bundle -o out.png --inverted in.npz --prompt 'another'"
)
def invert(
    bundle: BundleArgument,
    image: Annotated[
        Path, typer.Argument(help="The picture; it is scaled and cut to the size that is drawn.", metavar="IMAGE")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .npy for the latents, or .npz for all that --inverted takes.")
    ] = Path("latents.npy"),
    prompt: Annotated[str | None, typer.Option(help="What the picture shows.")] = None,
    label: Annotated[str | None, typer.Option(help="Its class, for a model of classes.")] = None,
    steps: StepsOption = None,
    refinements: Annotated[
        int, typer.Option(help="How often each step is taken again; more is closer to the picture, and slower.")
    ] = 1,
    clock: ClockOption = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of the picture; left out, the bundle's usual one.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(BACKENDS)}; left out, the usual one of the bundle.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the backend; left out, its own choice.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the noise that DDIM draws a picture from, to draw it again with another prompt."""
    from edgediff.targets.backends import open_pipeline, usual_backend
    from edgediff_runtime import open_bundle
    from edgediff_runtime.errors import RequestError
    from edgediff_runtime.image import check_output, read_size, write_latents
    from edgediff_runtime.inversion import write_inverted
    from edgediff_runtime.pictures import open_picture

    width, height = read_size(size)
    picture = open_picture(image, "IMAGE")
    check_output(output.with_suffix(".npy"), scale=1, has_decoder=True)
    if output.suffix not in (".npy", ".npz"):
        raise RequestError(f"cannot write {output}: expected a name that ends in .npy, for latents alone, or in .npz")
    opened = open_bundle(bundle)
    with progress() as say:
        say(f"opening {bundle}")
        pipe = open_pipeline(opened, usual_backend(opened) if backend is None else backend, threads=threads)

        def show(step: "Step") -> None:
            say(f"call {step.index + 1}: t = {step.timestep:g}, {'full' if step.full else 'cached'}")

        found = pipe.invert(
            picture, num_inference_steps=steps, refinements=refinements, clock=1 if clock is None else clock,
            prompt=prompt, label=label, width=width, height=height, callback=show,
        )  # fmt: skip
    if output.suffix == ".npz":
        write_inverted(found, output)
    else:
        write_latents(found.latents, output)
    if as_json:
        told: dict[str, Any] = {"latents": str(output), "mask": found.mask, "stages": found.stages}
        told["flops_saved"] = found.flops_saved
        print_json({**told, "ledger": [step.to_dict() for step in found.ledger]})
    else:
        out.print(f"latents in {sum(sum(step.ms.values()) for step in found.ledger):.0f} ms: {output}")
