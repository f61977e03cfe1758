"""``edgediff export`` and ``edgediff verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgediff.cli.app import (
    BundleArgument,
    ClockOption,
    GuidanceOption,
    JsonOption,
    LevelOption,
    PointOption,
    SchedulerOption,
    StepsOption,
    app,
    out,
    print_json,
    progress,
    toolchain,
)
from edgediff.cli.recipe import AdaptorOption, ConfigOption, check_recipe, load_recipe_model, recipe_with
from edgediff.errors import ConfigError, VerificationError
from edgediff.targets import TARGETS

if TYPE_CHECKING:
    from edgediff.bundle.rows import ParityReport


def _titles(setting: str) -> str:
    """The targets whose section of a recipe has a setting."""
    return " and ".join(form.title for form in TARGETS.values() if setting in form.config.__struct_fields__)


def _weight_formats() -> str:
    """The formats that weights can be stored in, with the targets that have them."""
    return "; ".join(
        f"{', '.join(form.weight_formats)} for {form.title}" for form in TARGETS.values() if form.weight_formats
    )


@app.command(
    epilog="Examples:  edgediff export grocery-32 -o bundle   |   edgediff export path/to/diffusers/dir -o bundle "
    "--clock 1,0,0,1,0,0,0,1   |   edgediff export sd15 -o sd --random-weights 0 --verify graphs"
)
def export(
    model: Annotated[
        str | None, typer.Argument(help="A diffusers directory, a single file, or a built-in name.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle is to be.")] = Path("bundle"),
    config: ConfigOption = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE[:scale]: a LoRA that is fused into the model; may be given more than once."),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE[:token]: a textual inversion, whose token prompts may then name; may be given more than once."
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="A directory or a file with the VAE that replaces the pipeline's.")
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(help="A directory or a file with an AutoencoderTiny of the same latents (TAESD), for previews."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="A directory with a ControlNet of the same base, to draw by a control image; may be given more than "
            "once: their residuals are added up."
        ),
    ] = None,
    t2i_adapter: Annotated[
        str | None,
        typer.Option(
            "--t2i-adapter", help="A directory with a T2I-Adapter of the same base, to draw by a control image."
        ),
    ] = None,
    injection: Annotated[
        bool,
        typer.Option("--injection", help="Graphs for plug-and-play editing: see `edgediff run --inverted`."),
    ] = False,
    lora_inputs: Annotated[
        int | None,
        typer.Option(
            help="A rank: the graphs take LoRAs of attention, up to it, with each picture; see `edgediff lora`.",
            metavar="RANK",
        ),
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(help="What a single file predicts: epsilon, v_prediction or sample; left out, it is inferred."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read a .ckpt, or an embedding's .pt, too: tensors, and no code."),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"What to write: {', '.join(TARGETS)}; may be given more than once."),
    ] = None,
    level: LevelOption = None,
    point: PointOption = None,
    adaptor: AdaptorOption = None,
    clock: ClockOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    guidance_scale: GuidanceOption = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32 (ONNX's default) or fp16 (Core ML's), of everything; or COMPONENT=DTYPE, such as "
            "vae_decoder=fp32; may be given more than once."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What weights are stored in, of everything or as COMPONENT=FORMAT: {_weight_formats()}; or a plan of "
            "weights, a file; may be given more than once."
        ),
    ] = None,
    quantize_nbits: Annotated[
        int | None, typer.Option(help=f"8: weights and matmuls of {_titles('quantize_nbits')} in int8.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="split (four graphs) or pair (a full and a cached step); left out, the faster that the clock allows."
        ),
    ] = None,
    deployment_target: Annotated[
        str | None, typer.Option(help="Oldest system for Core ML: iOS16, iOS17 or iOS18.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHT in pixels, such as 512x768, or any; may be given more than once, the first is the usual "
            "one; left out, the model's."
        ),
    ] = None,
    conditioning: Annotated[
        Path | None, typer.Option(help="Embeddings for the reference, .safetensors or .npz.")
    ] = None,
    random_weights: Annotated[int | None, typer.Option(help="Seed of random weights for a geometry.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the reference trajectory.")] = None,
    verify: Annotated[str | None, typer.Option(help="full, or graphs: no trajectory, for very large models.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    measure_memory: Annotated[
        bool,
        typer.Option("--measure-memory", help="Write what each component takes in memory into the manifest."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model as a verified bundle.

    Sampler, steps and guidance that are left out are the model's own.
    """
    from edgediff.bundle.staging import check_place
    from edgediff.data.arrays import load_arrays

    given = {
        "targets": target, "adaptor": adaptor, "clock": clock, "steps": steps, "scheduler": scheduler,
        "guidance_scale": guidance_scale, "layout": layout, "random_weights": random_weights, "seed": seed,
        "conditioning": None if conditioning is None else str(conditioning), "model": model,
        "lora": lora, "embedding": embedding, "vae": vae, "preview": preview, "control": control, "sizes": size,
        "injection": injection or None, "t2i_adapter": t2i_adapter, "lora_inputs": lora_inputs,
        "prediction_type": prediction_type,
    }  # fmt: skip
    recipe = recipe_with(config, given)
    for section, key, value in (
        ("cut", "level", level), ("cut", "point", point), ("verify", "mode", verify),
    ):  # fmt: skip
        if value is not None:
            recipe[section][key] = value
    _set_precisions(recipe, dtype or [])
    for text in weights or []:
        component, named, asked = text.rpartition("=")
        if named:
            recipe["weights"][component] = asked
        else:
            _set_in_sections(recipe, "weights", asked)
    settings = {"quantize_nbits": quantize_nbits, "deployment_target": deployment_target}
    for key, value in settings.items():
        _set_in_sections(recipe, key, value)
    checked = check_recipe(recipe)
    if checked.conditioning is not None:
        load_arrays(checked.conditioning)
    check_place(output, force=True)
    pipeline = toolchain("edgediff.export.export_bundle", "export")
    try:
        with progress() as say:
            say(f"loading {checked.model}")
            loaded = load_recipe_model(checked, "export", allow_pickle)
            done = pipeline.export_bundle(
                loaded, output, checked, force=force, measure_memory=measure_memory, progress=say
            )
    except VerificationError as e:
        if e.report is not None:
            _show_report(e.report, as_json)
        raise
    if as_json:
        print_json({"bundle": str(done.path), "exported": done.report is not None}
                    | (done.report.to_dict() if done.report else {}))  # fmt: skip
    elif done.report is None:
        out.print(f"{done.path} is already there and valid: nothing was exported")
    else:
        _show_report(done.report, as_json)
        out.print(f"bundle: {done.path}")


