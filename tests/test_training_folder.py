"""The folder of a training: what is refused there, and that nothing is lost by it."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import unchanged
from trainings import changed

from edgediff.errors import TargetError
from edgediff.models.load import load_model
from edgediff.train.adaptor import train_adaptor
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.settings import AdaptorTraining, StudentTraining, TeacherTraining
from edgediff.train.student import train_student
from edgediff.train.teacher import train_teacher

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.mark.parametrize("kind", ["student", "teacher", "adaptor"])
def test_two_trainings_in_one_folder(
    kind: str, student_training: StudentTraining, teacher_training: TeacherTraining, class_model: Path, tmp_path: Path
) -> None:
    settings, train, bad = {
        "student": (student_training, train_student, {"data": "nowhere"}),
        "teacher": (teacher_training, train_teacher, {"data": "nowhere"}),
        "adaptor": (
            AdaptorTraining(steps=4, rounds=3, images=2), partial(train_adaptor, load_model(class_model)),
            {"conditioning": "nowhere"},
        ),
    }[kind]  # fmt: skip
    refusals = []

    def second(what: str, share: float) -> None:
        if what.startswith("update"):
            for other in (settings, changed(settings, **bad)):  # found out before anything is read
                with pytest.raises(TargetError, match=r"a: another training runs there; wait for it to end") as caught:
                    train(tmp_path / "a", other)
                refusals.append(caught.value)

    done: Any = train(tmp_path / "a", settings, progress=second)
    assert len(refusals) == 2 * (3 if kind == "adaptor" else settings.updates)
    again: Any = train(tmp_path / "whole", settings)
    assert done.loss == again.loss
    assert train(tmp_path / "a", settings) is None  # it is free again


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    student_training: StudentTraining, teacher_training: TeacherTraining, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for path, words in (
        (tmp_path / "file", "file is not a directory"),
        (tmp_path / "file" / "out", "file is not a folder that can be written"),
        (tmp_path / os.fsdecode(b"\xe9"), r"\\udce9: the name is not UTF-8; choose another folder"),
    ):
        with unchanged(tmp_path):
            with pytest.raises(TargetError, match=words):
                train_teacher(path, changed(teacher_training, data="nowhere"))
            with pytest.raises(TargetError, match=words):
                train_student(path, changed(student_training, teacher="nowhere"))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"sources":', b'{"\xe9": 1}', b'{"sources": {}, "processes": 1}'])
def test_a_damaged_record_of_a_training(teacher_training: TeacherTraining, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a" / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / "a" / "training.json").write_bytes(data)
    with unchanged(tmp_path), pytest.raises(TargetError, match=r"training\.json is damaged; remove"):
        train_teacher(tmp_path / "a", teacher_training)


def test_a_checkpoint_of_another_training(
    student_training: StudentTraining, teacher_training: TeacherTraining, tmp_path: Path
) -> None:
    def stop(what: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    for train, settings, name in ((train_student, student_training, "a"), (train_teacher, teacher_training, "b")):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / name, changed(settings, checkpoint_minutes=1e-9), progress=stop)
    shutil.rmtree(tmp_path / "b" / CHECKPOINTS)
    shutil.copytree(tmp_path / "a" / CHECKPOINTS, tmp_path / "b" / CHECKPOINTS)
    with pytest.raises(TargetError, match=r"visit-00000002 is damaged .*; remove .* to start again") as caught:
        train_teacher(tmp_path / "b", changed(teacher_training, checkpoint_minutes=1e-9))
    assert "\n" not in str(caught.value)
