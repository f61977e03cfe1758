import json
from pathlib import Path

import pytest
import torch
from conftest import LABELS, save_model
from diffusers import UNet2DConditionModel
from model_folders import CLASSES, TEXT_ENCODER, TEXT_ENCODER_2, refused, write
from unets import CASES, unet2d, unet2d_condition

from edgediff import load_model
from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.conditioning import TensorSpec


@pytest.mark.parametrize(
    ("classes", "labels", "null_label"),
    [
        (LABELS, tuple(LABELS), 4),
        ([*LABELS, "Pear"], (*LABELS, "Pear"), None),
        (None, ("0", "1", "2", "3", "4"), None),
    ],
)
def test_labels_and_the_null_label(
    folder: Path, classes: list[str] | None, labels: tuple[str, ...], null_label: int | None
) -> None:
    if classes is None:
        (folder / CLASSES).unlink()
    else:
        (folder / CLASSES).write_text(json.dumps(classes))
    found = load_model(folder).conditioning
    assert (found.kind, found.labels, found.null_label) == ("class", labels, null_label)
    assert found.tensors == {"class_labels": TensorSpec((), torch.int64)}


def test_neither_text_nor_classes(tmp_path: Path) -> None:
    found = load_model(save_model(unet2d(), tmp_path)).conditioning
    assert (found.kind, found.tensors, found.labels, found.null_label) == ("none", {}, (), None)


@pytest.mark.parametrize(("config", "tokens"), [({"max_position_embeddings": 7}, 7), ({}, 77), (None, 77)])
def test_text_tokens_from_the_encoder(tmp_path: Path, config: dict[str, int] | None, tokens: int) -> None:
    save_model(unet2d_condition(), tmp_path)
    if config is not None:
        write(tmp_path / TEXT_ENCODER, json.dumps(config))
    model = load_model(tmp_path)
    assert isinstance(model.unet, UNet2DConditionModel)
    assert model.conditioning.kind == "text"
    assert model.conditioning.tensors == {"encoder_hidden_states": TensorSpec((tokens, 12), torch.float32)}


@pytest.mark.parametrize(("projection", "pooled", "ids"), [(10, 10, 6), (14, 14, 5), (None, 10, 6)])
def test_pooled_text_from_the_second_encoder(tmp_path: Path, projection: int | None, pooled: int, ids: int) -> None:
    save_model(CASES["sdxl-like"].build(), tmp_path)
    if projection is not None:
        write(tmp_path / TEXT_ENCODER_2, json.dumps({"projection_dim": projection}))
    tensors = load_model(tmp_path).conditioning.tensors
    assert tensors["text_embeds"] == TensorSpec((pooled,), torch.float32)
    assert tensors["time_ids"] == TensorSpec((ids,), torch.float32)


def test_projected_text_keeps_the_encoders_width(tmp_path: Path) -> None:
    tensors = load_model(save_model(CASES["unclip-like"].build(), tmp_path)).conditioning.tensors
    assert tensors["encoder_hidden_states"] == TensorSpec((77, 6), torch.float32)


def test_text_and_classes_together(tmp_path: Path) -> None:
    found = load_model(save_model(CASES["text-and-class"].build(), tmp_path)).conditioning
    assert (found.kind, len(found.labels)) == ("text", 7)
    assert found.tensors.keys() == {"encoder_hidden_states", "class_labels"}


# Refusals


def test_pooled_text_that_does_not_add_up(tmp_path: Path) -> None:
    save_model(CASES["sdxl-like"].build(), tmp_path)
    write(tmp_path / TEXT_ENCODER_2, json.dumps({"projection_dim": 11}))
    refused(tmp_path, ModelError, "width 11 and time ids of width 4 do not add up to the 34")


def test_classes_that_are_vectors_are_refused_without_text(tmp_path: Path) -> None:
    save_model(unet2d(class_embed_type="timestep"), tmp_path)
    refused(tmp_path, UnsupportedError, "class_embed_type 'timestep') without text; supported: class indices")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["cannot be read as JSON"]),
        (b"\xff", ["cannot be read as JSON"]),
        ('{"Apple": 0}', ["is not a list of names"]),
        ('["a", "b", "c", 4]', ["is not a list of names"]),
        ('["a", "b", "c", ""]', ["is not a list of names"]),
        ('["a", "b", "c"]', ["has 3 names", "embeds 5 classes", "expected 5 distinct names, or 4"]),
        ('["a", "b", "c", "d", "e", "f"]', ["has 6 names", "expected 5 distinct names, or 4"]),
        ('["a", "a", "b", "c"]', ["has 4 names", "5 distinct names"]),
    ],
)
def test_classes_that_are_wrong(folder: Path, text: str | bytes, words: list[str]) -> None:
    write(folder / CLASSES, text)
    refused(folder, ModelError, CLASSES, *words)


@pytest.mark.parametrize("tokens", [None, 0, -3, "7", 7.5, True])
def test_text_geometry_that_is_no_size(tmp_path: Path, tokens: object) -> None:
    save_model(unet2d_condition(), tmp_path)
    write(tmp_path / TEXT_ENCODER, json.dumps({"max_position_embeddings": tokens}))
    refused(tmp_path, ModelError, TEXT_ENCODER, f"max_position_embeddings is {tokens!r}", "a whole number above 0")
