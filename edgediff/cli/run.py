"""``edgediff run``."""

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
from edgediff_runtime.schedulers import SCHEDULER_NAMES

if TYPE_CHECKING:
    from edgediff_runtime import Step


@app.command(
    epilog="Examples:  edgediff run bundle -o out.png --label Orange   |   edgediff run bundle -o out.png "
    "--num-images 9 --steps 20 --clock 4 --seed 7   |   edgediff run bundle -o out.png --image photo.jpg "
    "--mask mask.png --paste --prompt 'a green apple'"
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
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; given more than once, an image for each.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    clip_skip: Annotated[int, typer.Option(help="Layers left out at the end of the text encoder.")] = 0,
    conditioning: Annotated[
        Path | None, typer.Option(help="Embeddings instead of a prompt, .safetensors or .npz.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture to begin with; it is scaled and cut to the size that is drawn, see --strength."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that change the image, 0 to 1; left out, 0.8, or 1 with --mask."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture of the image's size, white where it is drawn anew.")
    ] = None,
    paste: Annotated[
        bool, typer.Option("--paste", help="Outside of the mask, the image's own pixels in the finished picture.")
    ] = False,
    feather: Annotated[
        int, typer.Option(help="Pixels inside of the mask's edge over which a pasted picture fades in.")
    ] = 0,
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(help="How far a model that follows instructions keeps to the image; left out, 1.5."),
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="A depth map for a model that takes one, white being near.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE[:scale]: a LoRA that `edgediff lora` converted, for a bundle that was exported with "
            "--lora-inputs; may be given more than once."
        ),
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture that the bundle's ControlNet or T2I-Adapter draws by, such as edges; one for each of "
            "several ControlNets, in their order."
        ),
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        typer.Option(help="How strongly, from 0; left out, 1; may be given once for each of several ControlNets."),
    ] = None,
    latents: Annotated[
        Path | None, typer.Option(help="A .npy to begin with in place of noise, such as `edgediff invert` writes.")
    ] = None,
    inverted: Annotated[
        Path | None,
        typer.Option(
            help="A .npz of `edgediff invert`: the picture keeps its layout. For a bundle exported with --injection."
        ),
    ] = None,
    inject_attention: Annotated[
        float | None, typer.Option(help="Share of the steps that take its self-attention; left out, 0.5.")
    ] = None,
    inject_features: Annotated[
        float | None, typer.Option(help="Share of the steps that take its features; left out, 0.8.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            help="How many images; left out, one for each prompt, 1 with --image, --latents or --inverted, else 16."
        ),
    ] = None,
    steps: StepsOption = None,
    scheduler: Annotated[
        str | None, typer.Option(help=f"Another sampler than the bundle's: {', '.join(SCHEDULER_NAMES)}.")
    ] = None,
    clock: ClockOption = None,
    guidance_scale: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of the picture, such as 512x768; left out, the bundle's usual one.")
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(help="Decode a larger picture in overlapping tiles of this side in pixels, to save memory."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="A folder, where a PNG shows what each step predicts the picture to be.")
    ] = None,
    scale: Annotated[int, typer.Option(help="Each pixel becomes a square of this many.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the backend; left out, its own choice. Core ML has none.")
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Open each component when its stage comes, and drop it after.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="A folder in which the backend keeps optimized graphs, to open them faster the next time."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images with a bundle."""
    from edgediff.targets.backends import open_pipeline, usual_backend
    from edgediff_runtime import open_bundle
    from edgediff_runtime.image import (
        check_output,
        check_previews,
        read_latents,
        read_size,
        write_output,
        write_preview,
    )
    from edgediff_runtime.inversion import read_inverted
    from edgediff_runtime.low_rank import read_specs
    from edgediff_runtime.pictures import edit_arguments

    request: dict[str, Any] = {"label": label, "seed": seed, "clip_skip": clip_skip, "negative_prompt": negative_prompt}
    request |= {"num_inference_steps": steps, "clock": clock, "guidance_scale": guidance_scale, "scheduler": scheduler}
    request["width"], request["height"] = read_size(size)
    request["prompt"] = prompt[0] if prompt is not None and len(prompt) == 1 else prompt
    edit = edit_arguments(
        image, mask, depth, control or (), strength=strength, image_guidance_scale=image_guidance_scale,
        control_scale=control_scale or (), paste=paste, feather=feather,
    )  # fmt: skip
    request |= edit | read_specs(lora) | {"inject_attention": inject_attention, "inject_features": inject_features}
    if latents is not None:
        request["latents"] = read_latents(latents)
    if inverted is not None:
        request["inverted"] = read_inverted(inverted)
    begun = any(each is not None for each in (prompt, image, latents, inverted))
    request["num_images"] = 16 if num_images is None and not begun else num_images
    opened = open_bundle(bundle)
    check_output(output, scale, opened.manifest.has_decoder)
    if conditioning is not None:
        from edgediff.data.arrays import load_arrays, prompt_arguments

        given = prompt_arguments(load_arrays(conditioning))
        request |= {name: value for name, value in given.items() if value is not None}
    with progress() as say:
        say(f"opening {bundle}")
        chosen = usual_backend(opened) if backend is None else backend
        pipe = open_pipeline(opened, chosen, compute_units, threads, low_memory, cache)
        check_output(output, scale, pipe.can_decode)
        if preview is not None:
            check_previews(preview, pipe.can_preview)
        previews = list[Path]()

        def show(step: "Step") -> None:
            say(_told(step))
            if preview is not None:
                previews.append(write_preview(preview, step.index, pipe.preview(step.predicted), scale))

        wanted: Any = "image" if output.suffix == ".png" else "latent"
        result = pipe(**request, output_type=wanted, callback=show, tile=tile)
    write_output(result, output, scale)
    if as_json:
        ledger = [step.to_dict() for step in result.ledger]
        told: dict[str, Any] = {"ledger": ledger, "stages": result.stages, "peak_bytes": result.peak_bytes}
        told["flops_saved"] = result.flops_saved
        told["previews"] = [str(file) for file in previews]
        print_json({"images": [str(output)], "mask": result.mask, **told})
    else:
        from edgediff.cli.render.tables import ledger_table

        out.print(ledger_table(result))
        count = len(result.latents)
        out.print(f"{count} image{'s' * (count != 1)}: {output}")


def _told(step: "Step") -> str:
    return f"step {step.index + 1}: t = {step.timestep:g}, {'full' if step.full else 'cached'}"
