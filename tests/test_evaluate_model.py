"""``edgediff evaluate distance`` of a model: training photographs, photographs held out, and copies."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command, assert_error, exit_code, process
from conftest import save_model
from model_folders import change_config
from PIL import Image
from rich.console import Console
from tiny_photographs import SIZE, make_photographs, write_classifier, write_photographs
from unets import unet2d

from edgediff import load_model
from edgediff.cli.render.evaluate_tables import distance_tables, spectrum_tables
from edgediff.data.image_folder import read_images, shuffled
from edgediff.errors import ConfigError
from edgediff.evaluate.distance import evaluate_distance
from edgediff.evaluate.processes import LAUNCHED, Processes
from edgediff.evaluate.report import Evaluation
from edgediff.evaluate.sampler import Sampler, sample_bundle, sample_model
from edgediff.evaluate.spectrum import evaluate_spectrum
from edgediff.models.spectral import spectralize

ASKED: dict[str, Any] = {"num_images": 11, "steps": 2, "batch": 4, "seed": 3}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(make_photographs(), tmp_path_factory.mktemp("photographs") / "train")


@pytest.fixture(scope="module")
def test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs held out."""
    return write_photographs(make_photographs((4, 3, 2, 1), seed=9), tmp_path_factory.mktemp("photographs") / "test")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(make_photographs(), tmp_path_factory.mktemp("features") / "tiny")


def evaluated(source: Path, test: Path, classifier: Path, **rest: Any) -> Evaluation:
    found = evaluate_distance(source, test, features=classifier, **ASKED | rest)
    assert found is not None
    return found


# What is generated


def test_a_model_makes_what_its_bundle_makes(class_model: Path, class_bundle: Path) -> None:
    classes = np.array([3, 0, 1])
    samplers = sample_bundle(class_bundle), sample_model(load_model(class_model))
    assert [sampler.clocks for sampler in samplers] == [("1", "2"), ("1",)]
    options: dict[str, Any] = {"mask": (True,) * 3, "classes": classes, "guidance_scale": 2.0, "seed": 7}
    bundled, plain = (sampler.draw(range(3), **options) for sampler in samplers)
    assert np.abs(bundled.astype(int) - plain).max() <= 1
    assert np.abs(plain.astype(int) - samplers[1].draw([2], **options)).max() > 20


@pytest.mark.parametrize("takes_time", [False, True])
def test_gated_and_unconditional_models_are_sampled_too(tmp_path: Path, takes_time: bool) -> None:
    torch.manual_seed(0)
    unet = spectralize(unet2d(block_out_channels=(8, 16, 24)), gate_takes_time=takes_time)
    folder = save_model(unet, tmp_path / "gated")
    sampler = sample_model(load_model(folder), "ddim")
    assert (sampler.labels, sampler.guidance_scale, sampler.scheduler_name) == (None, 1.0, "ddim")
    images = sampler.draw([0, 1], (True, True), classes=None, guidance_scale=1.0, seed=0)
    assert images.shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize(("where", "error"), [("Request", MemoryError), ("denoise", torch.OutOfMemoryError)])
def test_a_batch_that_is_too_large_is_one_line(
    class_model: Path, train: Path, classifier: Path, command: Command, monkeypatch: pytest.MonkeyPatch, where: str,
    error: type[Exception],
) -> None:  # fmt: skip
    def exhaust(*given: Any, **named: Any) -> None:
        raise error("out of memory")

    monkeypatch.setattr(f"edgediff.evaluate.sampler.{where}", exhaust)
    said = command("evaluate", "distance", class_model, "--images", train, "--features", classifier, "--batch", 7)
    assert_error(said, "batch of 7 images", "give a smaller --batch")


# With training photographs


