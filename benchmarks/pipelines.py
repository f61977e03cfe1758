"""How large and how fast is a whole pipeline of true size, from the prompt to the picture? Random weights.

The bars. Stable Diffusion 1.5: exporting all of it to ONNX takes at most 8 minutes, and 3 times the UNet's fp32
weights in memory; a picture of 512 x 512 with `low_memory` at most 1.25 times the UNet's files and its activations,
with weights in fp32 and in int8 (`--weights int8`); with a cache, all of it is opened within 4 s; 8 steps at clock 2,
text encoder and decoder included, are at least 1.75 times as fast as diffusers' own pipeline. SDXL is exported in fp16
on a machine of 24 GiB, and draws a picture of 256 x 256. Needs 20 GB of disk, for SDXL 45.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from measure import exported, in_turns, machine, ratios, spread, verdict

from edgediff.bench.turns import Call, Said
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.memory import Usage

SCHEDULER = "dpmpp_2m"
PROMPT, SEED = "a red apple on a wooden table, studio light", 1
# How each is saved, exported and asked for a picture.
SAVED: dict[str, dict[str, Any]] = {"sd15": {}, "sdxl": {"half": True, "side": 32}}
DTYPE = {"sd15": "fp32", "sdxl": "fp16"}
REQUEST: dict[str, dict[str, Any]] = {
    "sd15": {"num_inference_steps": 8, "guidance_scale": 7.5},
    "sdxl": {"num_inference_steps": 2, "guidance_scale": 5.0},
}
WHAT = ("export", "memory", "opening", "time", "sizes")
MINUTES, WEIGHTS, LOW_MEMORY, OPENING, SPEED = 8.0, 3.0, 1.25, 4.0, 1.75
SAME_DB = 60.0


def main() -> None:
    """Saves, exports and runs the pipelines that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=SAVED, default=["sd15", "sdxl"])
    parser.add_argument("--what", nargs="*", choices=WHAT, default=WHAT)
    parser.add_argument("--weights", help="what weights are stored in: fp16, int8 or int4; left out, as they are")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with diffusers")
    parser.add_argument(
        "--folder", type=Path, help="pipelines and bundles stay here, and are found; else all is deleted"
    )
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if given.folder is None else given.folder
        for kind in given.kinds:
            stored = "" if given.weights is None else f"-{given.weights}"
            model, bundle = Path(folder) / kind, Path(folder) / f"{kind}{stored}-bundle"
            if not model.exists():
                in_turns({"save": Call.of(saving, kind=kind, folder=str(model))}, 0)
            if "export" in given.what or not bundle.exists():
                show_export(kind, model, bundle, given.weights)
            if "memory" in given.what:
                show_memory(kind, bundle)
            if "opening" in given.what and kind == "sd15":
                show_opening(bundle, given.rounds)
            if "time" in given.what and kind == "sd15":
                show_time(model, bundle, given.rounds)
            if "sizes" in given.what and kind == "sd15":
                show_sizes(model, bundle, Path(folder) / f"{kind}-any", given.rounds)


# Each in a process of its own


def saving(kind: str, folder: str) -> Iterator[Said]:
    """Saves a pipeline, without a turn."""
    from true_size import save_pipeline

    save_pipeline(kind, Path(folder), **SAVED[kind])
    yield Said()


def exporting(model: str, bundle: str, dtype: Any, weights: str | None, request: dict[str, Any]) -> Iterator[Said]:
    """The only turn loads a pipeline and exports it; what does not verify raises."""
    import edgediff
    from edgediff.config.floors import VerifyConfig
    from edgediff.targets.onnx import OnnxConfig

    yield Said()
    start, ends = perf_counter(), []
    config = edgediff.ExportConfig(
        onnx=OnnxConfig(dtype=dtype, weights=weights), clock=2, steps=request["num_inference_steps"],
        scheduler=SCHEDULER, adaptor="identity", guidance_scale=request["guidance_scale"],
        verify=VerifyConfig(mode="graphs"),
    )  # fmt: skip
    said: list[str] = []

    def tell(what: str) -> None:
        said.append(what)
        ends.append(perf_counter())

    edgediff.export_bundle(edgediff.load_model(model), bundle, config, progress=tell)
    times = np.diff([start, *ends, perf_counter()])
    parts = {"export": [1e3 * float(times.sum())], "load": [1e3 * float(times[0])]}
    for what, seconds in zip(said, times[1:], strict=True):
        parts.setdefault(what.partition(":")[0], []).append(1e3 * float(seconds))
    yield Said(parts=parts)


