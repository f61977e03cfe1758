"""What an export is made for where its recipe leaves that out: the sampler, the steps and the guidance of the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
from artefacts import saved_once
from command_line import Command, assert_error
from tiny_pipelines import NOISE, SAVE

from edgediff import ExportConfig, load_model
from edgediff.config.choices import Cut
from edgediff.errors import ConfigError
from edgediff.export.draft import operating_point, with_defaults
from edgediff.models.load import Model
from edgediff.models.trained import RECORD, AdaptorRecord
from edgediff_runtime.manifest import TrainedFor

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TURBO = {**NOISE, "timestep_spacing": "trailing"}


def chosen(model: Model, **said: Any) -> tuple[str, int, float]:
    point = operating_point(model, with_defaults(ExportConfig(**said), model))
    return point.scheduler, point.num_inference_steps, point.guidance_scale


def sampled_by(name: str, folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A small pipeline with another scheduler."""
    shutil.copytree(saved_once(name, SAVE[name]), folder)
    getattr(diffusers, kind)(**settings).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    ("name", "point"),
    [("sd1", ("pndm", 8, 7.5)), ("sd2", ("ddim", 8, 7.5)), ("xl", ("euler", 8, 7.5)), ("lcm", ("lcm", 4, 8.5))],
)
def test_a_pipelines_own_scheduler_is_followed(name: str, point: tuple[str, int, float]) -> None:
    model = load_model(saved_once(name, SAVE[name]))
    assert chosen(model) == point
    assert chosen(model, scheduler="ddim", steps=3, guidance_scale=2.0) == ("ddim", 3, 2.0)


@pytest.mark.parametrize(
    ("kind", "settings", "point"),
    [
        ("EulerAncestralDiscreteScheduler", TURBO, ("euler_ancestral", 4, 1.0)),  # SDXL-Turbo's
        ("EulerDiscreteScheduler", TURBO, ("euler", 4, 1.0)),  # SD-Turbo's
        ("LCMScheduler", NOISE, ("lcm", 4, 1.0)),
        ("TCDScheduler", NOISE, ("tcd", 4, 1.0)),
        # Trailing for another reason.
        ("EulerDiscreteScheduler", TURBO | {"rescale_betas_zero_snr": True}, ("euler", 8, 7.5)),
        ("EulerDiscreteScheduler", TURBO | {"prediction_type": "v_prediction"}, ("euler", 8, 7.5)),
        ("DDIMScheduler", TURBO, ("ddim", 8, 7.5)),
        ("UniPCMultistepScheduler", {}, ("unipc", 8, 7.5)),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, ("dpmpp_2m", 8, 7.5)),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ("dpmpp_2m_sde", 8, 7.5)),
        ("DDPMScheduler", {}, ("dpmpp_2m", 8, 7.5)),
    ],
)
def test_steps_and_guidance_follow_from_the_scheduler(
    tmp_path: Path, kind: str, settings: dict[str, Any], point: tuple[str, int, float]
) -> None:
    assert chosen(load_model(sampled_by("xl", tmp_path / "xl", kind, settings))) == point


@pytest.mark.parametrize("name", ["grocery-32-student", "sd15", "sdxl"])
def test_built_in_models_keep_the_sampler_that_their_adaptors_were_trained_for(name: str) -> None:
    assert chosen(load_model(name))[:2] == ("dpmpp_2m", 8)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("LMSDiscreteScheduler", NOISE, "LMSDiscreteScheduler cannot be followed; name another one: ddim, "),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 3},
            "DPMSolverMultistepScheduler cannot be followed (dpmpp_2m: scheduler solver_order 3",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_followed(
    tmp_path: Path, command: Command, kind: str, settings: dict[str, Any], said: str
) -> None:
    folder = sampled_by("sd1", tmp_path / "sd1", kind, settings)
    assert_error(command("export", folder, "-o", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()
    assert chosen(load_model(folder), scheduler="euler") == ("euler", 8, 7.5)


def test_an_adaptors_folder_says_what_it_was_trained_for(tmp_path: Path) -> None:
    point = TrainedFor(num_inference_steps=6, scheduler="ddim", clock=3, mask=(1, 0, 0, 1, 0, 0), guidance_scale=4.0)
    record = AdaptorRecord(
        edgediff_adaptor=1, kind="resnet", takes_text=False, model="x", model_sha256="0", cut=Cut(),
        highres=(8, 16, 16), lowres=(8, 16, 16), emb=32, text=None, trained_for=point, rollout="teacher",
    )  # fmt: skip
    (tmp_path / RECORD).write_bytes(msgspec.json.encode(record))
    model = load_model(saved_once("sd1", SAVE["sd1"]))
    assert chosen(model, adaptor=str(tmp_path)) == ("ddim", 6, 4.0)
    assert chosen(model, adaptor=str(tmp_path), steps=5, guidance_scale=1.0) == ("ddim", 5, 1.0)
    assert chosen(model, adaptor="identity") == ("pndm", 8, 7.5)


def test_a_clock_of_another_number_of_calls_is_found_when_the_sampler_is_known() -> None:
    model = load_model(saved_once("sd1", SAVE["sd1"]))
    assert with_defaults(ExportConfig(steps=3, clock="1,0,0,1"), model).scheduler == "pndm"  # it calls the UNet 4 times
    with pytest.raises(ConfigError, match="clock mask 1,0,0 has 3 entries for 4 model calls"):
        with_defaults(ExportConfig(steps=3, clock="1,0,0"), model)


def test_the_manifest_says_what_was_chosen(text_bundle: Path) -> None:
    recipe = json.loads((text_bundle / "manifest.json").read_text())["config"]
    assert (recipe["steps"], recipe["scheduler"]) == (4, "dpmpp_2m")
