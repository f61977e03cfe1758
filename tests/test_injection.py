"""Plug-and-play: an inverted picture is drawn along, and others take its self-attention and features."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from command_line import Command, assert_error
from edits import BACKENDS, LORA_AND_INJECTION, PROMPT, SIDE, ours, picture, theirs
from PIL import Image
from pipelines import config_of, exported_pipeline, saved

import edgediff
from edgediff.bundle.feed import groups
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.export.export_bundle import export_bundle
from edgediff.targets.onnx import in_half
from edgediff_runtime import EdgePipeline, RequestError, noise
from edgediff_runtime.inversion import Inverted, read_inverted, write_inverted
from edgediff_runtime.loop import Step
from edgediff_runtime.manifest import Graph, Tensor

STEPS = 4
OTHER = "a drawing of a dog"
ASKED: dict[str, Any] = {"prompt": OTHER, "guidance_scale": 5.0}
FLOOR_DB = 60.0

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def inverted(pipe: EdgePipeline, *pictures: Image.Image) -> Inverted:
    return pipe.invert(list(pictures) or picture(), prompt=PROMPT, num_inference_steps=STEPS)


class Authors:
    """Injection as the authors do it in a diffusers UNet: rows [source, uncond, cond], the first one's for all."""

    def __init__(self, unet: Any) -> None:
        self.features = self.attention = False
        second, *others = unet.up_blocks[1:]
        second.resnets[1].conv2.register_forward_hook(self._features)
        for attention in (
            second.attentions[1],
            *(each for block in others for each in getattr(block, "attentions", ())),
        ):
            for block in attention.transformer_blocks:
                block.attn1.to_q.register_forward_hook(self._attention)
                block.attn1.to_k.register_forward_hook(self._attention)

    def _features(self, module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor | None:
        return out[:1].expand_as(out) if self.features else None

    def _attention(self, module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor | None:
        return out[:1].expand_as(out) if self.attention else None


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("sd1-up", "torch"),
        pytest.param("sd1-up", "onnxruntime", marks=pytest.mark.long),
        pytest.param("xl", "torch", marks=pytest.mark.long),
    ],
)
def test_the_authors_pictures(name: str, backend: str) -> None:
    """A loop over diffusers' own UNet and DDIM, with hooks where the authors' code has them."""
    pipe = ours(name, "ddim", backend, injection=True)
    found = inverted(pipe)
    shares = {"inject_attention": 0.5, "inject_features": 0.75}
    made = pipe(inverted=found, clock=1, **ASKED, **shares)

    model = edgediff.load_model(saved(name))
    authors = Authors(model.unet)
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if name == "xl" else diffusers.StableDiffusionPipeline
    scheduler = theirs(name, "ddim", kind).scheduler
    scheduler.set_timesteps(STEPS)
    step = next(iter(pipe.stream(inverted=found, clock=1, **ASKED)))
    cond = {key: torch.from_numpy(np.array(step.tensors[0][key])) for key in pipe_inputs(pipe)}
    source = torch.from_numpy(found.trajectory)
    x = source[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            authors.attention, authors.features = i < 2, i < 3
            added = {key: cond[key] for key in ("text_embeds", "time_ids") if key in cond}
            out = model.unet(
                torch.cat([source[i], x, x]), t, cond["encoder_hidden_states"], added_cond_kwargs=added or None
            ).sample
            _, u, c = out.chunk(3)
            x = scheduler.step(u + 5.0 * (c - u), t, x).prev_sample
    assert psnr_db(x.numpy(), made.latents) >= FLOOR_DB
    plain = pipe(latents=found.latents, scheduler="ddim", num_inference_steps=STEPS, clock=1, **ASKED)
    assert psnr_db(plain.latents, made.latents) < 40
    assert [step.rows for step in made.ledger] == [3, 3, 3, 2]


def pipe_inputs(pipe: EdgePipeline) -> list[str]:
    return [t.name for t in pipe.manifest.conditioning.tensors if not t.name.endswith("_rows")]


@BACKENDS
def test_without_an_inverted_picture_nothing_changes(backend: str) -> None:
    pipe = ours("sd1-up", "dpmpp_2m", backend, injection=True)
    plain = ours("sd1-up", "dpmpp_2m", backend)
    # In torch the plain one is undivided: every step is full.
    for clock in (1,) if backend == "torch" else (1, 2):
        a, b = (each(**ASKED, clock=clock, num_inference_steps=STEPS, seed=3) for each in (pipe, plain))
        assert a.mask == b.mask
        # Core ML's graphs have three rows of which one is filled up, and round in fp16 all the same.
        assert psnr_db(a.latents, b.latents) >= (100 if backend != "mil-reference" else 35)


def test_under_the_clock_rows_stay_where_the_source_ends() -> None:
    """The source leaves on a cached step: the others go on with their own cache, of each image its own."""
    pipe = ours("sd1-up", "ddim", "torch", injection=True)
    found = inverted(pipe, picture(), picture(3))
    asked: dict[str, Any] = {"prompt": [OTHER, PROMPT], "guidance_scale": 5.0, "clock": 2}
    shares = {"inject_attention": 0.25, "inject_features": 0.25}
    both = pipe(inverted=found, **asked, **shares)
    assert both.mask == (1, 0, 1, 0)
    assert [step.rows for step in both.ledger] == [3, 2, 2, 2]
    for i in range(2):
        one = Inverted(
            found.latents[i : i + 1], (), {}, found.trajectory[:, i : i + 1], found.timesteps,
            {name: rows[i : i + 1] for name, rows in found.cond.items()},
        )  # fmt: skip
        alone = pipe(inverted=one, **asked | {"prompt": asked["prompt"][i]}, **shares)
        np.testing.assert_allclose(alone.latents[0], both.latents[i], rtol=0, atol=1e-4)


def test_a_step_takes_what_a_divided_unet_takes() -> None:
    model = edgediff.load_model(saved("sd1-up"))
    divided = edgediff.split(model.unet, injects=True)
    torch.manual_seed(0)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([501.0])
    text = torch.randn(3, 77, model.unet.config.cross_attention_dim)
    own, first = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        want = model.unet(x, t, text, return_dict=False)[0]
        made = {
            (a, f): divided.full(
                x, t, encoder_hidden_states=text, attention_rows=first if a else own, feature_rows=first if f else own
            )[0]
            for a in (False, True)
            for f in (False, True)
        }
    assert torch.equal(made[False, False], want)
    for each in made.values():
        assert torch.equal(each[0], want[0])
    assert len({tuple(each[1:].flatten().tolist()) for each in made.values()}) == 4


def test_rows_and_low_rank_factors_go_together() -> None:
    """Graphs may take both; with zeros and each row its own the step is the undivided one, bit for bit."""
    model = edgediff.load_model(saved("sd1-up"))
    divided = edgediff.split(model.unet, injects=True, lora_rank=2)
    torch.manual_seed(0)
    x, t = torch.randn(3, 4, 16, 16), torch.tensor([501.0])
    text = torch.randn(3, 77, model.unet.config.cross_attention_dim)
    shapes = {name: shape for each in divided.factors for name, shape in each.shapes.items()}
    factors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    own, first = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        want = model.unet(x, t, text, return_dict=False)[0]
        plain, _ = divided.full(
            x, t, encoder_hidden_states=text, attention_rows=own, feature_rows=own, **factors
        )  # fmt: skip
        drawn = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
        both, _ = divided.full(x, t, encoder_hidden_states=text, attention_rows=first, feature_rows=first, **drawn)
        one, _ = divided.full(x, t, encoder_hidden_states=text, attention_rows=own, feature_rows=own, **drawn)
    assert torch.equal(plain, want)
    assert torch.equal(both[0], one[0])
    assert (both[1:] != one[1:]).any()
    assert (one != want).any()


def test_rows_are_numbered_within_the_group_that_a_graph_is_handed() -> None:
    given = {"sample": np.arange(5.0), "attention_rows": np.array([0, 1, 2, 2, 4]), "feature_rows": np.arange(5)}
    made = [(list(each["attention_rows"]), list(each["feature_rows"])) for each in groups(given, 2)]
    assert made == [([0, 1], [0, 1]), ([0, 0], [0, 1]), ([0, 0], [0, 0])]
    with pytest.raises(AssertionError, match="a row takes one of another group"):
        list(groups(given | {"feature_rows": np.zeros(5, np.int64)}, 2))


def test_rows_stay_whole_numbers_in_fp16() -> None:
    rows, cache = Tensor("attention_rows", "int64", ("batch",)), Tensor("cache", "float32", ("batch", 4))
    half = in_half(Graph("full", "x", "full_step", (rows, cache), (cache,)))
    assert [tensor.dtype for tensor in half.inputs] == ["int64", "float16"]


def test_operations_of_steps_with_more_rows() -> None:
    """The share that is saved, by what each step cost: its rows times a full or a cached step."""
    pipe = ours("sd1-up", "ddim", "torch", injection=True)
    result = pipe(inverted=inverted(pipe), clock=2, inject_attention=0.5, inject_features=0.5, **ASKED)
    assert [(step.full, step.rows) for step in result.ledger] == [(True, 3), (False, 3), (True, 2), (False, 2)]
    full, cached = (
        pipe.manifest.cost[name].macs + pipe.manifest.cost[name].macs_attention for name in ("full", "cached")
    )
    assert result.flops_saved == pytest.approx(1 - (5 * full + 5 * cached) / (10 * full))


def test_an_inversion_keeps_its_way() -> None:
    """What the last refinement of each step led to, in the order in which DDIM draws it again."""
    pipe = ours("sd1-up", "ddim", "torch", injection=True)
    steps: list[Step] = []
    found = pipe.invert(picture(), prompt=PROMPT, num_inference_steps=STEPS, refinements=2, callback=steps.append)
    assert found.trajectory.shape == (STEPS, 1, 4, SIDE // 2, SIDE // 2)
    assert np.array_equal(found.trajectory[0], found.latents)
    for i, latents in enumerate(found.trajectory):
        last = steps[3 * (STEPS - i) - 1]
        assert np.array_equal(latents, last.latents)
        assert last.timestep == found.timesteps[i]
    drawn = pipe(inverted=found, clock=1, **ASKED)
    assert [step.timestep for step in drawn.ledger] == found.timesteps.tolist()


def test_it_survives_its_file(tmp_path: Path) -> None:
    pipe = ours("sd1-up", "ddim", "torch", injection=True)
    found = inverted(pipe)
    write_inverted(found, tmp_path / "a.npz")
    read = read_inverted(tmp_path / "a.npz")
    one, other = (pipe(inverted=each, clock=2, **ASKED).latents for each in (found, read))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"trajectory": None}, {"timesteps": np.zeros(3)}, {"trajectory": np.full((4, 1, 4, 2, 2), np.nan)},
        {"more": np.zeros(1)}, {"cond.x": np.zeros(2)}, {"cond.x": np.array(["a"])}, {"cond.x": np.float32(1)},
    ],
)  # fmt: skip
def test_a_file_that_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    arrays = {"trajectory": np.zeros((4, 1, 4, 2, 2)), "timesteps": np.zeros(4), "cond.x": np.zeros((1, 2))} | change
    np.savez(tmp_path / "a.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(RequestError, match=r"holds no inverted picture; give what edgediff invert"):
        read_inverted(tmp_path / "a.npz")


def test_what_is_no_injection() -> None:
    pipe, plain = ours("sd1-up", "ddim", "torch", injection=True), ours("sd1-up", "ddim", "torch")
    found = inverted(pipe)
    longer = {name: np.repeat(rows, 2, axis=1) for name, rows in found.cond.items()}
    refused: list[tuple[EdgePipeline, dict[str, Any], str]] = [
        (plain, {"inverted": found}, r"takes nothing of other rows; export it with --injection"),
        (pipe, {"inject_attention": 0.5}, r"inject_attention was given without an inverted picture"),
        (pipe, {"inject_features": 0.5}, r"inject_features was given without an inverted picture"),
        (pipe, {"inverted": found, "inject_features": 1.5}, r"inject_features is 1\.5; expected a share"),
        (pipe, {"inverted": found, "inject_attention": True}, r"inject_attention is True; expected a share"),
        (pipe, {"inverted": found, "latents": found.latents}, r"latents and an inverted picture were given"),
        (pipe, {"inverted": found, "image": picture()}, r"image and an inverted picture were given"),
        (pipe, {"inverted": found.latents}, r"inverted is a ndarray; expected what invert\(\) gives"),
        (pipe, {"inverted": found, "num_inference_steps": 5}, r"was inverted in 4 steps of DDIM"),
        (pipe, {"inverted": replace(found, cond=longer)}, r"\[1, 77, \d+\] and the inversion's \[1, 154, \d+\]; exp"),
        (pipe, {"inverted": found, "num_images": 3, "prompt": [OTHER] * 2}, r"prompt has 2 entries for 3 images"),
    ]
    for each, asked, words in refused:
        with pytest.raises(RequestError, match=words):
            each(**{**ASKED, **asked})
    two = inverted(pipe, picture(), picture(3))
    with pytest.raises(RequestError, match="with 1 or 3 rows"):
        pipe(inverted=two, num_images=3, **ASKED)


def test_recipes_that_cannot_inject(class_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no self-attention in transformer blocks"):
        export_bundle(edgediff.load_model(class_model), tmp_path / "a", edgediff.ExportConfig(injection=True))
    config = config_of("sd1-up", (), (), False)
    coreml = msgspec.structs.replace(config.coreml, batch=2)
    asked = msgspec.structs.replace(config, targets=("coreml",), injection=True, coreml=coreml)
    with pytest.raises(ConfigError, match=r"'coreml.batch' is 2; with 'injection' an image has 3 rows"):
        export_bundle(edgediff.load_model(saved("sd1-up")), tmp_path / "b", asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_guidance_of_a_fixed_batch() -> None:
    """Graphs of three rows at a time cannot hold a picture and its source alone."""
    pipe = ours("sd1-few", "ddim", "mil-reference", injection=True)
    found = inverted(pipe)
    with pytest.raises(RequestError, match="take 3 rows at a time, and with an inverted picture an image has 2"):
        pipe(inverted=found, prompt=OTHER, guidance_scale=1.0)


@pytest.mark.long
def test_the_commands(command: Command, place: Path) -> None:
    bundle = exported_pipeline("sd1-up", **LORA_AND_INJECTION)
    picture().save(place / "in.png")
    np.save(place / "bad.npz", noise(0, (1, 4, 4, 4)))
    said = command("invert", bundle, place / "in.png", "-o", place / "in.npz", "--steps", STEPS, "--prompt", PROMPT)
    assert said.code == 0, said.errors
    options = ("--inverted", place / "in.npz", "--prompt", OTHER, "--json")
    for more in ((), ("--inject-attention", 1, "--inject-features", 1, "--clock", 1)):
        said = command("run", bundle, "-o", place / "out.png", *options, *more)
        assert said.code == 0, said.errors
    with Image.open(place / "out.png") as drawn:
        assert drawn.size == (SIDE, SIDE)
    assert_error(command("run", bundle, "--inverted", place / "bad.npz"), "cannot be read as .npz")
    assert_error(command("run", bundle, "--inverted", place / "none.npz"), "cannot be read as .npz")
    assert_error(command("run", bundle, "--inject-features", 0.5), "without an inverted picture")
    assert_error(command("invert", bundle, place / "in.png", "-o", place / "in.png"), "ends in .npy")
