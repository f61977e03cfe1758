import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import unchanged
from conftest import DDPM, LABELS, SMALL, SMALL_CLASS, save_model
from diffusers import AutoencoderKL
from model_folders import SCHEDULER, change_json
from photographs import folder_of_images
from PIL import Image
from safetensors import SafetensorError
from trainings import UNET, changed, refused, resumes, same
from unets import unet2d, unet2d_condition

from edgediff.errors import ConfigError, DataError, EdgediffError, ModelError, TargetError, UnsupportedError
from edgediff.models.spectral import SpectralUNet2DModel
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.settings import StudentTraining, TeacherTraining, training_from
from edgediff.train.student import train_student
from edgediff.train.teacher import train_teacher

KL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
pytestmark = pytest.mark.usefixtures("few_samples")


# Interruptions


@pytest.mark.parametrize(
    "kind", ["teacher", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("student", "teacher with dropout"))]
)
def test_an_interrupted_training_ends_with_the_same_weights(
    kind: str, student_training: StudentTraining, teacher_training: TeacherTraining, tmp_path: Path
) -> None:
    settings: Any = changed(
        student_training if kind == "student" else teacher_training, checkpoint_minutes=1e-9, sample_every=2
    )
    if kind == "teacher with dropout":
        settings = changed(settings, unet=UNET | {"dropout": 0.5})
    train: Any = train_student if kind == "student" else train_teacher
    torch.manual_seed(7)
    expected = torch.random.get_rng_state()
    train(tmp_path / "whole", settings)
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.manual_seed(8)

    def stop(what: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", settings, progress=stop)
    assert [path.name for path in (tmp_path / "a" / CHECKPOINTS).iterdir()] == ["visit-00000002"]
    assert train(tmp_path / "a", settings) is not None
    assert same(tmp_path / "a", tmp_path / "whole")
    assert not (tmp_path / "a" / CHECKPOINTS).exists()
    assert train(tmp_path / "a", settings) is None


@pytest.mark.long
def test_a_killed_training_resumes(class_model: Path, photographs: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "edgediff", "train", "student", str(class_model), "--data", str(photographs), "--width",
        "8", "--batch", "2", "--updates", "20", "-o", str(tmp_path / "a"), "--config", str(tmp_path / "often.yaml"),
    ]  # fmt: skip
    (tmp_path / "often.yaml").write_text("checkpoint_minutes: 1.0e-9\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "a" / CHECKPOINTS).glob("visit-0000000[3-9]")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    settings = StudentTraining(
        teacher=str(class_model), data=str(photographs), width=8, batch=2, updates=20, checkpoint_minutes=1e-9
    )
    train_student(tmp_path / "whole", settings)
    assert same(tmp_path / "a", tmp_path / "whole")


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    student_training: StudentTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path) -> None:
        Path(folder).mkdir()
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SpectralUNet2DModel, "save_pretrained", full)
        with pytest.raises(TargetError, match=r"No space left on device; the last good checkpoint is .*visit-00000004"):
            train_student(tmp_path / "a", student_training)
    resumes(tmp_path, student_training)


# Bad input


def test_another_training_is_refused(student_training: StudentTraining, photographs: Path, tmp_path: Path) -> None:
    train_student(tmp_path / "a", student_training)
    other = folder_of_images(tmp_path / "other", tuple(LABELS), each=8, seed=1)
    with unchanged(tmp_path / "a"):
        for changes, words in (
            ({"width": None}, "width 8, not None"),
            ({"alpha": 0.0}, r"alpha -1\.0, not 0\.0"),
            ({"data": str(other)}, "other images, other held-out images"),
        ):
            with pytest.raises(TargetError, match=f"contains a training with {words}; choose another folder"):
                train_student(tmp_path / "a", changed(student_training, **changes))
        assert train_student(tmp_path / "a", changed(student_training, checkpoint_minutes=1.0)) is None


