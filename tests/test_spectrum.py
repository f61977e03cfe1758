"""``edgediff evaluate spectrum``: the numbers and the page, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command, assert_error, exit_code, unchanged
from conftest import DDPM, LABELS, save_model
from model_folders import change_json
from PIL import Image
from tiny_photographs import SIZE, make_photographs, write_photographs
from unets import unet2d

from edgediff.errors import ConfigError
from edgediff.evaluate.charts import draw_overview
from edgediff.evaluate.frequency import bands
from edgediff.evaluate.processes import CPU, Processes
from edgediff.evaluate.spectrum import evaluate_spectrum, spread_times
from edgediff.models.spectral import spectralize

ASKED: dict[str, Any] = {"num_images": 9, "steps": 2, "batch": 5, "seed": 3}
BANDS = int(bands(SIZE, SIZE).max()) + 1


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(make_photographs((4, 3, 3, 2)), tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wavelet-gated model of the class model's kind."""
    torch.manual_seed(0)
    unet = spectralize(unet2d(block_out_channels=(8, 16, 24), num_class_embeds=5))
    folder = save_model(unet, tmp_path_factory.mktemp("models") / "tiny-gated")
    (folder / "classes.json").write_text(json.dumps(LABELS))
    return folder


def test_a_model_is_measured_by_frequency(class_model: Path, images: Path) -> None:
    told: list[str] = []
    found = evaluate_spectrum(class_model, images, progress=told.append, **ASKED)
    report = found.report
    assert (report.num_images, report.available, report.denoising.num_images) == (9, 12, 9)
    assert (report.teacher, report.gates, report.denoising.teacher_gap, report.skipped) == (None, None, None, "")
    assert report.denoising.timesteps == (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
    for rows in (report.denoising.error, report.denoising.response, report.denoising.wiener):
        assert {len(row) for row in rows} == {BANDS}
        assert len(rows) == 10
    spectra = report.spectra
    assert len(spectra.generated) == len(spectra.photographs) == len(spectra.gap) == BANDS
    assert spectra.error == pytest.approx(np.abs(spectra.gap[1:]).mean())
    assert spectra.error_top == pytest.approx(np.abs(spectra.gap[3:]).mean())
    assert "drawing images: 5 of 9" in told
    assert "step 10 of 10: photographs noised to t = 950" in told
    # Untrained: far from Wiener's gain.
    assert report.denoising.response_error > 0.1
    again = evaluate_spectrum(class_model, images, **ASKED | {"batch": 9}).report
    np.testing.assert_allclose(again.denoising.error, report.denoising.error, rtol=1e-3)


def test_a_model_has_no_gap_to_itself_and_gates_are_reported(class_model: Path, gated: Path, images: Path) -> None:
    own = evaluate_spectrum(gated, images, teacher=gated, **ASKED).report
    assert np.max(own.denoising.teacher_gap) < 1e-9
    found = evaluate_spectrum(gated, images, teacher=class_model, **ASKED).report
    assert found.teacher == "tiny-class"
    assert np.min(found.denoising.teacher_gap) > 1e-9
    assert found.gates is not None
    assert [curves.module for curves in found.gates] == [
        "down_blocks.0.downsamplers.0.gate",
        "down_blocks.1.downsamplers.0.gate",
        "up_blocks.0.upsamplers.0.gate",
        "up_blocks.1.upsamplers.0.gate",
    ]
    for curves in found.gates:
        for band in ("LL", "LH", "HL", "HH"):
            values = getattr(curves, band)
            assert len(values) == 10
            assert 0 < min(values) < max(values) < 1


def test_spectrum_on_the_command_line(
    class_model: Path, gated: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    asked = ("--images", images, "--num-images", 8, "--steps", 2, "-o", tmp_path / "out")
    said = command("evaluate", "spectrum", gated, "--teacher", class_model, *asked, "--json")
    assert (said.code, said.errors) == (0, [])
    data = json.loads(said.out)
    stored = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert {name: value for name, value in data.items() if name != "files"} == stored
    assert {*stored} == {
        "model", "teacher", "size", "num_images", "available", "scheduler", "num_inference_steps", "guidance_scale",
        "seed", "spectra", "denoising", "gates", "skipped",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["spectrum.json", "spectrum.png"]
    with Image.open(data["files"]["overview"]) as picture:
        assert picture.width > 2000
    with unchanged(images):
        said = command("evaluate", "spectrum", class_model, *asked)
    assert (said.code, said.errors) == (0, [])
    for words in ("tiny-class by frequency: 8 images, 2 steps", "log10", "t = 50", "t = 950", "picture:"):
        assert words in " ".join(said.out.split()), words
    assert json.loads((tmp_path / "out" / "spectrum.json").read_text())["gates"] is None


def test_a_schedule_is_spread_evenly() -> None:
    assert spread_times(1000) == (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
    assert spread_times(3) == (0, 1, 2)


def test_a_schedule_of_one_time_step_is_drawn_too(images: Path, tmp_path: Path) -> None:
    folder = save_model(unet2d(), tmp_path / "short", DDPM | {"num_train_timesteps": 1})
    found = evaluate_spectrum(folder, images, **ASKED | {"steps": 1})
    assert found.report.denoising.timesteps == (0,)
    with Image.open(found.write(tmp_path)["overview"]) as picture:
        assert picture.width > 1500


def test_many_gates_have_lines_of_their_own(images: Path, tmp_path: Path) -> None:
    levels = {
        "block_out_channels": (8, 8, 8, 8, 8),
        "down_block_types": ("DownBlock2D",) * 5,
        "up_block_types": ("UpBlock2D",) * 5,
    }
    folder = save_model(spectralize(unet2d(**levels)), tmp_path / "deep")
    found = evaluate_spectrum(folder, images, **ASKED)
    assert found.report.gates is not None
    assert len(found.report.gates) == 8
    draw_overview(found.report, found.generated, found.photographs, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.height > picture.width * 0.8


# What goes wrong


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--num-images": 3}, ("num_images is 3", "4 or more")),
        ({"--batch": 0}, ("batch is 0",)),
        ({"--steps": 0}, ("steps",)),
        ({"--seed": -1}, ("seed",)),
        ({"--guidance-scale": "inf"}, ("guidance_scale is inf",)),
        ({"--scheduler": "plms"}, ("scheduler 'plms': expected one of",)),
        ({"--teacher": "nothing-here"}, ("no model at nothing-here",)),
        ({"--teacher": "grocery-32"}, ("teacher grocery-32 has samples 3x32x32, tiny-class 3x16x16",)),
        ({"--teacher": "ddpm-cifar10"}, ("ddpm-cifar10 is a geometry without weights",)),
        ({"-o": __file__}, ("is not a directory",)),
        ({"-o": f"{__file__}/below"}, ("cannot write",)),
    ],
)
def test_bad_requests_are_one_line(
    class_model: Path, images: Path, command: Command, tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    options = {"--images": images, "--num-images": 4, "--steps": 2, "-o": tmp_path / "out"} | change
    given = [each for option, value in options.items() for each in (option, value)]
    assert_error(command("evaluate", "spectrum", class_model, *given), *parts)
    assert not (tmp_path / "out").exists()


def test_models_and_folders_that_do_not_fit(
    class_model: Path, images: Path, folder: Path, tmp_path: Path, command: Command
) -> None:
    def say(model: object, *more: object, images: Path = images) -> Any:
        return command("evaluate", "spectrum", model, "--images", images, "-o", tmp_path / "out", *more)

    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert_error(say(tmp_path / "bundle"), "bundle is a bundle; expected the model that it was made of")
    assert_error(say(class_model, "--teacher", tmp_path / "bundle"), "bundle is a bundle; expected the model")
    grey = save_model(unet2d(in_channels=1, out_channels=1), tmp_path / "grey")
    assert_error(say(grey), "grey makes 1x16x16; expected square images of 3 channels")
    assert_error(say(class_model, "--teacher", grey), "grey makes 1x16x16")
    other = save_model(unet2d(), tmp_path / "other", DDPM | {"prediction_type": "epsilon"})
    assert_error(say(class_model, "--teacher", other), "prediction_type epsilon, tiny-class v_prediction")
    change_json(folder / "scheduler" / "scheduler_config.json")
    (folder / "classes.json").write_text(json.dumps(["Apple", "Banana", "Kiwi", "Plum"]))
    assert_error(say(class_model, "--teacher", folder), "model: the folder's class 'Orange' is not one of the model's")
    few = write_photographs(make_photographs((1, 1, 1, 0)), tmp_path / "few")
    assert_error(say(class_model, images=few), "has 3 images; expected 4 or more")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert_error(say(folder), "has no scheduler")


def test_skipped_files_are_reported(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_model(unet2d(), tmp_path / "plain")
    photographs = write_photographs(make_photographs(), tmp_path / "photographs")
    (photographs / "Kiwi" / "broken.png").write_text("no image")
    args = ("evaluate", "spectrum", plain, "--images", photographs, "-o", tmp_path / "out", "--num-images", 4,
            "--steps", 2)  # fmt: skip
    assert exit_code(monkeypatch, *args) == 0
    assert "1 image skipped: 1 cannot be read (Kiwi/broken.png)" in capsys.readouterr().err


def test_several_processes_are_refused(class_model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "launched", classmethod(lambda cls: cls(1, 2, CPU)))
    with pytest.raises(ConfigError, match="runs on one process, not on 2"):
        evaluate_spectrum(class_model, images, **ASKED)


def test_pictures_need_their_extra(
    class_model: Path, images: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        said = [
            command("evaluate", "spectrum", class_model, "--images", images, "-o", tmp_path / "out"),
            command("evaluate", "distance", class_model, "--images", images, "--train", images, "--grid",
                    tmp_path / "a.png"),
        ]  # fmt: skip
    assert_error(said[0], "drawing spectra needs the 'train' extra")
    assert_error(said[1], "the grid needs the 'train' extra")
