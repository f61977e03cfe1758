import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from model_folders import change_config, change_weights, refused
from unets import unet2d, unet2d_condition

from edgediff import Cut, load_model, split
from edgediff.errors import ModelError
from edgediff.models.adaptors import make_adaptor
from edgediff.models.conditioning import TensorSpec
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import random_weights
from edgediff.models.slim import plain_config
from edgediff.models.spectral import SPECTRAL, SpectralUNet2DConditionModel, SpectralUNet2DModel, spectralize


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional student, as a pipeline's folder holds it."""
    return save_model(
        spectralize(unet2d(num_class_embeds=5), wavelet="db2"), tmp_path_factory.mktemp("models") / "student"
    )


@torch.no_grad()
def test_random_weights_keep_class_and_settings(saved: Path) -> None:
    model = load_model(saved)
    made = random_weights(model, 3).unet
    assert type(made) is SpectralUNet2DModel
    assert plain_config(made) == plain_config(model.unet)


def test_a_conditional_student_has_its_text(tmp_path: Path) -> None:
    model = load_model(save_model(spectralize(unet2d_condition()), tmp_path))
    assert isinstance(model.unet, SpectralUNet2DConditionModel)
    assert model.conditioning.kind == "text"
    assert model.conditioning.tensors == {"encoder_hidden_states": TensorSpec((77, 12), torch.float32)}
    assert model.space == "latent"


@pytest.mark.parametrize("kind", ["resnet", "unet", "unet-light"])
@torch.no_grad()
def test_adaptors_fit_a_student(saved: Path, kind: str) -> None:
    model = load_model(saved)
    shape = adaptor_shape(split(model.unet), model)
    assert (shape.highres, shape.lowres) == ((8, 8, 8), (16, 8, 8))
    divided = split(model.unet, Cut(), make_adaptor(kind, shape))
    sample, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    out, cache = divided.full(sample, 500, class_labels=labels)
    again, kept = divided.cached(sample, 500, cache, class_labels=labels)
    assert torch.equal(again, out)
    assert torch.equal(kept, cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wavelet": "db99"}, "wavelet 'db99' is unknown; choices: haar, db1 to db38, sym2 to sym20, coif1 to coif17"),
        ({"wavelet": None}, "wavelet None is unknown"),
        ({"wavelet": ["haar"]}, "wavelet ['haar'] is unknown"),
        ({"gate_takes_time": 1}, "gate_takes_time is 1; expected true or false"),
        ({"block_out_channels": [8, 18, 24], "norm_num_groups": 2}, "18 channels do not divide into four bands"),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "SkipUpBlock2D"]}, "cannot cut a UNet with a SkipUpBlock2D"),
    ],
)
def test_configurations_that_cannot_be(saved: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = copy_of(saved, tmp_path)
    change_config(folder, **changes)
    message = refused(folder, ModelError, words, "config.json")
    assert message.startswith(str(folder / "unet"))


def test_weights_of_other_settings(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    change_config(folder, gate_takes_time=True)
    refused(folder, ModelError, "do not fit its config.json", "gate.time")
    change_config(folder, gate_takes_time=False, _class_name="UNet2DModel")
    refused(folder, ModelError, "do not fit its config.json", "downsamplers.0.conv.weight")
    change_config(folder, _class_name="SpectralUNet2DModel")
    load_model(folder)
    change_weights(folder, down_blocks__0__downsamplers__0__gate__hidden__bias=torch.full((2,), torch.nan))
    refused(folder, ModelError, "weights are not finite", "gate.hidden.bias")


def copy_of(folder: Path, place: Path) -> Path:
    return shutil.copytree(folder, place / "model")


def test_the_names_in_config_json() -> None:
    assert {kind.__name__: kind for kind in (SpectralUNet2DModel, SpectralUNet2DConditionModel)} == SPECTRAL
    with pytest.raises(TypeError, match="wavelett"):
        SpectralUNet2DModel(wavelett="haar")
