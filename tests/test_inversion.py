"""DDIM backwards: diffusers' inverse steps, and pictures that come back; other samplers than the bundle's."""

from pathlib import Path
from typing import Any

import diffusers
import make
import msgspec
import numpy as np
import pytest
import torch
from command_line import Command, assert_error, exit_code
from edits import PROMPT, SIDE, mask, ours, picture
from pipelines import exported_pipeline

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.export.draft import draft_manifest, with_defaults
from edgediff.models.sampling import scheduler_config
from edgediff.models.undivided import undivided_session
from edgediff_runtime import EdgePipeline, RequestError, noise
from edgediff_runtime.editing import as_pixels
from edgediff_runtime.image import read_latents
from edgediff_runtime.inversion import inverse_scheduler
from edgediff_runtime.schedulers import SCHEDULER_NAMES, SchedulerConfig, make_scheduler, with_sampler

STEPS = 8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_the_first_guess_is_diffusers_inverse() -> None:
    """Of a model of epsilon; one of v tells diffusers' scheduler another epsilon than DDIM's step back would take."""
    theirs = diffusers.DDIMInverseScheduler(**make.SD15)
    theirs.set_timesteps(STEPS)
    inverse = inverse_scheduler(scheduler_config(make.SD15, "ddim"), STEPS)
    assert inverse.timesteps.tolist() == theirs.timesteps.tolist()
    x = noise(1, (1, 2, 4, 4))
    for i, t in enumerate(theirs.timesteps):
        output = noise(2, x.shape, draw=i)
        want = theirs.step(torch.from_numpy(output), t, torch.from_numpy(x)).prev_sample.numpy()
        x, _ = inverse.step(i, x, output, None if i == 0 else ())
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_and_its_inverse_with_the_same_output_cancel(prediction: str) -> None:
    config = scheduler_config({**make.SD15, "prediction_type": prediction}, "ddim")
    forwards, backwards = make_scheduler(config, STEPS), inverse_scheduler(config, STEPS, refinements=2)
    x, output = noise(1, (1, 2, 4, 4)), noise(2, (1, 2, 4, 4))
    for i in range(STEPS):
        stepped, _ = forwards.step(i, x, output, ())
        state: Any = None
        first = 3 * (STEPS - 1 - i)
        back = stepped
        for call in range(first, first + 3):  # a refinement begins where the step began, not where the guess was
            back, state = backwards.step(call, back, output, state, first=call == first)
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained() -> EdgePipeline:
    """A model that draws, in torch: what an inversion finds depends on how smooth its output is."""
    model = edgediff.load_model("grocery-32")
    config = with_defaults(edgediff.ExportConfig(), model)
    draft = draft_manifest(model, edgediff.split(model.unet), config, "labels", {})
    return EdgePipeline(draft, undivided_session(model), warn=False)


@pytest.mark.long
def test_more_refinements_come_closer_to_the_picture(trained: EdgePipeline) -> None:
    asked: dict[str, Any] = {"label": "Orange", "num_inference_steps": STEPS, "guidance_scale": 1.0, "clock": 1}
    drawn = trained(**asked, scheduler="ddim", seed=4).images
    found = []
    for refinements in (0, 1, 3):
        inverted = trained.invert(drawn, refinements=refinements, **asked)
        assert len(inverted.ledger) == STEPS * (refinements + 1)
        again = trained(latents=inverted.latents, scheduler="ddim", **asked)
        found.append(psnr_db(as_pixels(drawn), again.latents))
    assert found[0] + 3 < found[1] < found[2] - 3
    assert found[2] > 25


