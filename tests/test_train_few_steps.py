"""Distillation to a few steps, with an adaptor along it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from captioned import captioned_folder, training
from command_line import Command, assert_error
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file
from trainings import changed

from edgediff import Cut, ExportConfig, export_bundle, load_model, split
from edgediff.config.floors import VerifyConfig
from edgediff.errors import ConfigError, EdgediffError, ModelError
from edgediff.models.adaptors import LearnedAdaptor
from edgediff.models.graphs import adaptor_shape
from edgediff.models.sampling import scheduler_config
from edgediff.models.trained import load_adaptor
from edgediff.models.undivided import undivided_session
from edgediff.train.few_steps import (
    CACHED,
    FULL,
    FewStepsLearner,
    TeacherTrajectories,
    few_steps_of,
    linear_step,
    train_few_steps,
)
from edgediff.train.loop import Loop
from edgediff.train.settings import FewStepsTraining, training_from
from edgediff.train.teacher import train_teacher
from edgediff_runtime.bundle import open_bundle
from edgediff_runtime.loop import Request, denoise
from edgediff_runtime.manifest import TrainedFor
from edgediff_runtime.schedulers import make_scheduler

pytestmark = [
    pytest.mark.usefixtures("few_samples"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' sampler
]
NOISED: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


@pytest.fixture
def asked(class_model: Path, monkeypatch: pytest.MonkeyPatch) -> FewStepsTraining:
    """Two steps instead of four, in six updates of two trajectories."""
    monkeypatch.setattr("edgediff.train.few_steps._MEASURED", 4)
    return FewStepsTraining(
        model=str(class_model), steps=2, teacher_steps=4, rounds=2, images=4, passes=2, batch=2, learning_rate=1e-3
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adaptors = [load_file(path) for path in sorted(folder.glob("adaptors/*/*.safetensors"))]
    found = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return found | {f"adaptor.{name}": tensor for each in adaptors for name, tensor in each.items()}


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What is learnt


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_the_target_is_the_prediction_whose_step_ends_there(class_model: Path, prediction: str) -> None:
    model = load_model(class_model)
    model.scheduler.register_to_config(prediction_type=prediction)
    scheduler = few_steps_of(model, 4)
    assert [float(t) for t in scheduler.timesteps] == [999, 749, 499, 249]
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, 3, 3, 8, 8), dtype=np.float32)
    for i in range(4):
        of_x, of_out = linear_step(scheduler, i)
        stepped = scheduler.step(i, x, out, None, None, True)[0]
        np.testing.assert_allclose(of_x * x + of_out * out, stepped, atol=1e-5)


def test_the_terms_are_those_of_full_and_cached_steps(class_model: Path) -> None:
    """What the learner computes for all steps at once is what the divided UNet gives, step after step."""
    model = load_model(class_model)
    torch.manual_seed(0)
    adaptor = LearnedAdaptor("resnet", adaptor_shape(split(model.unet, Cut()), model), takes_text=False)
    for parameter in adaptor.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    divided = split(model.unet, Cut(), adaptor.eval())
    mask, scheduler = (True, False, False, True), few_steps_of(model, 4)
    learner = FewStepsLearner(divided, scheduler, mask)
    path, labels, cache = torch.randn(3, 5, 3, 16, 16), torch.tensor([0, 2, 4]), torch.empty(0)
    with torch.no_grad():
        terms = learner(path, {"class_labels": labels})
        errors: dict[str, list[torch.Tensor]] = {FULL: [], CACHED: []}
        for i, full in enumerate(mask):
            of_x, of_out = linear_step(scheduler, i)
            target = (path[:, i + 1] - of_x * path[:, i]) / of_out
            made, feature = divided.full(path[:, i], float(scheduler.timesteps[i]), class_labels=labels)
            errors[FULL].append((made - target).square().mean())
            if not full:
                made, feature = divided.cached(path[:, i], float(scheduler.timesteps[i]), cache, class_labels=labels)
                errors[CACHED].append((made - target).square().mean())
            cache = feature
    for name in (FULL, CACHED):
        torch.testing.assert_close(terms[name], torch.stack(errors[name]).mean(), rtol=1e-4, atol=1e-6)


def test_the_teacher_walks_through_the_points_of_the_few_steps(class_model: Path, asked: FewStepsTraining) -> None:
    teacher = load_model(class_model)
    trajectories = TeacherTrajectories(teacher, changed(asked, guidance_scale=2.0))
    drawn = trajectories.draw(3)
    assert drawn["points"].shape == (4, 3, 3, 16, 16)
    assert torch.equal(trajectories.draw(3)["points"], drawn["points"])
    assert not torch.equal(trajectories.draw(4)["points"], drawn["points"])
    config = msgspec.structs.replace(scheduler_config(teacher.scheduler, "dpmpp_2m"), timestep_spacing="trailing")
    session, labels = undivided_session(teacher), drawn["prompt"].numpy()
    request = Request(
        graphs=session.graphs, scheduler=make_scheduler(config, 4), clock=(True,) * 4, guidance=(2.0,) * 4,
        latents=drawn["points"][:, 0].numpy(), cond={"class_labels": labels},
        uncond={"class_labels": np.full(4, teacher.conditioning.null_label)}, seed=0,
    )  # fmt: skip
    passed = [step.latents for step in denoise(request, session)]
    np.testing.assert_allclose(drawn["points"][:, 1], passed[1], atol=1e-5)
    np.testing.assert_allclose(drawn["points"][:, 2], passed[3], atol=1e-5)


SOURCES: dict[str, Any] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**NOISED),
    "PNDMScheduler": PNDMScheduler(**NOISED, skip_prk_steps=True),
    "DDPMScheduler": DDPMScheduler(**NOISED),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ideal_prediction_ends_at_the_teachers_end(class_model: Path, kind: str, prediction: str) -> None:
    """In the scheduler that is saved, whatever the model's own leaves at its defaults."""
    scheduler = SOURCES[kind]
    scheduler.register_to_config(prediction_type=prediction)
    model = replace(load_model(class_model), scheduler=scheduler)
    few = few_steps_of(model, 4)
    assert [float(t) for t in few.timesteps] == [999, 749, 499, 249]
    points = 3 * np.random.default_rng(0).standard_normal((5, 1, 3, 4, 4), dtype=np.float32)  # far beyond 1
    x = points[0]
    for i in range(4):
        of_x, of_out = linear_step(few, i)
        x = few.step(i, x, (points[i + 1] - of_x * x) / of_out, None, None, True)[0]
    np.testing.assert_allclose(x, points[-1], atol=1e-3)


