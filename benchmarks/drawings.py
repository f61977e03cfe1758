"""What are both papers worth on a small Stable Diffusion that draws, in 8 steps and in 4?

Without options: multiply-adds, sizes on disk, and one picture from the prompt to the pixels in turns: the student in
int8 at clock 2, and that in 4 steps, against the teacher at clock 1 in diffusers' own pipeline (the bar: 15 times as
fast). With `--images DRAWINGS` (`metadata.jsonl` with name, style and split) also whether the pictures are what was
asked for: 500 training prompts and all held-out ones, for each model, precision and clock. Each line of that is kept in
`--folder`, and not measured again. adaptors.py says what their adaptors are worth.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from measure import exported, in_turns, machine, ratios, spread, verdict

import edgediff
from edgediff.bench.turns import Call, Said
from edgediff.config.choices import Cut
from edgediff.evaluate.retrieval import evaluate_retrieval
from edgediff.models.macs import tally
from edgediff.models.trained import own_adaptors
from edgediff.targets.onnx import OnnxConfig
from edgediff.zoo import FOLDER, built_in
from edgediff_runtime import EdgePipeline

TEACHER, STUDENT, FEW = "drawings-64", "drawings-64-student", "drawings-64-student-4-steps"
THINGS = FOLDER / TEACHER / "things.txt"
PROMPT, SEED = "red apple, fluent 3d", 1
NUM_PROMPTS = 500
SPEED, WITHIN = 15.0, 2.0
# Of a bundle's graphs.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"onnx": OnnxConfig(dtype="fp16")},
    "int8": {"onnx": OnnxConfig(quantize_nbits=8)},
}
CLOCKS = (1, 2, 4)
WHAT = ("cost", "speed", "retrieval")


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = [name for name in (TEACHER, STUDENT, FEW) if built_in(name) is not None]
    parser.add_argument("models", nargs="*", default=built, help="the first is the teacher")
    parser.add_argument("--images", type=Path, help="captioned drawings")
    parser.add_argument("--what", nargs="*", choices=WHAT, default=WHAT)
    parser.add_argument("--precision", nargs="*", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="bundles and lines stay here, and are found; else all is deleted")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.folder is None else given.folder
        folder.mkdir(parents=True, exist_ok=True)
        if "cost" in given.what:
            show_cost(given.models)
        if "speed" in given.what:
            show_speed(given.models, folder, given.rounds)
        if "retrieval" in given.what and given.images is not None:
            show_retrieval(given.models, folder, given.images, given.precision)


def bundle_of(model: str, folder: Path, precision: str, clock: int) -> str:
    """The bundle of a model in a precision, with the adaptor for a clock; exported where it is not there yet."""
    weights = edgediff.load_model(model).sha256[:8]
    name = f"{Path(model).name}-{weights}-{precision}-{clock}"
    if not (folder / name).exists():
        exported(model, folder / name, clock=clock, adaptor=None, **PRECISIONS[precision])
    return str(folder / name)


# Multiply-adds, bytes


def show_cost(models: list[str]) -> None:
    """Multiply-adds of a step, of the teacher's, and bytes of the model's directory."""
    costs = {}
    for name in models:
        model = edgediff.load_model(name)
        found = tally(edgediff.split(model.unet, Cut()), model.sample_shape, model.conditioning.tensors)
        full, cached = found.parts["full"], found.parts["cached"]
        costs[name] = full.macs
        place = built_in(name) or Path(name)
        parts = [place / part for part in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")]
        size = sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())
        print(
            f"{Path(name).name}: {full.parameters:,} parameters, {full.macs / 1e6:.1f} M multiply-adds and "
            f"{full.macs_attention / 1e6:.1f} M of attention, 1/{costs[models[0]] / full.macs:.1f}; a cached step "
            f"{cached.macs / full.macs:.3f} of a full one; {size / 1e6:.2f} MB on disk"
        )


# Time


def drawing_runtime(bundle: str, clock: int) -> Iterator[Said]:
    """A turn is a picture, from the prompt to the pixels."""
    pipe = EdgePipeline.from_pretrained(bundle)
    pipe(prompt=PROMPT, seed=SEED, clock=clock)
    yield Said()
    while True:
        start = perf_counter()
        result = pipe(prompt=PROMPT, seed=SEED, clock=clock)
        yield Said(parts={"picture": [1e3 * (perf_counter() - start)], **{k: [v] for k, v in result.stages.items()}})


def drawing_diffusers(model: str, steps: int, guidance_scale: float) -> Iterator[Said]:
    """A turn is a picture by diffusers' own pipeline, every step full."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "np"}
    pipe(PROMPT, **asked)
    yield Said()
    while True:
        start = perf_counter()
        pipe(PROMPT, **asked)
        yield Said(parts={"picture": [1e3 * (perf_counter() - start)]})