def test_another_geometry_or_autoencoder_under_the_same_name_is_refused(
    teacher_training: TeacherTraining, photographs: Path, tmp_path: Path
) -> None:
    geometry = save_model(unet2d(**SMALL_CLASS), tmp_path / "geometry")
    settings = changed(teacher_training, model=str(geometry), unet=None, size=16)
    train_teacher(tmp_path / "a", settings)
    change_json(geometry / "unet" / "config.json", dropout=0.25)
    with pytest.raises(TargetError, match="contains a training with another geometry; choose another folder"):
        train_teacher(tmp_path / "a", settings)
    vae = AutoencoderKL(**KL)
    vae.save_pretrained(tmp_path / "vae")
    latent = changed(teacher_training, autoencoder=str(tmp_path / "vae"), size=16)
    train_teacher(tmp_path / "b", latent)
    mine = changed(StudentTraining(), teacher=str(tmp_path / "b"), data=str(photographs), updates=1, batch=4, width=8)
    train_student(tmp_path / "c", mine)
    # Where the teacher is named by its UNet's folder, the autoencoder lies beside that.
    assert train_student(tmp_path / "d", changed(mine, teacher=str(tmp_path / "b" / "unet"))) is not None
    with torch.no_grad():
        vae.decoder.conv_in.bias.add_(1)
    for folder in (tmp_path / "vae", tmp_path / "b" / "vae"):
        vae.save_pretrained(folder)
    with pytest.raises(TargetError, match="contains a training with another autoencoder; choose another folder"):
        train_teacher(tmp_path / "b", latent)
    with pytest.raises(TargetError, match="contains a training with another autoencoder; choose another folder"):
        train_student(tmp_path / "c", mine)


def test_teachers_that_do_not_fit(
    class_model: Path, text_model: Path, student_training: StudentTraining, tmp_path: Path
) -> None:
    refused(tmp_path, changed(student_training, teacher=None), ConfigError, "no teacher: name")
    refused(tmp_path, changed(student_training, teacher="ddpm-cifar10"), ConfigError, "geometry without weights")
    refused(
        tmp_path, changed(student_training, teacher=str(text_model)), EdgediffError, "conditioned on text|config.json"
    )
    grey = save_model(unet2d(in_channels=1, out_channels=1, num_class_embeds=5), tmp_path / "grey")
    (grey / "classes.json").write_text(json.dumps(LABELS))
    refused(
        tmp_path,
        changed(student_training, teacher=str(grey), student=str(class_model), width=None),
        ConfigError,
        "the teacher grey has in_channels 1, the student 3; out_channels 1, the student 3: expected the same",
    )
    epsilon = save_model(
        unet2d(**SMALL, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=5),
        tmp_path / "epsilon",
        DDPM | {"prediction_type": "epsilon"},
    )
    (epsilon / "classes.json").write_text(json.dumps(LABELS))
    refused(
        tmp_path,
        changed(student_training, teacher=str(epsilon), student=str(class_model), width=None),
        ConfigError,
        "the teacher epsilon has prediction_type epsilon, the student v_prediction: expected the same",
    )
    other = shutil.copytree(class_model, tmp_path / "other")
    (other / "classes.json").write_text(json.dumps(LABELS[::-1]))
    change_json(other / SCHEDULER, beta_schedule="linear")
    refused(
        tmp_path,
        changed(student_training, student=str(other), width=None),
        ConfigError,
        "has other classes than the student; another noise schedule than the student: expected the same",
    )
    variance = save_model(unet2d(**SMALL_CLASS, out_channels=6), tmp_path / "variance")
    (variance / "classes.json").write_text(json.dumps(LABELS))
    refused(
        tmp_path,
        changed(student_training, teacher=str(variance)),
        UnsupportedError,
        "takes 3 channels and gives 6, a learned variance beside the prediction",
    )


def test_images_that_do_not_fit(
    student_training: StudentTraining, teacher_training: TeacherTraining, tmp_path: Path
) -> None:
    refused(tmp_path, changed(student_training, data=None), ConfigError, "no images: name a folder")
    refused(tmp_path, changed(student_training, data=str(tmp_path / "none")), DataError, "no such folder")
    strange = folder_of_images(tmp_path / "strange", ("Apple", "Quince"), each=3)
    refused(
        tmp_path,
        changed(student_training, data=str(strange)),
        DataError,
        "class 'Quince' is not one of the model's; choices",
    )
    flat = folder_of_images(tmp_path / "flat", (), each=4)
    refused(tmp_path, changed(student_training, data=str(flat)), DataError, "the folder has no classes")
    refused(tmp_path, changed(teacher_training, held_out=str(strange)), DataError, "has classes that .* lacks: Quince")
    single = folder_of_images(tmp_path / "single", ("Apple", "Kiwi"), each=1)
    refused(tmp_path, changed(teacher_training, data=str(single)), DataError, "has one image of each class")
    (strange / "Empty").mkdir()
    refused(tmp_path, changed(teacher_training, data=str(strange)), DataError, "no images in .*Empty")


def test_broken_images_are_skipped_and_counted(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "some", tuple(LABELS), each=5)
    (folder / "Apple" / "broken.png").write_bytes(b"nothing")
    Image.new("RGB", (4, 4)).save(folder / "Kiwi" / "tiny.png")
    done = train_teacher(tmp_path / "a", changed(teacher_training, data=str(folder), updates=1))
    assert done is not None
    assert done.skipped.startswith("2 images skipped: ")
    assert done.skipped in (tmp_path / "a" / "README.md").read_text()