def test_inversion_under_the_clock() -> None:
    pipe = ours("sd1", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4}
    assert pipe.invert(picture(), clock=2, **asked).mask == (1, 0, 1, 0)
    assert pipe.invert(picture(), refinements=1, clock="1,0,1,0,1,1,0,0", **asked).mask == (1, 0, 1, 0, 1, 1, 0, 0)
    both = pipe.invert([picture(), picture(3)], clock=2, **asked)
    assert both.latents.shape == (2, 4, SIDE // 2, SIDE // 2)
    alone = pipe.invert(picture(3), clock=2, **asked)
    np.testing.assert_allclose(both.latents[1:], alone.latents, rtol=0, atol=1e-4)


def test_a_model_that_is_told_the_guidance_is_inverted_with_it() -> None:
    pipe = ours("lcm", "lcm", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4}
    made = [pipe.invert(picture(), guidance_scale=scale, **asked).latents for scale in (1.0, 8.0)]
    assert np.isfinite(made[0]).all()
    assert (made[0] != made[1]).any()


def test_guidance_of_an_inversion_has_an_entry_for_each_call() -> None:
    pipe = ours("sd1", "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "refinements": 1}
    found = pipe.invert(picture(), guidance_scale=[2.0, 2.0, 1.0, 1.0], **asked)
    assert [step.guided for step in found.ledger] == [True, True, False, False]
    with pytest.raises(RequestError, match="guidance_scale has 2 entries for 4 calls"):
        pipe.invert(picture(), guidance_scale=[2.0, 1.0], **asked)


def test_latents_of_ones_own_are_what_a_seed_would_draw() -> None:
    pipe = ours("sd1", "euler", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "clock": 2}
    own = np.stack([noise(7, (4, SIDE // 2, SIDE // 2), image=i) for i in range(2)])
    given = pipe(latents=own, **asked)
    np.testing.assert_array_equal(given.latents, pipe(seed=7, num_images=2, **asked).latents)
    assert len(pipe(latents=own[:1], num_images=3, **asked).latents) == 3


SPACED = [name for name in SCHEDULER_NAMES if not name.startswith(("lcm", "tcd"))]


@pytest.mark.parametrize("wanted", SCHEDULER_NAMES)
@pytest.mark.parametrize("name", [name for name in SPACED if "_" not in name or name == "dpmpp_2m"])
def test_another_sampler_is_what_the_export_would_have_written(name: str, wanted: str) -> None:
    source = {**make.SD15, "clip_sample": False}
    config = with_sampler(scheduler_config(source, name), wanted)
    assert config == scheduler_config(source, wanted)
    assert with_sampler(config, wanted) is config


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"latents are \[1, 4, 8, 8\]; expected \[N, 4, 16, 16\]"),
        ({"latents": np.zeros((1, 3, 16, 16), np.float32)}, r"latents are float32 \[1, 3, 16, 16\]"),
        ({"latents": np.zeros((2, 4, 16, 16), np.float32), "num_images": 3}, "with 1 or 3 rows"),
        ({"latents": np.zeros((1, 4, 16, 16), np.float32), "image": picture()}, "begins with one of them; give one"),
        ({"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}, "latents hold NaN or infinity"),
        ({"latents": np.full((1, 4, 16, 16), 1e300)}, "latents hold NaN or infinity"),
        ({"latents": [[1.0], [1.0, 2.0]]}, "latents is not an array"),
        ({"scheduler": "dpm"}, "scheduler 'dpm': expected one of ddim, "),
        ({"image": picture(), "mask_image": mask(), "strength": 2}, "strength is 2; expected 0"),
    ],
)
def test_what_a_generation_cannot_begin_with_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours("sd1", "ddim", "torch")(prompt=PROMPT, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"refinements": -1}, "refinements is -1; expected 0 to 20"),
        ({"refinements": 1.5}, "refinements is 1.5"),
        ({"guidance_scale": [1.0] * 7}, "guidance_scale has 7 entries for 8 calls; expected one each"),
        ({"clock": "1,0"}, "clock mask 1,0 has 2 entries for 8 steps"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image has 8 x 8 pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps 0: expected"),
    ],
)
def test_an_inversion_that_cannot_be_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ours("sd1", "ddim", "torch").invert(**{"image": picture(), "prompt": PROMPT, "num_inference_steps": 8, **asked})


def test_steps_that_clip_cannot_be_taken_backwards() -> None:
    pipe = ours("sd1", "ddim", "torch")
    clipping = msgspec.structs.replace(pipe.manifest, scheduler=SchedulerConfig(name="ddim"))
    with pytest.raises(RequestError, match="clip_sample True and eta 0: such steps cannot be taken backwards"):
        EdgePipeline(clipping, pipe.components, pipe._tokenizers).invert(picture(), prompt=PROMPT)


def test_a_model_that_is_told_the_guidance_inverts_without_rows_of_it() -> None:
    pipe = ours("lcm", "lcm", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2}
    told, other = (pipe.invert(picture(), guidance_scale=scale, **asked) for scale in (7.5, 1.0))
    assert [step.guided for step in told.ledger] == [False, False]
    assert (told.latents != other.latents).any()


@pytest.mark.parametrize(("name", "beside"), [("inpaint", "mask and masked image"), ("pix2pix", "image")])
def test_what_stands_beside_the_latent_is_given_to_an_inversion(name: str, beside: str) -> None:
    pipe = ours(name, "ddim", "torch")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2}
    with pytest.raises(RequestError, match=f"takes {beside} beside the latent.* give concat_latents="):
        pipe.invert(picture(), **asked)
    channels = pipe.manifest.sample.in_channels - pipe.manifest.sample.channels
    own = noise(1, (1, channels, SIDE // 2, SIDE // 2))
    assert len(pipe.invert(picture(), concat_latents=own, refinements=np.int64(1), **asked).ledger) == 4


@pytest.mark.parametrize("wanted", SCHEDULER_NAMES)
def test_another_sampler_has_the_bundles_zero_terminal_snr_or_is_refused(wanted: str) -> None:
    source = {**make.SD15, "clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    config = scheduler_config(source, "ddim")
    if wanted == "pndm" or wanted.startswith("heun"):
        with pytest.raises(RequestError, match="does not read it; expected False"):
            with_sampler(config, wanted)
    else:
        assert with_sampler(config, wanted).rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as .npy"),
        (b"PK\x03\x04 no archive", "cannot be read as .npy"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((\n\n", "cannot be read as .npy"),
        (None, "is an archive of arrays"),
    ],
)
def test_a_file_without_latents_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "latents.npy"
    if data is None:
        with file.open("wb") as stream:
            np.savez(stream, latents=np.zeros((1, 4, 16, 16), np.float32))
    else:
        file.write_bytes(data)
    with pytest.raises(RequestError, match=message):
        read_latents(file)


@pytest.mark.long
def test_the_command_line_inverts_and_draws_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, photo = exported_pipeline("sd1"), tmp_path / "photo.png"
    picture().save(photo)
    words = ("--prompt", PROMPT, "--steps", 4)
    assert exit_code(monkeypatch, "invert", bundle, photo, "-o", tmp_path / "z.npy", *words, "--clock", 2) == 0
    found = np.load(tmp_path / "z.npy")
    assert found.shape == (1, 4, 16, 16)
    drawing = ("--scheduler", "ddim", "--guidance-scale", 1, *words, "-o", tmp_path / "again.png")
    assert exit_code(monkeypatch, "run", bundle, "--latents", tmp_path / "z.npy", *drawing) == 0
    assert (tmp_path / "again.png").exists()
    edit = ("--image", photo, "--strength", 0.5, "--prompt", PROMPT)
    assert exit_code(monkeypatch, "run", bundle, *edit, "-o", tmp_path / "edit.png") == 0


@pytest.mark.long
def test_the_command_line_says_what_is_wrong(tmp_path: Path, command: Command) -> None:
    bundle, photo = exported_pipeline("sd1"), tmp_path / "photo.png"
    picture().save(photo)
    (tmp_path / "z.npy").write_bytes(b"no array")
    for args, message in (
        (("invert", bundle, photo, "-o", tmp_path / "z.png"), "expected a name that ends in .npy"),
        (("invert", bundle, tmp_path / "none.png"), "there is no such file"),
        (("run", bundle, "--latents", tmp_path / "z.npy"), "cannot be read as .npy"),
        (("run", bundle, "--image", tmp_path), "it is a folder"),
        (("run", bundle, "--image", photo, "--prompt", "a dog", "--strength", "0"), "of 8 steps it leaves none"),
        (
            ("run", bundle, "--control", photo, "--prompt", "a dog"),
            "the bundle has neither a ControlNet nor a T2I-Adapter",
        ),
    ):
        assert_error(command(*map(str, args)), message)
