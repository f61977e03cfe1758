"""What would a user take instead? One image with guidance, the same weights and seed, in one run and in turns.

diffusers alone and with DeepCache at the matching branch; a bundle in ONNX Runtime at clock 2 and clock 1, in int8
there, and in int8, attention over many keys too, in OpenVINO; of a text-conditioned model optimum-onnx's pipeline too,
in an environment of its own (optimum-requirements.txt). ``make bench`` brings all of them.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from measure import exported, in_turns, machine, ratios, spread

import edgediff
from edgediff.bench.contenders import time_bundle
from edgediff.bench.turns import Call, Runner, Said
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, reference_request
from edgediff.models.load import Model, random_weights
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline
from edgediff_runtime.loop import initial_latents

STEPS, GUIDANCE, SEED = 8, 2.0, 0
# DeepCache's branch 2 runs the layers of the highest resolution, as the default cut does; it leaves the resampling out.
INTERVAL, BRANCH = 2, 2
# Clock 1 of a bundle is diffusers' loop, but for the order of additions.
SAME_DB = 70.0


def main() -> None:
    """Exports the bundles, and prints each loop beside clock 2's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="grocery-32")
    parser.add_argument("--random-weights", type=int, help="seed, for a geometry without weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fp32", action="store_true", help="leave int8 out")
    parser.add_argument("--optimum", type=Path, help="an interpreter with optimum-requirements.txt")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        int8 = OnnxConfig(quantize_nbits=8, calibration_images=1)
        recipes = {"onnxruntime": OnnxConfig()}
        if not given.fp32:
            recipes["int8, onnxruntime"] = int8
            recipes["int8, openvino"] = msgspec.structs.replace(int8, quantize_attention=True)
        bundles = {
            name: exported(given.model, folder / name, random_weights=given.random_weights, onnx=onnx)
            for name, onnx in recipes.items()
        }
        request = made_request(bundles["onnxruntime"])
        want = str(folder / "want.npy")
        np.save(want, EdgePipeline.from_pretrained(bundles["onnxruntime"])(**request, clock=1).latents)
        asked = {"num_inference_steps": STEPS, "clock": "2", "guidance_scale": GUIDANCE}
        contenders: dict[str, Call | Runner] = {
            "diffusers": Call.of(time_diffusers, model=given.model, seed=given.random_weights,
                                 bundle=bundles["onnxruntime"], want=want)
        }  # fmt: skip
        if given.optimum is not None:
            contenders["optimum-onnx"] = optimum(given, request, folder / "optimum", want)
        for name, bundle in bundles.items():
            contenders[name] = Call.of(time_bundle, bundle=bundle, backend=name.split()[-1], **asked)
        found = in_turns(contenders, given.rounds)
    base = found["onnxruntime"].parts["loop"]
    print(
        f"{STEPS} steps, {given.rounds} rounds in turns: milliseconds of the loop, median [p10, p90]; times clock 2's"
    )
    for name, runner in found.items():
        for part, ms in runner.parts.items():
            words = {"loop": name, "loop_clock1": f"{name}, clock 1", "deepcache": f"{name} + DeepCache"}.get(part)
            if words is not None:
                near = "" if part == "deepcache" else f"{runner.psnr_db or 0.0:.1f} dB"
                print(f"  {words:28} {spread(ms):30} {spread(ratios(ms, base)):24} {near}")


def made_request(bundle: str) -> dict[str, Any]:
    """What is generated: a bundle's own embeddings or label."""
    pipe = EdgePipeline.from_pretrained(bundle)
    request = reference_request(pipe.manifest, load_reference(Path(bundle) / REFERENCE).conditioning)
    del request["clock"]
    return request | {"num_images": 1, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}


def weights_of(model: str, seed: int | None) -> Model:
    """The model that the bundles are made of."""
    loaded = edgediff.load_model(model)
    return loaded if seed is None else random_weights(loaded, seed)


def sampler_of(model: Model) -> Any:
    """The bundle's sampler as diffusers has it."""
    assert model.scheduler is not None
    return DPMSolverMultistepScheduler.from_config(model.scheduler.config)


@torch.no_grad()
def time_diffusers(model: str, seed: int | None, bundle: str, want: str) -> Iterator[Said]:
    """A turn is diffusers' own loop, and the same with DeepCache's helper around the UNet where that is installed."""
    loaded = weights_of(model, seed)
    request = made_request(bundle)
    near = psnr_db(np.load(want), run_diffusers(loaded, request)[1])
    if near < SAME_DB:
        yield Said(says=f"clock 1 is {near:.1f} dB of diffusers' loop; expected {SAME_DB:g} dB", wrong=True)
    deepcache = find_spec("DeepCache") is not None
    yield Said(psnr_db=near)
    while True:
        parts = {"loop": [run_diffusers(loaded, request)[0]]}
        if deepcache:
            parts["deepcache"] = [with_deepcache(loaded, request)]
        yield Said(parts=parts)


def run_diffusers(
    model: Model, request: dict[str, Any], scheduler: Any = None, before: Callable[[], None] = lambda: None
) -> tuple[float, np.ndarray]:
    """Milliseconds of diffusers' loop over its own UNet, and the latents."""
    scheduler = sampler_of(model) if scheduler is None else scheduler
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(initial_latents(SEED, 1, model.sample_shape, float(scheduler.init_noise_sigma)))
    if model.conditioning.kind == "text":
        embeds = [torch.from_numpy(np.asarray(request[f"{sign}prompt_embeds"])) for sign in ("negative_", "")]
        cond = {"encoder_hidden_states": torch.cat(embeds)}
    else:
        cond = {"class_labels": torch.tensor([model.conditioning.null_label, 0])}
    before()
    start = perf_counter()
    for t in scheduler.timesteps:
        u, c = model.unet(torch.cat([x, x]), t, **cond, return_dict=False)[0].chunk(2)
        x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
    return 1e3 * (perf_counter() - start), x.numpy()


def with_deepcache(model: Model, request: dict[str, Any]) -> float:
    """Milliseconds of the same loop with DeepCache."""
    from DeepCache import DeepCacheSDHelper

    scheduler = sampler_of(model)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model.unet, scheduler=scheduler))
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=BRANCH)
    try:
        return run_diffusers(model, request, scheduler, helper.enable)[0]
    finally:
        helper.disable()


def optimum(given: argparse.Namespace, request: dict[str, Any], folder: Path, want: str) -> Runner:
    """Hands the model over to optimum_worker.py, which speaks the engine's lines in its own environment."""
    model = weights_of(given.model, given.random_weights)
    if model.conditioning.kind != "text":
        raise SystemExit(f"optimum-onnx has a pipeline for text-conditioned models; {given.model} is not one")
    folder.mkdir()
    model.unet.save_pretrained(folder / "unet")
    sampler_of(model).save_pretrained(folder / "scheduler")
    embeds = {name: request[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
    np.savez(folder / "given.npz", **embeds, latents=initial_latents(SEED, 1, model.sample_shape, 1.0))
    call = Call("", {"folder": str(folder), "steps": STEPS, "guidance": GUIDANCE, "want": want, "same_db": SAME_DB})
    worker = Path(__file__).with_name("optimum_worker.py")
    return Runner("optimum-onnx", call, command=(str(given.optimum), str(worker)))


if __name__ == "__main__":
    main()
