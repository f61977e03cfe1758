import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunked import Chunked
from diffusers import DPMSolverMultistepScheduler

import edgediff
from edgediff.models.graphs import graph_list
from edgediff.models.torch_session import TorchSession
from edgediff_runtime import BundleError, EdgePipeline, RequestError, noise, open_bundle
from edgediff_runtime.loop import Request, denoise
from edgediff_runtime.manifest import Graph

# Rows in another grouping go through other kernels: what is left is the order of additions.
REGROUPED = 1e-4


@pytest.fixture(scope="module")
def torch_pipe(class_model: Path, class_bundle: Path) -> EdgePipeline:
    model = edgediff.load_model(class_model)
    split = edgediff.split(model.unet)
    return EdgePipeline(open_bundle(class_bundle).manifest, TorchSession(split.parts, graph_list(split, model)))


@pytest.fixture(scope="module")
def ort_pipe(class_bundle: Path) -> EdgePipeline:
    return EdgePipeline.from_pretrained(class_bundle)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
def test_clock_1_is_what_diffusers_samples(class_model: Path, torch_pipe: EdgePipeline) -> None:
    model = edgediff.load_model(class_model)
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(6)
    x = torch.from_numpy(np.stack([noise(3, (3, 16, 16), image=i) for i in range(2)]))
    labels = torch.tensor([4, 4, 0, 1])
    for t in scheduler.timesteps:
        u, c = model.unet(torch.cat([x, x]), t, labels).sample.chunk(2)
        x = scheduler.step(u + 2.5 * (c - u), t, x).prev_sample
    got = torch_pipe(num_images=2, num_inference_steps=6, clock=1, guidance_scale=2.5, seed=3).latents
    assert np.abs(got - x.numpy()).max() < 1e-4 * np.abs(x.numpy()).max()


@torch.no_grad()
def test_cached_steps_take_the_cache_of_the_step_before(torch_pipe: EdgePipeline, class_model: Path) -> None:
    split = edgediff.split(edgediff.load_model(class_model).unet)
    labels, cache = torch.tensor([0, 1]), None
    for step in torch_pipe.stream(num_images=2, num_inference_steps=5, clock="1,0,0,1,0", guidance_scale=1):
        sample = step.tensors[0]["sample"].clone()
        if step.full:
            out, cache = split.full(sample, step.timestep, class_labels=labels)
        else:
            out, cache = split.cached(sample, step.timestep, cache, class_labels=labels)
        assert torch.equal(out, step.tensors[0]["out_sample"])
    assert not step.full


def test_onnxruntime_agrees_with_torch(torch_pipe: EdgePipeline, ort_pipe: EdgePipeline) -> None:
    asked = {"num_images": 3, "num_inference_steps": 7, "clock": 3, "seed": 11}
    want, got = torch_pipe(**asked), ort_pipe(**asked)
    assert want.mask == got.mask == (1, 0, 0, 1, 0, 0, 1)
    assert np.abs(want.latents - got.latents).max() < REGROUPED


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0, [3.0, 3.0, 1.0, 1.0, 3.0, 1.0]])
def test_fixed_batches_do_what_a_symbolic_one_does(
    torch_pipe: EdgePipeline, batch: int, guidance: float | list[float]
) -> None:
    chunked = EdgePipeline(torch_pipe.manifest, Chunked(torch_pipe.session, batch))
    asked = {"num_images": 3, "num_inference_steps": 6, "clock": 2, "guidance_scale": guidance}
    want, got = torch_pipe(**asked), chunked(**asked)
    assert want.mask == got.mask
    assert np.abs(want.latents - got.latents).max() < REGROUPED


@torch.no_grad()
def test_guidance_switched_off_keeps_the_conditional_half_of_the_cache(torch_pipe: EdgePipeline) -> None:
    stream = torch_pipe.stream(num_images=2, num_inference_steps=4, clock=4, guidance_scale=[3, 3, 1, 1])
    steps = [(step, {n: t.clone() for n, t in step.tensors[0].items()}) for step in stream]
    assert [step.full for step, _ in steps] == [True, False, False, False]
    assert [step.guided for step, _ in steps] == [True, True, False, False]
    assert torch.equal(steps[2][1]["lowres_feature"], steps[1][1]["lowres_feature"][2:])
    assert steps[2][1]["class_labels"].tolist() == [0, 1]


def test_guidance_switched_on_makes_that_step_full(torch_pipe: EdgePipeline) -> None:
    result = torch_pipe(num_inference_steps=5, clock=5, guidance_scale=[1, 1, 2, 2, 2])
    assert result.mask == (1, 0, 1, 0, 0)


def test_the_ledger_names_what_ran(ort_pipe: EdgePipeline) -> None:
    full, cached = ort_pipe(num_inference_steps=2, clock=2).ledger
    assert set(full.ms) == {"highres_in", "lowres", "highres_out", "guidance", "scheduler", "other"}
    assert set(cached.ms) == {"highres_in", "adaptor", "highres_out", "guidance", "scheduler", "other"}
    assert all(ms >= 0 for step in (full, cached) for ms in step.ms.values())
    (alone,) = ort_pipe(num_inference_steps=1, guidance_scale=1.0).ledger
    assert set(alone.ms) == {"highres_in", "lowres", "highres_out", "scheduler", "other"}


