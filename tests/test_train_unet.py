import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from command_line import Command, assert_error
from conftest import LABELS
from diffusers import AutoencoderKL, DDPMScheduler
from photographs import folder_of_images
from PIL import Image
from safetensors.torch import load_file
from trainings import UNET, UPDATES, changed, resumes, same

from edgediff import Cut, ExportConfig, export_bundle, load_model, split
from edgediff.config.floors import VerifyConfig
from edgediff.data.batches import Batches, as_channels_first
from edgediff.errors import ConfigError
from edgediff.models.macs import tally
from edgediff.models.spectral import SpectralUNet2DConditionModel, SpectralUNet2DModel
from edgediff.train.distillation import predict_with_features
from edgediff.train.latents import load_autoencoder
from edgediff.train.loop import Loop
from edgediff.train.samples import STEPS, draw_samples, make_sampler
from edgediff.train.settings import DecoderTraining, StudentTraining, TeacherTraining, load_training, training_from
from edgediff.train.student import student_of, train_student
from edgediff.train.teacher import geometry_of, train_teacher
from edgediff.train.unet import PRODUCT, UNetTrained, save_parts

RECIPES = sorted((Path(__file__).parents[1] / "export_configs" / "train").glob("*.yaml"))
# Of the teachers' recipes, in millions.
KINDS = {"drawings-64-further": TeacherTraining, "drawings-64-decoder": DecoderTraining}
PARAMETERS = {"grocery-64-teacher": 88, "drawings-64-teacher": 18}
pytestmark = pytest.mark.usefixtures("few_samples")


# What is learnt


@pytest.mark.long
def test_a_student_is_a_model_that_loads_exports_and_runs(student_training: StudentTraining, tmp_path: Path) -> None:
    done = train_student(tmp_path / "mine", student_training)
    assert isinstance(done, UNetTrained)
    assert (done.updates, done.images, done.skipped) == (UPDATES, 28, "")
    model = load_model(tmp_path / "mine")
    assert isinstance(model.unet, SpectralUNet2DModel)
    assert (model.name, model.labels, model.conditioning.null_label) == ("mine", tuple(LABELS), 4)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "README.md", "classes.json", "loss.png", "samples.png", "scheduler", "training.json", "unet",
    }  # fmt: skip
    for picture in ("loss.png", "samples.png"):
        with Image.open(tmp_path / "mine" / picture) as image:
            image.verify()
    export_bundle(model, tmp_path / "bundle", ExportConfig(steps=2, verify=VerifyConfig(mode="graphs")))


def test_the_card_has_what_the_training_took(student_training: StudentTraining, tmp_path: Path) -> None:
    train_student(tmp_path / "a", student_training)
    card = (tmp_path / "a" / "README.md").read_text()
    settings = card.partition("```json\n")[2].partition("```")[0]
    assert training_from(json.loads(settings), StudentTraining) == student_training
    assert "spatial 0.1, frequency 0.1 with alpha -1, at down, mid, up, out" in card
    assert "28 images of 4 classes, brought to 16x16" in card


def test_a_student_learns_from_its_teacher(
    student_training: StudentTraining, tmp_path: Path, loops: list[Loop]
) -> None:
    """Where the teacher's prediction counts most, the student comes nearer to it."""
    changes = {"updates": 60, "learning_rate": 1e-2, "spatial": 100.0, "frequency": 0.0, "points": ("out",)}
    train_student(tmp_path / "a", changed(student_training, **changes))
    spatial = loops[0].state.terms["spatial"]
    assert np.mean(spatial[-10:]) < 0.5 * np.mean(spatial[:5])


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({}, {"ddpm", "spatial", "frequency"}),
        ({"spatial": 0.0, "frequency": 0.0}, {"ddpm"}),
        ({"spatial": 0.0}, {"ddpm", "spatial", "frequency"}),
        ({"gating": False}, {"ddpm", "spatial", "frequency"}),
    ],
)
def test_each_term_can_be_switched_off(
    student_training: StudentTraining, tmp_path: Path, loops: list[Loop], changes: dict[str, Any], terms: set[str]
) -> None:
    train_student(tmp_path / "a", changed(student_training, **changes))
    (loop,) = loops
    assert set(loop.state.terms) == terms
    expected = [
        sum(loop.task.weights[name] * values[i] for name, values in loop.state.terms.items()) for i in range(UPDATES)
    ]
    np.testing.assert_allclose(loop.state.losses, expected, rtol=1e-5)
    assert isinstance(load_model(tmp_path / "a").unet, SpectralUNet2DModel) == changes.get("gating", True)


