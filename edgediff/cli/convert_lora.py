"""``edgediff lora``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff.cli.app import BundleArgument, JsonOption, app, out, print_json, toolchain


@app.command(epilog="Then:  edgediff run bundle -o out.png --lora style.safetensors:0.8 --prompt 'a red apple'")
def lora(
    bundle: BundleArgument,
    file: Annotated[Path, typer.Argument(help="A LoRA by the names of diffusers or kohya.", metavar="FILE")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors.")] = Path("lora.safetensors"),
    unet_only: Annotated[
        bool, typer.Option("--unet-only", help="Leave out layers of text encoders, which a bundle does not take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a LoRA for a bundle that was exported with --lora-inputs RANK."""
    from edgediff.errors import ConfigError
    from edgediff.models.lora import read_spec
    from edgediff.outputs import check_file, write_whole
    from edgediff_runtime import open_bundle
    from edgediff_runtime.low_rank import DOWN, FORMAT, NO_INPUTS

    if output.suffix != ".safetensors":
        raise ConfigError(f"cannot write {output}; expected a name that ends in .safetensors")
    check_file(output)
    inputs = open_bundle(bundle).manifest.lora
    if inputs is None:
        raise ConfigError(f"{bundle}: {NO_INPUTS}")
    path, scale = read_spec(str(file))
    if scale != 1:
        raise ConfigError(f"{file}: a scale is given to `edgediff run`, not here; leave it out")
    factors = toolchain("edgediff.models.lora_factors", "lora").lora_factors(path, inputs, unet_only)
    from safetensors.numpy import save

    # Through Python: safetensors' own writer has its own error for a full disk.
    write_whole(output, lambda place: place.write_bytes(save(factors, FORMAT)))
    ranks = [len(array) for name, array in factors.items() if name.endswith(DOWN)]
    if as_json:
        print_json({"lora": str(output), "layers": len(ranks), "rank": max(ranks)})
    else:
        out.print(f"{len(ranks)} layers of rank {max(ranks)}, of {inputs.rank} that the bundle takes: {output}")