def show_speed(models: list[str], folder: Path, rounds: int) -> None:
    """One picture: the first model in diffusers, all in the runtime, clocks 1 and 2, fp32 and int8, in turns."""
    teacher = models[0]
    loaded = edgediff.load_model(teacher)
    place = built_in(teacher) or Path(teacher)
    asked = {"steps": loaded.usual_steps, "guidance_scale": loaded.usual_guidance}
    contenders: dict[str, Any] = {"diffusers": Call.of(drawing_diffusers, model=str(place), **asked)}
    for model in models:
        for precision in ("fp32", "int8"):
            bundle = bundle_of(model, folder, precision, 2)
            for clock in (1, 2):
                name = f"{Path(model).name}, {precision}, clock {clock}"
                contenders[name] = Call.of(drawing_runtime, bundle=bundle, clock=clock)
    found = {name: runner.parts for name, runner in in_turns(contenders, rounds).items()}
    theirs = found["diffusers"]["picture"]
    print(f"one picture, {rounds} rounds in turns, ms: {Path(teacher).name} in diffusers, clock 1, {spread(theirs)}")
    for name, parts in list(found.items())[1:]:
        times = ratios(theirs, parts["picture"])
        stages = ", ".join(f"{stage} {spread(ms)}" for stage, ms in parts.items() if stage != "picture")
        has_bar = name == f"{STUDENT}, int8, clock 2"
        bar = f" (bar: {SPEED:g}) {verdict(median(times) >= SPEED)}" if has_bar else ""
        print(f"  {name}: {spread(parts['picture'])}: {spread(times)} times as fast{bar}; {stages}")


# Pictures


def taught_prompts() -> list[str]:
    """What the built-in models were taught: things, each in one of the styles."""
    styles = ("fluent 3d", "fluent flat", "noto", "twemoji")
    names = THINGS.read_text(encoding="utf-8").splitlines()
    return [f"{name}, {styles[i % len(styles)]}" for i, name in enumerate(names)]


def show_retrieval(models: list[str], folder: Path, images: Path, precisions: list[str]) -> None:
    """A table: is the picture the thing that was asked for?"""
    print("| model | precision | clock | taught: top 1, top 5 | style | kernel x1000 | spectrum, top octaves | copies "
          "| held out: top 1, top 5 |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    top: dict[tuple[str, str, int], float] = {}
    for model in models:
        for precision in precisions:
            for clock in clocks_of(model):
                found = retrieval(model, folder, images, precision, clock)
                rows = {row["split"]: row for row in found["rows"]}
                taught, held_out = rows["train"], rows["test"]
                top[model, precision, clock] = taught["found"]["top_5"]
                far = taught["distances"]
                errors = f"{far['spectrum_error']:.3f}, {far['spectrum_error_top']:.3f}"
                print(
                    f"| {Path(model).name} | {precision} | {clock} | {tops(taught)} | "
                    f"{100 * taught['found']['style']:.1f} | {1e3 * far['kernel_distance']:.1f} +- "
                    f"{1e3 * far['kernel_spread']:.1f} | {errors} | "
                    f"{100 * taught['nearest']['share_nearer']:.1f} % | {tops(held_out)} |",
                    flush=True,
                )
    drawings = {each["split"]: each["drawings"] for each in found["asked"]}
    print(f"the drawings themselves: {tops({'found': drawings['train']})}; {tops({'found': drawings['test']})}")
    for (model, precision, clock), share in top.items():
        lost = 100 * (top[model, precision, 1] - share)
        if clock == 2 and precision == "fp32":
            print(f"{Path(model).name}: clock 2 loses {lost:.1f} points (bar: {WITHIN:g}) {verdict(lost <= WITHIN)}")


def clocks_of(model: str) -> list[int]:
    """Clock 1, and those that the model has adaptors for at its own number of steps."""
    loaded = edgediff.load_model(model)
    points = [record.trained_for for _, record in own_adaptors(loaded)]
    clocks = {1, *(point.clock for point in points if point.num_inference_steps == loaded.usual_steps)}
    return [clock for clock in CLOCKS if clock in clocks]


def tops(row: dict[str, Any]) -> str:
    """Top 1 and top 5 in percent, with the standard error of the second."""
    found = row["found"]
    return f"{100 * found['top_1']:.1f}, **{100 * found['top_5']:.1f}** +- {100 * found['top_5_spread']:.1f}"


def retrieval(model: str, folder: Path, images: Path, precision: str, clock: int) -> Any:
    """What `edgediff evaluate retrieval` says of a bundle at a clock; kept beside the bundles."""
    bundle = Path(bundle_of(model, folder, precision, max(clock, 2)))
    asked = (bundle / "manifest.json").read_bytes(), (images / "metadata.jsonl").read_bytes(), str(NUM_PROMPTS).encode()
    hashed = hashlib.sha256(b"".join(asked)).hexdigest()[:16]
    kept = folder / f"{bundle.name}-at-{clock}-{hashed}.json"
    if not kept.exists():
        found = evaluate_retrieval(
            bundle,
            images,
            only={"name": str(THINGS)},
            num_prompts=NUM_PROMPTS,
            clocks=(clock,),
            grid=kept.with_suffix(".png"),
        )
        kept.write_text(json.dumps(found.to_dict()))
    return json.loads(kept.read_text())


if __name__ == "__main__":
    main()