@pytest.mark.long
def test_draws_that_come_again_ask_the_teacher_once(
    student_training: StudentTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many draws as updates are what no limit draws; fewer come again, with the features that are stored."""
    asked = []

    def features(unet: Any, *rest: Any) -> Any:
        asked.append(unet)
        return predict_with_features(unet, *rest)

    monkeypatch.setattr("edgediff.train.unet.predict_with_features", features)
    train_student(tmp_path / "whole", student_training)
    train_student(tmp_path / "as many", changed(student_training, draws=UPDATES))
    assert same(tmp_path / "whole", tmp_path / "as many")
    assert len(asked) == 2 * UPDATES
    asked.clear()
    few = changed(student_training, draws=2, checkpoint_minutes=1e-9)
    left = iter((None, None, None))

    def stop(what: str, share: float) -> None:
        if what.startswith("update") and next(left, stop) is stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(tmp_path / "a", few, progress=stop)
    resumes(tmp_path, few, "few")
    assert len(asked) == 2 + 2  # those of the training that stopped are there still
    assert not (tmp_path / "a" / "store").exists()
    assert not same(tmp_path / "a", tmp_path / "whole")


@pytest.mark.long
def test_a_student_can_continue_from_another(student_training: StudentTraining, tmp_path: Path) -> None:
    train_student(tmp_path / "first", student_training)
    still = changed(student_training, student=str(tmp_path / "first"), width=None, updates=1, learning_rate=1e-12)
    train_student(tmp_path / "second", still)
    a, b = (load_file(tmp_path / name / PRODUCT) for name in ("first", "second"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.long
def test_gates_that_see_the_time_are_taught_at_all_places(
    student_training: StudentTraining, tmp_path: Path, loops: list[Loop]
) -> None:
    """Such a UNet runs layer by layer: its blocks are never called."""
    train_student(tmp_path / "a", changed(student_training, gate_takes_time=True, updates=1))
    train_student(tmp_path / "b", changed(student_training, gate_takes_time=True, updates=1, points=("down",)))
    every, down = (loop.state.terms["spatial"][0] for loop in loops)
    assert 0 < down < every


def test_names_of_classes_are_kept_as_they_are(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    names = ('5" pot', "back\\slash", "Käse")
    folder = folder_of_images(tmp_path / "some", names, each=3)
    train_teacher(tmp_path / "a", changed(teacher_training, data=str(folder), updates=1))
    assert set(load_model(tmp_path / "a").labels) == set(names)


def test_a_teacher_learns(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    settings = changed(teacher_training, updates=80, learning_rate=5e-3, sample_every=20, ema=0.9)
    shares = []
    done = train_teacher(tmp_path / "a", settings, progress=lambda what, share: shares.append(share))
    assert done is not None
    assert shares == sorted(shares)
    assert shares[-1] == 1
    model = load_model(tmp_path / "a")
    assert model.labels == tuple(LABELS)
    assert model.scheduler.config.prediction_type == "v_prediction"
    assert done.held_out < 0.7  # 1 is a prediction of nothing


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_other_predictions_and_no_classes(teacher_training: TeacherTraining, tmp_path: Path, prediction: str) -> None:
    settings = changed(teacher_training, prediction_type=prediction, classes=False, updates=2)
    train_teacher(tmp_path / "a", settings)
    model = load_model(tmp_path / "a")
    assert (model.labels, model.scheduler.config.prediction_type) == ((), prediction)


def test_a_flat_folder_teaches_a_model_without_classes(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    flat = folder_of_images(tmp_path / "flat", (), each=6)
    train_teacher(tmp_path / "a", changed(teacher_training, data=str(flat), held_out=str(flat), updates=2))
    assert load_model(tmp_path / "a").conditioning.kind == "none"


@pytest.mark.long
def test_a_teacher_of_latents_and_its_student(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    autoencoder = {"latent_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4, "updates": 2, "batch": 4}
    settings = changed(teacher_training, autoencoder=autoencoder, size=32, data=None)
    big = folder_of_images(tmp_path / "big", tuple(LABELS), each=3, size=32)
    settings = changed(settings, data=str(big), held_out=str(big))
    train_teacher(tmp_path / "a", settings)
    model = load_model(tmp_path / "a")
    assert (model.space, model.sample_shape) == ("latent", (4, 16, 16))
    with Image.open(tmp_path / "a" / "samples.png") as image:
        assert image.size == (256, 256)  # four 32x32 images, enlarged four times
    mine = StudentTraining(teacher=str(tmp_path / "a"), data=str(big), held_out=str(big), updates=2, batch=4, width=8)
    train_student(tmp_path / "b", mine)
    assert load_model(tmp_path / "b").space == "latent"
    assert json.loads((tmp_path / "b" / "model_index.json").read_text()) == {
        "_class_name": "DiffusionPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["edgediff.models.spectral", "SpectralUNet2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    again = changed(settings, autoencoder=str(tmp_path / "a"))
    train_teacher(tmp_path / "c", again)
    assert load_model(tmp_path / "c").sample_shape == (4, 16, 16)


def test_parts_are_written_completely(tmp_path: Path) -> None:
    parts = {"vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), "scheduler": DDPMScheduler()}
    for name in ("vae.partial", "scheduler"):  # left by one that was killed
        (tmp_path / name).mkdir()
        (tmp_path / name / "stray.json").write_text("{}")
    save_parts(tmp_path, parts)
    assert load_autoencoder(tmp_path).config.block_out_channels == [8]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.json")} == {
        "scheduler/scheduler_config.json", "vae/config.json",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler", "vae"}


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 21, 1000])
def test_schedules_of_all_lengths_can_be_sampled(class_model: Path, steps: int) -> None:
    model = load_model(class_model)
    model = replace(model, scheduler=DDPMScheduler(num_train_timesteps=steps, prediction_type="v_prediction"))
    assert len(make_sampler(model).timesteps) == min(STEPS, steps - 1)


def test_a_conditional_unet_without_text_learns(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    unet = UNET | {"_class_name": "UNet2DConditionModel", "mid_block_type": None}
    train_teacher(tmp_path / "a", changed(teacher_training, unet=unet, updates=1))
    mine = StudentTraining(teacher=str(tmp_path / "a"), data=teacher_training.data, updates=1, batch=4, points=("out",))
    train_student(tmp_path / "b", mine)
    assert isinstance(load_model(tmp_path / "b").unet, SpectralUNet2DConditionModel)


def test_a_grid_takes_no_more_rows_at_once_than_it_may(class_model: Path) -> None:
    model = load_model(class_model)
    seen: list[int] = []
    model.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    some = draw_samples(model, 3, at_once=4)
    assert seen == [3, 3] * STEPS  # six rows, two of each image
    every = draw_samples(model, 3, at_once=100)
    assert seen[2 * STEPS :] == [6] * STEPS
    np.testing.assert_allclose(some, every, atol=1e-4)


# Order


def test_each_pass_has_each_image_once_in_a_seeded_order() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    known = {"class_labels": torch.arange(5)}
    batches = Batches(as_channels_first(images), known, seed=3)
    x, cond = batches.take(0, 10)
    labels = cond["class_labels"]
    assert sorted(labels[:5].tolist()) == sorted(labels[5:].tolist()) == list(range(5))
    assert labels[:5].tolist() != labels[5:].tolist()
    assert torch.allclose(x[:, 0, 0, 0], labels / 127.5 - 1)
    apart = [batches.take(i, 1)[1]["class_labels"].item() for i in range(10)]
    assert apart == labels.tolist()
    other = Batches(as_channels_first(images), known, seed=4).take(0, 10)[1]
    assert other["class_labels"].tolist() != apart


def test_conditioning_that_is_dropped_becomes_the_null_row() -> None:
    cond = {"class_labels": torch.arange(4), "text": torch.arange(24.0).reshape(4, 2, 3)}
    null = {"class_labels": torch.tensor(9), "text": -torch.ones(2, 3)}
    drop = torch.tensor([True, False, True, False])
    _, found = Batches(torch.zeros(4, 3, 2, 2), cond, seed=0, null=null).take(0, 4, drop=drop)
    _, kept = Batches(torch.zeros(4, 3, 2, 2), cond, seed=0).take(0, 4, drop=drop)  # there is none
    assert found["class_labels"].tolist() == torch.where(drop, 9, kept["class_labels"]).tolist()
    assert torch.equal(found["text"][drop], null["text"].expand(2, 2, 3))
    assert torch.equal(found["text"][~drop], kept["text"][~drop])
    assert torch.equal(kept["text"], cond["text"][kept["class_labels"]])


def test_mirrored_images() -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    batches = Batches(as_channels_first(images), {}, seed=0)
    plain, cond = batches.take(0, 2)
    flipped, _ = batches.take(0, 2, torch.tensor([True, False]))
    assert cond == {}
    assert torch.equal(flipped[0], plain[0].flip(2))
    assert torch.equal(flipped[1], plain[1])


def test_settings_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("teacher: grocery-32\nalpha: 0\npoints: [out]\n")
    assert load_training(tmp_path / "a.yaml", StudentTraining) == StudentTraining(
        teacher="grocery-32", alpha=0.0, points=("out",)
    )
    (tmp_path / "b.yaml").write_text("teacher: grocery-32\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: .*teacher"):
        load_training(tmp_path / "b.yaml", TeacherTraining)
    with pytest.raises(ConfigError, match=r"no recipe nothing: .*grocery-32-lite"):
        load_training("nothing", StudentTraining)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """Each is one that its command takes, and makes a UNet of the size that it speaks of."""
    if path.stem in PARAMETERS:
        settings = load_training(path.stem, TeacherTraining)
        kind, config = geometry_of(settings)
        with torch.device("meta"):
            unet = kind(**config | ({} if settings.text is None else {"in_channels": 4, "out_channels": 4}))
        assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == PARAMETERS[path.stem]
        return
    if path.stem in KINDS:  # of a model that the command names
        assert load_training(path.stem, KINDS[path.stem])
        return
    student = load_training(path.stem, StudentTraining)
    if student.teacher is None:  # of a teacher that is trained first
        return
    teacher = load_model(student.teacher)
    counts = [
        tally(split(model.unet, Cut()), model.sample_shape, model.conditioning.tensors).parts["full"].macs
        for model in (teacher, student_of(teacher, student))
    ]
    assert counts[1] <= counts[0] / 8


# Processes


@pytest.mark.long
def test_two_processes_agree(student_training: StudentTraining, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_bytes(
        msgspec.yaml.encode(changed(student_training, checkpoint_minutes=1e-9, sample_every=2))
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
              "--standalone", "-m", "edgediff", "train", "student", "--config", tmp_path / "settings.yaml",
              "-o", tmp_path / "a", "--json"]  # fmt: skip
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["updates"] == UPDATES
    card = (tmp_path / "a" / "README.md").read_text()
    assert "4 updates of 8 images" in card
    assert "2 process(es) on cpu" in card
    assert load_model(tmp_path / "a").labels == tuple(LABELS)


# The command


def test_the_command(class_model: Path, photographs: Path, tmp_path: Path, command: Command) -> None:
    options = ["--data", photographs, "--updates", 2, "--batch", 4]
    said = command("train", "student", class_model, *options, "--width", 8, "-o", tmp_path / "a", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert (found["model"], found["trained"], found["updates"]) == (str(tmp_path / "a"), True, 2)
    said = command("train", "student", class_model, *options, "--width", 8, "-o", tmp_path / "a")
    assert "nothing to do" in said.out
    said = command("train", "teacher", class_model, *options, "-o", tmp_path / "b")
    assert said.code == 0
    assert "2 updates on 28 images" in said.out
    assert load_model(tmp_path / "b").labels == tuple(LABELS)


def test_the_command_refuses(class_model: Path, photographs: Path, tmp_path: Path, command: Command) -> None:
    for arguments, words in (
        (["student", class_model], "no images: name a folder, --data DIR"),
        (["student", "--data", photographs], "no teacher"),
        (["student", "nowhere", "--data", photographs], "no model at nowhere"),
        (["student", class_model, "--data", photographs, "--wavelet", "x"], "wavelet 'x' is unknown"),
        (["teacher", "--data", photographs], "no UNet: name a model"),
        (["teacher", class_model, "--data", tmp_path / "none"], "no such folder"),
    ):
        assert_error(command("train", *arguments, "-o", tmp_path / "a"), words)
        assert not (tmp_path / "a").exists()


@pytest.mark.long
def test_seeds_draw_otherwise(student_training: StudentTraining, tmp_path: Path, loops: list[Any]) -> None:
    """Weights, order and noise: torch's own generator on the CPU takes 32 bits of a seed."""
    for seed in (0, 1, 2):
        train_student(tmp_path / str(seed), changed(student_training, seed=seed, updates=1))
    batches = [loop.task.draw(loop.task.data, 0, 4, 1) for loop in loops]
    for name in ("x_0", "t", "x_t"):
        assert not any(torch.equal(batches[i][name], batches[j][name]) for i, j in ((0, 1), (0, 2), (1, 2)))