def drawing_low(bundle: str, request: dict[str, Any], cache: str | None) -> Iterator[Said]:
    """The only turn draws one picture with one component in memory at a time; peaks are in bytes."""
    pipe = EdgePipeline.from_pretrained(bundle, low_memory=True, cache=cache)
    if cache is not None:
        for name in pipe.components.graphs:
            with pipe.components.use(name):  # fills the cache
                pass
    yield Said()
    start = perf_counter()
    result = pipe(prompt=PROMPT, seed=SEED, **request)
    ms = 1e3 * (perf_counter() - start)
    if result.pixels is None or result.peak_bytes is None or not np.isfinite(result.pixels).all():
        yield Said(says="no picture, or one with numbers that are not finite", wrong=True)
        return
    size = list(map(float, result.images.shape[1:3]))
    yield Said(parts={"picture": [ms], "size": size} | {name: [peak] for name, peak in result.peak_bytes.items()})


def activations(bundle: str, request: dict[str, Any]) -> Iterator[Said]:
    """The only turn: bytes that a loop takes beyond what is resident with the UNet and the text encoders open."""
    pipe = EdgePipeline.from_pretrained(bundle)
    pipe(prompt=PROMPT, seed=SEED, **request | {"num_inference_steps": 1, "clock": 1}, output_type="latent")
    del pipe
    pipe = EdgePipeline.from_pretrained(bundle)
    for name in pipe.components.graphs:
        if name.startswith("text_encoder"):
            pipe.components.session(name)
    yield Said()
    usage = Usage(measures_memory=True)
    with usage.stage("opened"):
        pass
    with usage.stage("run"):
        pipe(prompt=PROMPT, seed=SEED, **request, output_type="latent")
    yield Said(parts={name: [float(peak)] for name, peak in usage.peak_bytes.items()})


def opening(bundle: str, cache: str | None) -> Iterator[Said]:
    """A turn opens every component that a prompt needs, and lets go of them."""
    if cache is not None:
        EdgePipeline.from_pretrained(bundle, cache=cache)
    yield Said()
    while True:
        start = perf_counter()
        pipe = EdgePipeline.from_pretrained(bundle, cache=cache)
        for name in set(pipe.components.graphs) - {"vae_encoder"}:
            pipe.components.session(name)
        ms = 1e3 * (perf_counter() - start)
        del pipe
        yield Said(parts={"opening": [ms]})


def time_runtime(bundle: str, request: dict[str, Any], want: str) -> Iterator[Said]:
    """A turn is a picture at clock 2; the opening is timed apart, as is the first picture, at clock 1."""
    start = perf_counter()
    pipe = EdgePipeline.from_pretrained(bundle)
    for name in pipe.components.graphs:
        if name != "vae_encoder":
            pipe.components.session(name)
    opened = 1e3 * (perf_counter() - start)
    first = pipe(prompt=PROMPT, seed=SEED, clock=1, **request)
    assert first.pixels is not None
    np.save(want, np.clip(first.pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))
    pipe(prompt=PROMPT, seed=SEED, clock=2, **request)
    yield Said(parts={"opening": [opened]})
    while True:
        start = perf_counter()
        result = pipe(prompt=PROMPT, seed=SEED, clock=2, **request)
        parts = {"picture": [1e3 * (perf_counter() - start)], "full": [], "cached": []}
        for step in result.ledger:
            parts["full" if step.full else "cached"].append(sum(step.ms.values()))
        yield Said(parts=parts | {name: [ms] for name, ms in result.stages.items()})