@pytest.mark.long
def test_it_comes_nearer_to_its_teacher(asked: FewStepsTraining, tmp_path: Path, loops: list[Loop]) -> None:
    done = train_few_steps(tmp_path / "a", changed(asked, rounds=40, passes=3, learning_rate=3e-3, ema=0.9))
    assert done is not None
    full, cached = (loops[0].state.terms[name] for name in (FULL, CACHED))
    assert done.updates == len(full) == 240
    assert np.mean(full[-10:]) < 0.5 * np.mean(full[:3])
    assert np.mean(cached[-10:]) < 0.5 * np.mean(cached[:3])
    assert done.nearness.cached is not None
    hardly = train_few_steps(tmp_path / "b", changed(asked, passes=1, learning_rate=1e-9))
    assert hardly is not None
    assert min(done.nearness.full, done.nearness.cached) > hardly.nearness.full + 1


# What comes out


def test_the_result_is_a_model_of_a_few_steps(asked: FewStepsTraining, class_model: Path, tmp_path: Path) -> None:
    train_few_steps(tmp_path / "a", asked)
    model = load_model(tmp_path / "a")
    assert (model.usual_sampler, model.usual_steps, model.usual_guidance) == ("ddim", 2, 1.0)
    assert model.labels == load_model(class_model).labels
    assert not same_unet(tmp_path / "a", class_model)
    adaptor = load_adaptor(tmp_path / "a" / "adaptors" / "resnet-clock-2")
    assert adaptor.record is not None
    assert adaptor.record.model_sha256 == model.sha256
    assert adaptor.record.trained_for == TrainedFor(2, "ddim", 2, (1, 0), 1.0)
    assert not (tmp_path / "a" / "store").exists()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "distilled to 2 steps of DDIM" in card
    assert "trajectories of 4 steps of dpmpp_2m, trailing, with guidance 2" in card
    settings = card.partition("```json\n")[2].partition("```")[0]
    assert training_from(json.loads(settings), FewStepsTraining) == asked