def test_geometries_that_do_not_fit(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    refused(tmp_path, changed(teacher_training, model="grocery-32"), ConfigError, "'model' and 'unet' were given")
    refused(tmp_path, changed(teacher_training, unet=None), ConfigError, "no UNet: name a model to train further")
    refused(tmp_path, changed(teacher_training, unet={"_class_name": "VQModel"}), ConfigError, "choices: UNet2DModel")
    refused(tmp_path, changed(teacher_training, size=15), EdgediffError, "15x15 cannot be cut: the levels divide by 2")
    text = {key: value for key, value in unet2d_condition().config.items() if not key.startswith("_")}
    cross = text | {"_class_name": "UNet2DConditionModel"}
    refused(tmp_path, changed(teacher_training, unet=cross), ConfigError, "is conditioned on text")
    coarse = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}
    refused(
        tmp_path,
        changed(teacher_training, autoencoder=coarse, size=18),
        ConfigError,
        "'size' is 18; expected a multiple of 4",
    )
    refused(tmp_path, changed(teacher_training, autoencoder="nowhere"), ModelError, "nowhere")
    refused(tmp_path, changed(teacher_training, autoencoder={"widths": 3}), ConfigError, "widths")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": ["UNet2DModel"]}, r"_class_name \['UNet2DModel'\]; choices: UNet2DModel"),
        ({"down_block_types": ["Nothing"]}, "geometry does not make a UNet2DModel"),
        ({"down_block_types": [3, None]}, "geometry does not make a UNet2DModel"),
        ({"time_embedding_type": "x"}, "geometry does not make a UNet2DModel"),
        ({"mid_block_scale_factor": "x"}, "geometry cannot run at 16x16"),
        ({"time_embedding_type": "fourier"}, "NaN or infinity at time step 0"),
        ({"sample_size": [16, 8]}, r"sample_size \[16, 8\]"),
        ({"sample_size": [[16], 16]}, r"sample_size \[\[16\], 16\]"),
        ({"sample_size": 10**10}, "sample_size 10000000000"),
        (
            {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
            "1 level, choices: none",
        ),
    ],
)
def test_settings_of_a_geometry_that_do_not_fit(
    teacher_training: TeacherTraining, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    refused(tmp_path, changed(teacher_training, unet=UNET | settings), EdgediffError, words)


def test_a_schedule_that_cannot_be_sampled(teacher_training: TeacherTraining, tmp_path: Path) -> None:
    """Found out before the training, not at its first sample grid."""
    unsampled = save_model(unet2d(**SMALL_CLASS), tmp_path / "unsampled", DDPM | {"thresholding": True})
    (unsampled / "classes.json").write_text(json.dumps(LABELS))
    mine = StudentTraining(teacher=str(unsampled), data=teacher_training.data, updates=1, batch=4)
    refused(tmp_path, mine, EdgediffError, "scheduler thresholding True")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alhpa": -1}, "unknown.*alhpa.*alpha"),
        ({"wavelet": "bior2.2"}, "wavelet 'bior2.2' is unknown; choices: haar, db1 to db38"),
        ({"width": 12}, "width 12; expected a multiple of 8"),
        ({"width": [8, 10**9]}, "'width' is 1000000000; expected at most"),
        ({"alpha": float("nan")}, "'alpha' is nan"),
        ({"spatial": -1}, "'spatial' is -1.0; expected 0 or more"),
        ({"points": []}, "'points' is"),
        ({"points": ["out", "out"]}, "'points' is"),
        ({"points": ["top"]}, "points"),
        ({"updates": 0}, "'updates' is 0"),
        ({"updates": 10**20}, "'updates' is 1.*; expected at most"),
        ({"updates": float("inf")}, "'updates'"),
        ({"batch": 10**10}, "'batch' is 1.*; expected at most"),
        ({"ema": 1.0}, "'ema' is 1.0"),
        ({"learning_rate": float("inf")}, "'learning_rate' is inf"),
        ({"precision": "fp8"}, "precision"),
        ({"seed": -1}, "'seed' is -1"),
        ({"data": "\udce9"}, r"'data' is \\udce9, which is not UTF-8; rename it"),
        ({"student": "x", "width": 8}, "leave one out"),
    ],
)
def test_settings_that_do_not_fit(
    class_model: Path, photographs: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    asked = {"teacher": str(class_model), "data": str(photographs)} | settings
    with pytest.raises(ConfigError, match=words):
        train_student(tmp_path / "a", training_from(asked, StudentTraining))
    assert not (tmp_path / "a").exists()