def test_a_model_is_compared_with_photographs_held_out(
    class_model: Path, train: Path, test: Path, classifier: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    found = evaluated(class_model, test, classifier, train=train, grid=tmp_path / "g.png", progress=told.append)
    assert (found.num_images, found.num_reference, found.num_floor, found.num_equal) == (11, 10, 10, 10)
    assert (found.available, found.processes, found.backend, found.scheduler) == (10, 1, "torch", "dpmpp_2m")
    assert found.accuracy == 1
    (row,) = found.rows
    assert (row.clock, row.mask) == ("1", (1, 1))
    assert row.closeness is not None
    assert found.yardstick is not None
    assert found.yardstick.available == 40
    # Noise is farther from the training photographs than photographs held out are.
    assert row.closeness.median > found.yardstick.held_out.quantile_5 > found.yardstick.threshold > 0
    assert row.closeness.share_nearer == 0
    assert [each.distance for each in row.suspects] == sorted(each.distance for each in row.suspects)
    assert len(row.suspects) == 8
    assert "drawing with clock 1: 11 of 11 images" in told
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width == 1350


def test_a_model_that_repeats_its_training_photographs_is_found(
    class_model: Path, train: Path, test: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = read_images(train, SIZE).images
    monkeypatch.setattr(
        Sampler, "draw", lambda self, numbers, mask, **rest: np.flip(copies[np.asarray(numbers)], 2).copy()
    )
    found = evaluated(class_model, test, classifier, train=train)
    assert found.rows[0].closeness is not None
    assert found.rows[0].closeness.share_nearer == 1
    assert found.rows[0].closeness.median == 0
    assert {each.neighbour for each in found.rows[0].suspects} <= {*range(11)}
    assert all(each.mirrored for each in found.rows[0].suspects)


def test_the_number_of_images_is_free_and_classes_are_the_training_ones(
    class_model: Path, train: Path, test: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    draw = Sampler.draw

    def listen(self: Sampler, numbers: Any, mask: tuple[bool, ...], *, classes: Any, **rest: Any) -> np.ndarray:
        drawn.append(classes[np.asarray(numbers)])
        return draw(self, numbers, mask, classes=classes, **rest)

    monkeypatch.setattr(Sampler, "draw", listen)
    found = evaluated(class_model, test, classifier, train=train, num_images=45, steps=1)
    assert (found.num_images, found.num_equal) == (45, 10)
    labels = read_images(train, SIZE).labels[shuffled(40, 3)]
    assert np.concatenate(drawn).tolist() == [*labels, *labels[:5]]


def test_a_bundle_has_the_same_yardstick(
    class_model: Path, class_bundle: Path, train: Path, test: Path, classifier: Path
) -> None:
    one, other = (evaluated(each, test, classifier, train=train) for each in (class_model, class_bundle))
    assert (one.floor, one.num_equal) == (other.floor, other.num_equal)
    assert one.yardstick == other.yardstick is not None
    assert [row.clock for row in other.rows] == ["1", "2"]
    for name in ("kernel_distance", "frechet_distance", "spectrum_error_top"):
        values = [getattr(each.rows[0].distances, name) for each in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-2), name


def test_a_folder_without_classes_serves_an_unconditional_model(tmp_path: Path, classifier: Path) -> None:
    folder = save_model(unet2d(), tmp_path / "plain")
    for name, seed in (("train", 1), ("test", 2)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(make_photographs((2, 2, 1, 1), seed).images):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    (tmp_path / "test" / "broken.png").write_text("no image")
    found = evaluated(folder, tmp_path / "test", classifier, train=tmp_path / "train", num_images=4)
    assert found.accuracy is None
    assert found.num_equal == 4
    assert "1 image skipped: 1 cannot be read (broken.png)" in found.skipped


# Several processes


@pytest.mark.long
def test_two_processes_find_what_one_does(class_model: Path, train: Path, test: Path, classifier: Path) -> None:
    one = evaluated(class_model, test, classifier, train=train)
    given = ["evaluate", "distance", class_model, "--images", test, "--train", train, "--features", classifier,
             "--num-images", 11, "--steps", 2, "--batch", 4, "--seed", 3, "--json"]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
              "--standalone", "-m", "edgediff", *map(str, given)]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data.pop("processes") == 2
    expected = json.loads(json.dumps(one.to_dict()))
    assert expected.pop("processes") == 1
    assert data == expected
    assert "of the first of 2 processes" in done.stderr


def test_accelerate_is_needed_only_for_launched_processes(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert Processes.launched().count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = command("evaluate", "distance", "grocery-32", "--images", "nowhere")
    assert_error(said, "an evaluation on several processes needs the 'train' extra")


@pytest.mark.long
def test_an_environment_that_is_no_launchers_is_one_line(
    class_model: Path, test: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    given = ("evaluate", "distance", class_model, "--images", test, "--features", classifier)
    # A process of its own: accelerate keeps its state.
    assert_error(process(*given, env=os.environ | {"WORLD_SIZE": "2"}), "has WORLD_SIZE=2", "torchrun, or unset")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    assert_error(command(*given), "has ACCELERATE_USE_CPU=maybe", "torchrun, or unset")


# What goes wrong


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--images": "nowhere"}, ("no images at nowhere", "no such folder")),
        ({"--train": "nowhere"}, ("no images at nowhere", "no such folder")),
        ({"--clock": 2}, ("clock 2: a model is sampled with every step full",)),
        ({"--backend": "onnxruntime"}, ("'onnxruntime' is for bundles",)),
        ({"--backend": "abacus"}, ("no backend 'abacus'",)),
        ({"--scheduler": "plms"}, ("scheduler 'plms': expected one of",)),
        ({"--guidance-scale": "nan"}, ("guidance_scale is nan",)),
        ({"--guidance-scale": 0}, ("guidance_scale is 0",)),
        ({"--seed": -1}, ("seed",)),
        ({"--steps": 0}, ("steps",)),
        ({"--num-images": 3}, ("num_images is 3",)),
        ({"--features": None}, ("no built-in classifier knows these 4 classes at 16x16", "--features")),
        ({"--grid": "out.jpg"}, ("ends in .png",)),
        ({"--grid": "nowhere/out.png"}, ("cannot write", "nowhere")),
        ({"--num-images": 10**13}, ("num_images is 10000000000000", "up to 1000000")),
        ({"--batch": 0}, ("batch is 0",)),
    ],
)
def test_bad_requests_are_one_line(
    class_model: Path, train: Path, test: Path, classifier: Path, command: Command, change: dict[str, Any],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    options = {"--images": test, "--train": train, "--features": classifier, "--steps": 2, "--num-images": 4} | change
    given = [each for option, value in options.items() if value is not None for each in (option, value)]
    assert_error(command("evaluate", "distance", class_model, *given), *parts)


def test_folders_and_sources_that_do_not_fit(
    class_model: Path, class_bundle: Path, text_model: Path, train: Path, test: Path, classifier: Path, folder: Path,
    tmp_path: Path, command: Command,
) -> None:  # fmt: skip
    def say(source: object, *more: object, images: Path = test) -> Any:
        return command("evaluate", "distance", source, "--images", images, "--features", classifier, *more)

    assert_error(say(class_model, "--train", test), "is also the folder of the training photographs")
    assert_error(say(class_model, "--grid", tmp_path / "a.png"), "name their folder: --train DIR")
    assert_error(say(class_bundle, "--scheduler", "ddim"), "a bundle has its own")
    assert_error(say("nothing-here"), "no model at nothing-here")
    assert_error(say("ddpm-cifar10"), "ddpm-cifar10 is a geometry without weights")
    assert_error(say("ldm-ffhq"), "works on latents and has no decoder")
    assert_error(say(text_model), "tiny-text is conditioned on text")
    strange = write_photographs(make_photographs(), tmp_path / "strange")
    (strange / "Kiwi").rename(strange / "Plum")
    assert_error(say(class_model, images=strange), "class 'Plum' is not one of the model's")
    assert_error(say(class_model, "--train", strange), "class 'Plum' is not one of the model's")
    small = write_photographs(make_photographs(size=8), tmp_path / "small")
    assert_error(say(class_model, images=small), "no images left in", "smaller than 16x16")
    few = write_photographs(make_photographs((1, 1, 1, 0)), tmp_path / "few")
    assert_error(say(class_model, images=few), "has 3 images; expected 8 or more")
    assert_error(say(class_model, "--train", few), "has 3 images; expected 4 or more")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, image in enumerate(make_photographs().images):
        Image.fromarray(image).save(flat / f"{i}.png")
    assert_error(say(class_model, images=flat), "the folder has no classes")
    change_config(folder, out_channels=6)
    assert_error(say(folder), "do not fit")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert_error(say(folder), "do not fit")


def test_guidance_needs_a_null_class(tmp_path: Path) -> None:
    sampler = sample_model(load_model(save_model(unet2d(num_class_embeds=4), tmp_path / "no-null")))
    assert sampler.guidance_scale == 1
    with pytest.raises(ConfigError, match="needs a null class"):
        sampler.check("1", 2, 2.0, 0)


def test_tables_for_people(
    class_model: Path, train: Path, test: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = exit_code(monkeypatch, "evaluate", "distance", class_model, "--images", test, "--train", train,
                     "--features", classifier, "--steps", 2, "--num-images", 11)  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0
    for words in (
        "11 images against 10 photographs held out, 2 steps of dpmpp_2m, guidance 2, torch",
        "photographs: 10 of the 40 training ones; the classifier names 100.0% of those held out",
        "Frechet, precision and recall of 10 images a set",
        "distance to the nearest of 40 training photographs",
    ):
        assert words in shown, (words, shown)
    assert "ratio to" not in shown


@pytest.mark.parametrize("width", [1, 7])
def test_narrow_terminals_end_no_command(
    class_model: Path, train: Path, test: Path, classifier: Path, width: int
) -> None:
    distance = evaluated(class_model, test, classifier, train=train)
    spectrum = evaluate_spectrum(class_model, test, num_images=4, steps=1).report
    for table in (*distance_tables(distance), *spectrum_tables(spectrum)):
        shown = io.StringIO()
        Console(file=shown, width=width).print(table)
        assert len(shown.getvalue().splitlines()) > len(table.rows)