def same_unet(one: Path, other: Path) -> bool:
    a, b = (load_model(path).unet.state_dict() for path in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_its_adaptor_is_exported_with_it(asked: FewStepsTraining, tmp_path: Path) -> None:
    """Sampler, steps, guidance and adaptor are the model's own: nothing needs to be named."""
    train_few_steps(tmp_path / "a", asked)
    config = ExportConfig(clock=2, verify=VerifyConfig(mode="graphs"))
    export_bundle(load_model(tmp_path / "a"), tmp_path / "bundle", config)
    adaptor = open_bundle(tmp_path / "bundle").manifest.adaptor
    assert adaptor.kind == "resnet"
    assert adaptor.trained_for == TrainedFor(2, "ddim", 2, (1, 0), 1.0)


@pytest.mark.long
def test_without_cached_steps_there_is_no_adaptor(asked: FewStepsTraining, tmp_path: Path, loops: list[Loop]) -> None:
    done = train_few_steps(tmp_path / "a", changed(asked, clock=1))
    assert done is not None
    assert done.nearness.cached is None
    assert set(loops[0].state.terms) == {FULL}
    assert not (tmp_path / "a" / "adaptors").exists()


@pytest.mark.long
def test_a_pipeline_keeps_its_other_parts(tmp_path: Path, asked: FewStepsTraining) -> None:
    """And a student learns from a teacher's trajectories, under prompts."""
    train_teacher(tmp_path / "teacher", training(captioned_folder(tmp_path / "drawings")))
    (tmp_path / "prompts.txt").write_text("red stripes\nblue\n")
    settings = changed(
        asked, model=str(tmp_path / "teacher"), teacher=str(tmp_path / "teacher"), guidance_scale=3.0,
        conditioning=str(tmp_path / "prompts.txt"),
    )  # fmt: skip
    train_few_steps(tmp_path / "a", settings)
    for part in ("vae", "text_encoder", "tokenizer"):
        before, after = (tmp_path / folder / part for folder in ("teacher", "a"))
        assert {path.name: path.read_bytes() for path in after.iterdir()} == {
            path.name: path.read_bytes() for path in before.iterdir()
        }
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert load_model(tmp_path / "a").conditioning.kind == "text"
    assert "## The card of the model before" in (tmp_path / "a" / "README.md").read_text()
    other = shutil.copytree(tmp_path / "teacher", tmp_path / "other" / "teacher")  # the same name
    file = other / "text_encoder" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="another text encoder"):
        train_few_steps(tmp_path / "b", changed(settings, teacher=str(other)))
    shutil.copytree(tmp_path / "teacher" / "text_encoder", other / "text_encoder", dirs_exist_ok=True)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="another autoencoder"):
        train_few_steps(tmp_path / "b", changed(settings, teacher=str(other)))
    assert not (tmp_path / "b").exists()


@pytest.mark.long
def test_an_interrupted_training_ends_with_the_same_weights(asked: FewStepsTraining, tmp_path: Path) -> None:
    settings, left = changed(asked, checkpoint_minutes=1e-9), iter((None, None))

    def stop(what: str, share: float) -> None:
        if what.startswith("update") and next(left, stop) is stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_few_steps(tmp_path / "a", settings, progress=stop)
    assert not (tmp_path / "a" / "README.md").exists()
    resumed = train_few_steps(tmp_path / "a", settings)
    whole = train_few_steps(tmp_path / "whole", settings)
    assert resumed is not None
    assert whole is not None
    assert same(tmp_path / "a", tmp_path / "whole")
    assert resumed.nearness == whole.nearness
    assert train_few_steps(tmp_path / "a", settings) is None


# The command, and what it refuses


def test_the_command(asked: FewStepsTraining, class_model: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "a.yaml").write_bytes(msgspec.yaml.encode(changed(asked, model=None)))
    said = command("train", "few-steps", class_model, "--config", tmp_path / "a.yaml", "-o", tmp_path / "a")
    assert said.code == 0
    assert "8 updates: unseen seeds" in said.out
    assert "at clock 2" in said.out
    said = command("train", "few-steps", class_model, "--config", tmp_path / "a.yaml", "-o", tmp_path / "a", "--json")
    assert json.loads(said.out)["trained"] is False


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": None}, ConfigError, "no model: name"),
        ({"model": "sd15"}, ConfigError, "sd15 is a geometry without weights"),
        ({"teacher": "nowhere"}, ModelError, "no model at nowhere"),
        ({"teacher": "grocery-32"}, ConfigError, "the teacher grocery-32 has sample_size 32, the student 16"),
        ({"teacher_steps": 5}, ConfigError, "'teacher_steps' is 5 for 2 steps; expected a multiple of them: 4, 6, 8"),
        ({"teacher_steps": 2}, ConfigError, "'teacher_steps' is 2 for 2 steps"),
        ({"clock": "1,0,0"}, ConfigError, "clock"),
        ({"scheduler": "pndm"}, ConfigError, "4 steps of pndm have the time steps"),
        ({"scheduler": "dpmpp_2m_sde"}, ConfigError, "dpmpp_2m_sde draws noise"),
        ({"scheduler": "euler"}, ConfigError, "samples are of another scale in euler"),
        ({"conditioning": "prompts.txt"}, ConfigError, "conditioning prompts.txt: no such file"),
        ({"steps": 0}, ConfigError, "'steps' is 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    asked: FewStepsTraining, tmp_path: Path, changes: dict[str, Any], kind: type[EdgediffError], words: str
) -> None:
    with pytest.raises(kind, match=words.replace("[", r"\[")) as caught:
        train_few_steps(tmp_path / "refused", changed(asked, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_a_unet_without_a_directory_around_it_is_refused(
    asked: FewStepsTraining, class_model: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(class_model / "unet", tmp_path / "flat")
    shutil.copy(class_model / "scheduler" / "scheduler_config.json", tmp_path / "flat")
    said = command("train", "few-steps", tmp_path / "flat", "-o", tmp_path / "a")
    assert_error(said, "flat is not the directory of a model with a folder unet")


def test_settings_are_read_strictly() -> None:
    assert training_from({"steps": 2, "clock": "2"}, FewStepsTraining).clock == 2
    with pytest.raises(ConfigError, match="'teacher_step'"):
        training_from({"teacher_step": 8}, FewStepsTraining)