def time_diffusers(model: str, request: dict[str, Any], want: str) -> Iterator[Said]:
    """A turn is a picture by diffusers' own pipeline, whose first must be the runtime's at clock 1."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from edgediff.bundle.psnr import psnr_db
    from edgediff_runtime.loop import initial_latents

    start = perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    opened = 1e3 * (perf_counter() - start)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    latents = torch.from_numpy(initial_latents(SEED, 1, (pipe.unet.config.in_channels, side, side), 1.0))

    def draw() -> np.ndarray:
        drawn: np.ndarray = pipe(prompt=PROMPT, negative_prompt="", latents=latents, output_type="np", **request).images
        return drawn

    near = psnr_db(draw(), np.load(want))
    if near < SAME_DB:
        yield Said(says=f"clock 1 is {near:.1f} dB of diffusers' picture; expected {SAME_DB:g} dB", wrong=True)
        return
    yield Said(psnr_db=near, parts={"opening": [opened]})
    while True:
        start = perf_counter()
        draw()
        yield Said(parts={"picture": [1e3 * (perf_counter() - start)]})


def time_steps(bundle: str, request: dict[str, Any]) -> Iterator[Said]:
    """A turn is the loop alone, at clock 2, of the size that the model is usually asked for."""
    pipe = EdgePipeline.from_pretrained(bundle)
    pipe(prompt=PROMPT, seed=SEED, clock=2, **request, output_type="latent")
    yield Said()
    while True:
        result = pipe(prompt=PROMPT, seed=SEED, clock=2, **request, output_type="latent")
        parts: dict[str, list[float]] = {"full": [], "cached": []}
        for step in result.ledger:
            parts["full" if step.full else "cached"].append(sum(step.ms.values()))
        yield Said(parts=parts | {"loop": [sum(parts["full"]) + sum(parts["cached"])]})


# What is printed


def show_export(kind: str, model: Path, bundle: Path, weights: str | None) -> None:
    """Time and peak memory of the export."""
    given = {"dtype": DTYPE[kind], "weights": weights, "request": REQUEST[kind]}
    call = Call.of(exporting, model=str(model), bundle=str(bundle), **given)
    runner = in_turns({"export": call}, 1)["export"]
    whole = 4 * open_bundle(bundle).manifest.cost["full"].parameters
    seconds, peak = 1e-3 * runner.parts["export"][0], 2**20 * (runner.heard[-1].peak_mib or 0.0)
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    stored = "" if weights is None else f" with weights in {weights}"
    print(f"{kind}, everything to ONNX in {DTYPE[kind]}{stored}: {seconds:.0f} s; peak {peak / 1e9:.2f} GB, "
          f"{peak / whole:.2f} times the UNet's {whole / 1e9:.2f} GB in fp32; "
          f"bundle {size / 1e9:.2f} GB")  # fmt: skip
    if kind == "sd15":
        print(f"  time {verdict(seconds <= 60 * MINUTES)}, memory {verdict(peak <= WEIGHTS * whole)}")
    for name, ms in runner.parts.items():
        print(f"  {1e-3 * sum(ms):7.1f} s  {name}", flush=True)


def show_memory(kind: str, bundle: Path) -> None:
    """The runtime's peak with one component at a time, against the largest one's files and activations."""
    request = REQUEST[kind]
    found = open_bundle(bundle)
    entry = found.manifest.target("onnx").unet
    files = sum(found.manifest.files[name].size for name in {name for graph in entry.graphs for name in graph.files})
    taken = None
    if kind == "sd15":
        call = Call.of(activations, bundle=str(bundle), request=request)
        parts = in_turns({"activations": call}, 1)["activations"].parts
        taken = parts["run"][0] - parts["opened"][0]
        print(f"activations {taken / 1e9:.2f} GB ({parts['opened'][0] / 1e9:.2f} GB resident before)")
    with tempfile.TemporaryDirectory(dir=bundle.parent) as cache:
        for words, place in (("low_memory", None), ("low_memory and a cache", cache)):
            call = Call.of(drawing_low, bundle=str(bundle), request=request, cache=place)
            low = in_turns({"low": call}, 1)["low"].parts
            peaks = {name: values[0] for name, values in low.items() if name not in ("picture", "size")}
            height, width = low["size"]
            print(f"{kind}, {words}: a picture of {width:.0f} x {height:.0f} in {1e-3 * low['picture'][0]:.1f} s; peak "
                  + ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items())
                  + f"; the UNet's files {files / 1e9:.2f} GB", flush=True)  # fmt: skip
            if taken is not None:
                share = max(peaks.values()) / (files + taken)
                print(f"  {share:.2f} of files and activations {verdict(share <= LOW_MEMORY)}", flush=True)


def show_opening(bundle: Path, rounds: int) -> None:
    """Text encoder, UNet and decoder opened, with and without a cache of optimized graphs."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as cache:
        runners = in_turns(
            {
                "plain": Call.of(opening, bundle=str(bundle), cache=None),
                "cache": Call.of(opening, bundle=str(bundle), cache=cache),
            },
            rounds + 1,
        )
        size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    # The first turn with the cache fills what is left of it.
    plain, kept = (runners[name].parts["opening"][1:] for name in ("plain", "cache"))
    print(f"sd15, opened {rounds} times in turns, ms: {spread(plain)}; with a cache of {size / 1e9:.2f} GB "
          f"{spread(kept)} {verdict(median(kept) <= 1e3 * OPENING)}", flush=True)  # fmt: skip


