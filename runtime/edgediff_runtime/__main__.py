"""``python -m edgediff_runtime BUNDLE -o out.png``: images where only the light install is present."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from edgediff_runtime import EdgePipeline, EdgeRuntimeError, open_bundle
from edgediff_runtime.clock import letters
from edgediff_runtime.errors import warnings_told
from edgediff_runtime.image import check_output, check_previews, read_latents, read_size, write_output, write_preview
from edgediff_runtime.inversion import read_inverted
from edgediff_runtime.loop import Step
from edgediff_runtime.low_rank import read_specs
from edgediff_runtime.pictures import edit_arguments

# As a shell reports a program that SIGPIPE ended.
CLOSED_PIPE = 141


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors here."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"error: {message}\n")


def main() -> int:
    """Generates a grid of images from a bundle; 0, or 2 with one line on standard error."""
    parser = OneLine(prog="edgediff_runtime", description="Generate images from an edgediff bundle.")
    parser.add_argument("bundle", help="the bundle's directory")
    parser.add_argument("-o", "--output", default="out.png", help="a .png, or .npy for the latents (default: out.png)")
    parser.add_argument("--label", help="class of all images; left out, one class after the other")
    parser.add_argument("--prompt", action="append", help="what to draw; given more than once, an image for each")
    parser.add_argument("--negative-prompt", help="what guidance leads away from")
    parser.add_argument("--image", type=Path, help="a picture to begin with, scaled and cut to the size that is drawn")
    parser.add_argument("--strength", type=float, help="share of the steps that change it (0.8, or 1 with --mask)")
    parser.add_argument("--mask", type=Path, help="a picture of the image's size, white where it is drawn anew")
    parser.add_argument("--paste", action="store_true", help="outside of the mask, the image's own pixels")
    parser.add_argument(
        "--feather", type=int, default=0, help="pixels inside of the mask's edge over which a pasted picture fades in"
    )
    parser.add_argument("--image-guidance-scale", type=float, help="of a model that follows instructions (1.5)")
    parser.add_argument("--depth", type=Path, help="a depth map for a model that takes one, white being near")
    parser.add_argument(
        "--control", type=Path, action="append", default=[],
        help="a picture that the bundle's ControlNet or T2I-Adapter draws by; one for each of several ControlNets",
    )  # fmt: skip
    parser.add_argument("--control-scale", type=float, action="append", default=[], help="how strongly, from 0 (1)")
    parser.add_argument("--lora", action="append", metavar="FILE[:scale]", help="a LoRA that `edgediff lora` converted")
    parser.add_argument("--latents", type=Path, help="a .npy to begin with in place of noise")
    parser.add_argument("--inverted", type=Path, help="a .npz of `edgediff invert`, whose layout the picture keeps")
    parser.add_argument("--inject-attention", type=float, help="share of the steps that take its self-attention (0.5)")
    parser.add_argument("--inject-features", type=float, help="share of the steps that take its features (0.8)")
    parser.add_argument("--scheduler", help="another sampler than the bundle's, such as ddim or euler")
    parser.add_argument(
        "--num-images", type=int, help="default: one for each prompt, 1 with --image, --latents or --inverted, else 16"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: the bundle's)")
    parser.add_argument("--clock", help="period (2) or mask (1,0,1,0; 1 = full) of the full steps")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels, such as 512x768 (default: the bundle's)")
    parser.add_argument("--tile", type=int, help="decode larger pictures in tiles of this side in pixels")
    parser.add_argument("--preview", type=Path, metavar="FOLDER", help="write a PNG of each step's prediction there")
    parser.add_argument("--low-memory", action="store_true", help="open one component at a time")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep optimized graphs there, to open them faster")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the backend's own choice)")
    backends = (
        "onnxruntime (default), onnxruntime-cuda on an NVIDIA GPU, openvino, openvino-bf16 (of ONNX graphs too), "
        "or coreml on a Mac"
    )
    parser.add_argument("--backend", default="onnxruntime", help=backends)
    parser.add_argument("--json", action="store_true", help="print the ledger as JSON")
    args = parser.parse_args()
    try:
        edit = edit_arguments(
            args.image, args.mask, args.depth, args.control, strength=args.strength, paste=args.paste,
            image_guidance_scale=args.image_guidance_scale, control_scale=args.control_scale, feather=args.feather,
        )  # fmt: skip
        edit |= read_specs(args.lora)
        bundle, output = open_bundle(args.bundle), Path(args.output)
        check_output(output, scale=1, has_decoder=bundle.manifest.has_decoder)
        pipe = EdgePipeline.from_pretrained(
            args.bundle, args.backend, threads=args.threads, low_memory=args.low_memory, cache=args.cache
        )
        if args.preview is not None:
            check_previews(args.preview, pipe.can_preview)
        previews = list[Path]()

        def show(step: Step) -> None:
            if args.preview is not None:
                previews.append(write_preview(args.preview, step.index, pipe.preview(step.predicted), scale=1))

        width, height = read_size(args.size)
        if args.latents is not None:
            edit["latents"] = read_latents(args.latents)
        if args.inverted is not None:
            edit["inverted"] = read_inverted(args.inverted)
        edit |= {"inject_attention": args.inject_attention, "inject_features": args.inject_features}
        begun = (args.prompt, args.image, args.latents, args.inverted)
        usual = 16 if all(each is None for each in begun) else None
        with warnings_told(lambda line: print(f"warning: {line}", file=sys.stderr)):
            result = pipe(
                label=args.label,
                prompt=args.prompt[0] if args.prompt is not None and len(args.prompt) == 1 else args.prompt,
                negative_prompt=args.negative_prompt,
                num_images=usual if args.num_images is None else args.num_images,
                output_type="image" if output.suffix == ".png" else "latent",
                num_inference_steps=args.steps,
                scheduler=args.scheduler,
                clock=args.clock,
                guidance_scale=args.guidance_scale,
                seed=args.seed,
                width=width,
                height=height,
                tile=args.tile,
                callback=show,
                **edit,
            )
        write_output(result, output, scale=1)
    except EdgeRuntimeError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    if args.json:
        ledger = [step.to_dict() for step in result.ledger]
        whole = {"images": [args.output], "mask": result.mask, "ledger": ledger, "stages": result.stages}
        more = {"flops_saved": result.flops_saved, "peak_bytes": result.peak_bytes}
        told = {**whole, **more, "previews": list(map(str, previews))}
        said = json.dumps(told, indent=1)
    else:
        mask = letters(result.mask)
        count = len(result.latents)
        drawn = f"{count} image{'s' * (count != 1)} in {result.ms:.0f} ms"
        said = f"{drawn} (steps {mask}; F full, c cached): {args.output}"
    try:
        print(said, flush=True)
    except BrokenPipeError:  # the reader has left; the images are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
