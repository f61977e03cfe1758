"""Trainings of tiny UNets, and checks of their results."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from edgediff.errors import EdgediffError
from edgediff.train.settings import StudentTraining
from edgediff.train.student import train_student
from edgediff.train.teacher import train_teacher
from edgediff.train.unet import PRODUCT

UPDATES = 4
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def changed(settings: Any, **changes: object) -> Any:
    return msgspec.structs.replace(settings, **changes)


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one / PRODUCT), load_file(other / PRODUCT)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumes(tmp_path: Path, settings: StudentTraining, whole: str = "whole") -> None:
    """Checks that what stopped in ``a`` resumes, and ends as a training that did not stop, in the folder `whole`."""
    assert train_student(tmp_path / "a", settings) is not None
    train_student(tmp_path / whole, settings)
    assert same(tmp_path / "a", tmp_path / whole)


def refused(tmp_path: Path, settings: Any, kind: type[EdgediffError], words: str) -> None:
    """Checks that a training is refused in one line and leaves nothing behind."""
    train: Any = train_student if isinstance(settings, StudentTraining) else train_teacher
    with pytest.raises(kind, match=words) as caught:
        train(tmp_path / "refused", settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()
