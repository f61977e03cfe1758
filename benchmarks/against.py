"""What would a user take instead? One image with guidance, the same weights and seed, in one run and in turns.

diffusers alone, diffusers with DeepCache at the matching branch, a bundle of ours in ONNX Runtime at clock 1 and at
clock 2, and in eight bits in ONNX Runtime and, attention over many keys too, in OpenVINO; of a text-conditioned model
optimum-onnx's pipeline too, in an environment of its own. ``make bench`` brings all of them.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from measure import machine, spread
from optimum_onnx import OptimumOnnx

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, reference_request
from edgediff.config.floors import VerifyConfig
from edgediff.models.load import Model, random_weights
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.loop import initial_latents

STEPS, GUIDANCE, SEED = 8, 2.0, 0
# DeepCache's branch 2 runs the layers of the highest resolution, as the default cut does; it leaves the resampling out.
INTERVAL, BRANCH = 2, 2
# Clock 1 of a bundle is diffusers' loop, but for the order of additions; of eight bits, but for their rounding.
SAME_DB, QUANTIZED_DB = 70.0, 35.0

Way = Callable[[], tuple[float, np.ndarray]]


def main() -> None:
    """Exports the model, holds the bundle to diffusers' loop, and times everything in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="grocery-32")
    parser.add_argument("--random-weights", type=int, help="seed, for a geometry without weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fp32", action="store_true", help="leave eight bits out")
    parser.add_argument("--optimum", type=Path, help="an interpreter with optimum-requirements.txt")
    parser.add_argument("--keep", type=Path, help="where the bundles are to stay; what is there already is taken")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if given.keep is None else given.keep
        quantized = OnnxConfig(quantize_nbits=8, calibration_images=1)
        written = {"fp32": OnnxConfig()}
        if not given.fp32:
            written["int8"] = quantized
            written["int8-attention"] = msgspec.structs.replace(quantized, quantize_attention=True)
        bundles = [Path(folder) / name for name in written]
        for bundle, onnx in zip(bundles, written.values(), strict=True):
            config = edgediff.ExportConfig(
                adaptor="identity", random_weights=given.random_weights, verify=VerifyConfig(mode="graphs"), onnx=onnx
            )
            edgediff.export_bundle(edgediff.load_model(given.model), bundle, config)
        model = edgediff.load_model(given.model)
        if given.random_weights is not None:
            model = random_weights(model, given.random_weights)
        opened = open_bundle(bundles[0])
        request = reference_request(opened.manifest, load_reference(opened.file(REFERENCE)).conditioning)
        request |= {"num_images": 1, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}
        others: dict[str, Way] = {"diffusers": lambda: in_diffusers(model, request)}
        if find_spec("DeepCache") is not None:
            others["diffusers + DeepCache"] = with_deepcache(model, request)
        with ExitStack() as stack:
            if given.optimum is not None:
                if model.conditioning.kind != "text":
                    parser.error(f"optimum-onnx has a pipeline for text-conditioned models; {given.model} is none")
                optimum = OptimumOnnx(given.optimum, model, request, Path(scratch) / "optimum")
                others["optimum-onnx"] = stack.enter_context(closing(optimum))
            compare(others, request, given.rounds, *bundles)


@torch.no_grad()
def compare(others: dict[str, Way], request: dict[str, Any], rounds: int, bundle: Path, *quantized: Path) -> None:
    """Runs every way once, checks it, then times them in turns; of eight bits are a bundle for each of two backends."""
    pipe = EdgePipeline.from_pretrained(bundle)
    backends = ("onnxruntime", "openvino")[: len(quantized)]
    pipes = {
        f"int8, {name}": EdgePipeline.from_pretrained(path, backend=name)
        for name, path in zip(backends, quantized, strict=True)
    }
    ways: dict[str, Way] = {
        **others,
        "edgediff, clock 1": lambda: in_edgediff(pipe, request | {"clock": 1}),
        "edgediff, clock 2": lambda: in_edgediff(pipe, request | {"clock": 2}),
        **{name: partial(in_edgediff, each, request | {"clock": 2}) for name, each in pipes.items()},
    }
    made = {name: way()[1] for name, way in ways.items()}
    for name in {"edgediff, clock 1", "optimum-onnx"} & made.keys():
        same = psnr_db(made["diffusers"], made[name])
        assert same > SAME_DB, f"{name} is {same:.1f} dB of diffusers' loop"
    for name in pipes:
        near = psnr_db(made["edgediff, clock 2"], made[name])
        print(f"{name}: {near:.1f} dB of fp32 at clock 2")
        # Random weights do not denoise: samples grow out of every range that was measured.
        assert near > QUANTIZED_DB or open_bundle(bundle).manifest.source.random_weights is not None
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            samples[name].append(way()[0])
    ours = median(samples["edgediff, clock 2"])
    print(f"{STEPS} steps, milliseconds of the loop (median [p10, p90], {rounds} rounds in turns)")
    for name, taken in samples.items():
        nearness = f"{psnr_db(made['diffusers'], made[name]):.1f} dB of diffusers"
        print(f"  {name:22} {spread(taken):34} {median(taken) / ours:5.2f}x clock 2's   {nearness}")


def in_edgediff(pipe: EdgePipeline, request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """A generation of the bundle: milliseconds of its steps, and the latents."""
    result = pipe(**request)
    return sum(sum(step.ms.values()) for step in result.ledger), result.latents


def in_diffusers(
    model: Model, request: dict[str, Any], scheduler: Any = None, before: Callable[[], None] = lambda: None
) -> tuple[float, np.ndarray]:
    """Diffusers' own loop over its own UNet."""
    scheduler = new_scheduler(model) if scheduler is None else scheduler
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(initial_latents(SEED, 1, model.sample_shape, float(scheduler.init_noise_sigma)))
    cond = conditioning(model, request)
    before()
    start = perf_counter()
    for t in scheduler.timesteps:
        out = model.unet(torch.cat([x, x]), t, **cond, return_dict=False)[0]
        u, c = out.chunk(2)
        x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
    return 1e3 * (perf_counter() - start), x.numpy()


def with_deepcache(model: Model, request: dict[str, Any]) -> Way:
    """The same with DeepCache's helper around the UNet while it runs."""
    from DeepCache import DeepCacheSDHelper

    def run() -> tuple[float, np.ndarray]:
        scheduler = new_scheduler(model)
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model.unet, scheduler=scheduler))
        helper.set_params(cache_interval=INTERVAL, cache_branch_id=BRANCH)
        try:
            return in_diffusers(model, request, scheduler, helper.enable)
        finally:
            helper.disable()

    return run


def new_scheduler(model: Model) -> Any:
    """The bundle's sampler as diffusers has it."""
    assert model.scheduler is not None
    return DPMSolverMultistepScheduler.from_config(model.scheduler.config)


def conditioning(model: Model, request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An unconditional and a conditional row, as the pipeline makes them."""
    if model.conditioning.kind == "text":
        names = ("negative_prompt_embeds", "prompt_embeds")
        return {"encoder_hidden_states": torch.cat([torch.from_numpy(np.asarray(request[name])) for name in names])}
    return {"class_labels": torch.tensor([model.conditioning.null_label, 0])}


if __name__ == "__main__":
    main()