def show_time(model: Path, bundle: Path, rounds: int) -> None:
    """One picture against diffusers' whole pipeline, in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        given = {"request": REQUEST["sd15"], "want": str(Path(scratch) / "want.npy")}
        found = in_turns(
            {
                "edgediff": Call.of(time_runtime, bundle=str(bundle), **given),
                "diffusers": Call.of(time_diffusers, model=str(model), **given),
            },
            rounds,
        )
    ours, theirs = found["edgediff"].parts, found["diffusers"].parts
    times = ratios(theirs["picture"], ours["picture"])
    print(f"sd15, one picture, {rounds} rounds in turns, ms: diffusers {spread(theirs['picture'])}, clock 2 "
          f"{spread(ours['picture'])}: {spread(times)} times as fast {verdict(median(times) >= SPEED)}; clock 1 is "
          f"{found['diffusers'].psnr_db or 0.0:.1f} dB of diffusers' picture")  # fmt: skip
    for name, ms in ours.items():
        print(f"  {name}: {spread(ms)}")
    print(f"  diffusers' loading: {spread(theirs['opening'])}")


def show_sizes(model: Path, bundle: Path, free: Path, rounds: int) -> None:
    """What graphs of any size cost in time, at the usual size, against graphs of that size alone, in turns."""
    if not free.exists():
        request = REQUEST["sd15"]
        exported(
            str(model), free, clock=2, steps=request["num_inference_steps"], scheduler=SCHEDULER,
            guidance_scale=request["guidance_scale"], components=("text_encoder",), sizes=("any",),
        )  # fmt: skip
    given = {"one size": bundle, "any size": free}
    found = in_turns(
        {name: Call.of(time_steps, bundle=str(each), request=REQUEST["sd15"]) for name, each in given.items()}, rounds
    )
    for part in ("full", "cached", "loop"):
        times = {name: runner.parts[part] for name, runner in found.items()}
        said = ", ".join(f"{name} {spread(ms)}" for name, ms in times.items())
        print(f"sd15, {part}, ms: {said}: {spread(ratios(times['any size'], times['one size']))} times as long")


if __name__ == "__main__":
    main()