def _set_in_sections(recipe: dict[str, Any], key: str, value: object) -> None:
    """Puts an option into the section of each chosen target that has such a setting."""
    if value is None:
        return
    chosen = [name for name in recipe["targets"] if name in TARGETS and key in TARGETS[name].config.__struct_fields__]
    if not chosen:
        targets = ", ".join(recipe["targets"])
        raise ConfigError(f"--{key.replace('_', '-')} is for {_titles(key)}; the targets are: {targets}")
    for name in chosen:
        recipe[name][key] = value


def _set_precisions(recipe: dict[str, Any], given: list[str]) -> None:
    """Puts precisions where a recipe has them: of everything into the targets' sections, others by component."""
    for text in given:
        component, named, dtype = text.rpartition("=")
        if named:
            recipe["dtypes"][component] = dtype
            continue
        for name in recipe["targets"]:
            if name in TARGETS and dtype == "fp16" and dtype not in TARGETS[name].precisions:
                raise ConfigError(f"--dtype {dtype}: {TARGETS[name].title} has fp32 alone; leave target {name} out")
        _set_in_sections(recipe, "dtype", dtype)


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

    with progress() as say:
        report = verify_bundle(bundle, model, progress=say, targets=target)
    _show_report(report, as_json)
    if not report.ok:
        raise VerificationError(f"{bundle}: {report.failure}")


def _show_report(report: "ParityReport", as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        from edgediff.cli.render.tables import report_tables

        for table in report_tables(report):
            out.print(table)