def test_same_seed_same_bits_other_seed_other_images(ort_pipe: EdgePipeline) -> None:
    first, again, other = (ort_pipe(num_images=2, seed=seed).images for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (2, 16, 16, 3)
    assert first.dtype == np.uint8


def test_three_threads_on_one_pipeline_are_each_as_alone(ort_pipe: EdgePipeline) -> None:
    asked = [{"num_images": n, "num_inference_steps": 9, "clock": 4, "seed": n} for n in (1, 2, 3)]
    alone = [ort_pipe(**request).images for request in asked]
    together: list[Any] = [None] * 3
    start = threading.Barrier(3)

    def work(k: int) -> None:
        start.wait()
        together[k] = ort_pipe(**asked[k]).images

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_two_interleaved_generations_never_meet(ort_pipe: EdgePipeline) -> None:
    asked = [
        {"num_inference_steps": 6, "clock": 3, "seed": seed, "label": label}
        for seed, label in ((1, "Kiwi"), (2, "Apple"))
    ]
    alone = [ort_pipe(**request).latents for request in asked]
    *_, last = zip(*(ort_pipe.stream(**request) for request in asked), strict=True)
    assert all(np.array_equal(step.latents, want) for step, want in zip(last, alone, strict=True))


def test_cancelled_at_any_step_leaves_nothing_behind(ort_pipe: EdgePipeline) -> None:
    want = ort_pipe(seed=9).latents
    for stop in range(4):
        stream = ort_pipe.stream(seed=4)
        for step in stream:
            if step.index == stop:
                stream.close()
        assert step.index == stop
        assert np.array_equal(ort_pipe(seed=9).latents, want)


def test_steps_keep_their_own_latents(ort_pipe: EdgePipeline) -> None:
    kept = [(step.latents, step.latents.copy()) for step in ort_pipe.stream(seed=1)]
    assert all(np.array_equal(now, then) for now, then in kept)


def test_an_image_begins_from_the_same_noise_whatever_their_number(ort_pipe: EdgePipeline) -> None:
    one = ort_pipe(num_images=1, label="Kiwi", seed=8).latents[0]
    many = ort_pipe(num_images=3, label="Kiwi", seed=8).latents[0]
    assert np.abs(one - many).max() < REGROUPED


def test_labels_by_index(torch_pipe: EdgePipeline) -> None:
    step = next(torch_pipe.stream(label=[2, "Apple"], guidance_scale=1))
    assert step.tensors[0]["class_labels"].tolist() == [2, 0]
    with pytest.raises(RequestError, match="no label 4; choices: Apple"):
        torch_pipe(label=4)


# What numpy and torch give in the place of Python's numbers, and what it means.
MEANT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"label": np.int64(3)}, {"label": 3}),
    ({"label": np.array(3)}, {"label": 3}),
    ({"label": np.arange(4)}, {"label": [0, 1, 2, 3]}),
    ({"label": range(2)}, {"label": [0, 1]}),
    ({"label": [np.int64(1), np.str_("Kiwi"), torch.tensor(0)]}, {"label": [1, 2, 0]}),
    ({"label": torch.tensor([2, 1])}, {"label": [2, 1]}),
    ({"label": np.array(["Kiwi", "Apple"])}, {"label": ["Kiwi", "Apple"]}),
    ({"num_images": np.int64(2)}, {"num_images": 2}),
    ({"num_inference_steps": np.uint8(2), "clock": np.int64(2)}, {"num_inference_steps": 2, "clock": 2}),
    ({"clock": np.array([1, 0, 0, 1])}, {"clock": [1, 0, 0, 1]}),
    ({"clock": (np.bool_(True), False, np.int8(0), 1)}, {"clock": "1,0,0,1"}),
    ({"seed": np.uint64(7)}, {"seed": 7}),
    ({"seed": torch.tensor(7)}, {"seed": 7}),
    ({"guidance_scale": np.float32(3)}, {"guidance_scale": 3.0}),
    ({"guidance_scale": torch.tensor(3.0, dtype=torch.bfloat16, requires_grad=True)}, {"guidance_scale": 3}),
    ({"guidance_scale": np.array([3, 3, 1, 1])}, {"guidance_scale": [3.0, 3.0, 1.0, 1.0]}),
    ({"guidance_scale": 0}, {"guidance_scale": 1.0}),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=[str(given) for given, _ in MEANT])
def test_numbers_of_numpy_and_torch_are_numbers(
    ort_pipe: EdgePipeline, given: dict[str, Any], meant: dict[str, Any]
) -> None:
    got, want = ort_pipe(**given), ort_pipe(**meant)
    assert got.mask == want.mask
    assert np.array_equal(got.latents, want.latents)


@pytest.mark.parametrize(
    "given",
    [
        *({"label": bad} for bad in (2.0, np.array(2.5), (n for n in "12"), True, [True], np.array([1.0]), b"ab",
                                     {1: 2}, {1, 2}, [[0, 1], [2]], -1, object())),
        *({"num_images": bad} for bad in (2.0, True, "2", np.float32(2), [2], np.array([2]))),
        *({"num_inference_steps": bad} for bad in (2.0, True, "2", [2], np.array([2]))),
        *({"clock": bad} for bad in (2.0, True, np.array(2.5), [0.5, 1, 1, 1], {2}, np.ones((2, 2)))),
        *({"seed": bad} for bad in (2.0, True, "2", -1, [1], None)),
        *({"guidance_scale": bad} for bad in (-1, True, "2", np.nan, [[1], [2]], [1, 2], {2.0}, np.inf, [None] * 4,
                                              10**400)),
    ],
    ids=lambda given: re.sub(" at 0x[0-9a-f]+", "", str(given)),
)  # fmt: skip
def test_what_is_no_such_number_is_refused_in_one_line(ort_pipe: EdgePipeline, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        ort_pipe(**given)
    assert "\n" not in str(caught.value)


def test_the_ledger_keeps_no_tensors_and_steps_cannot_be_written(ort_pipe: EdgePipeline) -> None:
    assert all(step.tensors == () and step.latents.size == 0 for step in ort_pipe().ledger)
    for step in ort_pipe.stream():
        with pytest.raises(ValueError, match="read-only"):
            step.latents[0] = 0


def test_labels_default_to_one_after_the_other(torch_pipe: EdgePipeline) -> None:
    step = next(torch_pipe.stream(num_images=6, guidance_scale=1))
    assert step.tensors[0]["class_labels"].tolist() == [0, 1, 2, 3, 0, 1]
    step = next(torch_pipe.stream(label=["Kiwi", "Apple"], guidance_scale=2))
    assert step.tensors[0]["class_labels"].tolist() == [4, 4, 2, 0]


def test_text_rows_are_repeated_and_checked(text_bundle: Path) -> None:
    pipe = EdgePipeline.from_pretrained(text_bundle)
    prompt, negative = noise(0, (1, 7, 12)), noise(1, (1, 7, 12))
    asked: dict[str, Any] = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    one = pipe(**asked).latents
    three = pipe(**asked, num_images=3).latents
    assert one.shape == (1, 4, 16, 16)
    assert np.abs(three[:1] - one).max() < REGROUPED * np.abs(one).max()
    many = pipe(prompt_embeds=np.repeat(prompt, 2, axis=0), negative_prompt_embeds=negative).latents
    assert many.shape[0] == 2
    with pytest.raises(RequestError, match=r"shape \[1, 7, 11\]; expected \[batch, tokens, 12\]"):
        pipe(prompt_embeds=prompt[:, :, :11], negative_prompt_embeds=negative)
    with pytest.raises(RequestError, match="needs negative prompt_embeds"):
        pipe(prompt_embeds=prompt)
    tensor = torch.tensor(prompt, dtype=torch.bfloat16, requires_grad=True)
    rounded = tensor.detach().float().numpy()
    got, want = (pipe(**asked | {"prompt_embeds": embeds}).latents for embeds in (tensor, rounded))
    assert np.array_equal(got, want)
    for bad in ([[[1.0, 2.0], [1.0]]], "text", object()):
        with pytest.raises(RequestError, match="encoder_hidden_states"):
            pipe(**asked | {"prompt_embeds": bad})
    with pytest.raises(RequestError, match=r"^added_cond is a list; expected arrays by name$"):
        pipe(**asked, added_cond=[1])
    with pytest.raises(RequestError, match="NaN"):
        pipe(prompt_embeds=prompt * np.nan, negative_prompt_embeds=negative)
    with pytest.raises(RequestError, match="time_ids is not an input of this model"):
        pipe(**asked, added_cond={"time_ids": np.zeros((1, 6))})
    with pytest.raises(RequestError, match=r"take result\.latents"):
        _ = pipe(**asked).images


def test_output_that_is_not_finite_is_an_error(torch_pipe: EdgePipeline) -> None:
    class Broken(TorchSession):
        def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
            super().run(graph, tensors)
            if graph.name == "highres_out":
                tensors["out_sample"] = tensors["out_sample"] * float("nan")

    request = _request(torch_pipe, torch_pipe.manifest.target("onnx").unet.graphs)
    with pytest.raises(BundleError, match="not finite at step 0"):
        next(denoise(request, Broken(torch_pipe.session.parts, torch_pipe.session.graphs)))


def _request(pipe: EdgePipeline, graphs: tuple[Graph, ...]) -> Request:
    from edgediff_runtime import make_scheduler

    return Request(
        graphs=graphs,
        scheduler=make_scheduler(pipe.manifest.scheduler, 2),
        clock=(True, False),
        guidance=(1.0, 1.0),
        latents=noise(0, (1, 3, 16, 16)),
        cond={"class_labels": np.zeros(1, dtype=np.int64)},
    )
