import json
from pathlib import Path

import pytest
import torch
from conftest import LABELS, SMALL_TEXT, save_model
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


@pytest.mark.parametrize(("projection", "pooled", "ids"), [(10, 10, 6), (14, 14, 5)])
def test_pooled_text_from_the_second_encoder(tmp_path: Path, projection: int, pooled: int, ids: int) -> None:
    save_model(CASES["sdxl-like"].build(), tmp_path)
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


@pytest.mark.parametrize(("total", "ids"), [(2816, 6), (2560, 5)])
def test_pooled_text_of_sdxl_s_published_unets_alone(tmp_path: Path, total: int, ids: int) -> None:
    _sdxl(total, 256).save_pretrained(tmp_path)
    tensors = load_model(tmp_path).conditioning.tensors
    assert (tensors["text_embeds"].shape, tensors["time_ids"].shape) == ((1280,), (ids,))


def test_a_second_encoder_s_width_is_transformers_default_where_it_is_left_out(tmp_path: Path) -> None:
    _sdxl(512 + 6 * 8, 8).save_pretrained(tmp_path / "unet")
    write(tmp_path / TEXT_ENCODER_2, "{}")
    assert load_model(tmp_path).conditioning.tensors["text_embeds"].shape == (512,)


def _sdxl(total: int, each: int) -> UNet2DConditionModel:
    added = {"projection_class_embeddings_input_dim": total, "addition_time_embed_dim": each}
    return unet2d_condition(**SMALL_TEXT, addition_embed_type="text_time", **added)


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"text_encoder": {"max_position_embeddings": 514}, "tokenizer": {"model_max_length": 77}}, 77),
        ({"text_encoder": {"max_position_embeddings": 20}, "tokenizer": {"model_max_length": 10**30}}, 20),
        ({"text_encoder": {"model_type": "t5"}, "tokenizer": {"model_max_length": 32}}, 32),
        ({"text_encoder_2": {"max_position_embeddings": 9}}, 9),
        ({"tokenizer": {"model_max_length": 11}}, 11),
        ({"text_encoder": {"model_type": "clip_text_model"}}, 77),
    ],
)
def test_a_prompt_is_as_long_as_the_pipeline_pads_it(tmp_path: Path, files: dict, tokens: int) -> None:
    save_model(unet2d_condition(), tmp_path)
    for folder, config in files.items():
        name = "tokenizer_config.json" if folder == "tokenizer" else "config.json"
        write(tmp_path / folder / name, json.dumps(config))
    assert load_model(tmp_path).conditioning.tensors["encoder_hidden_states"].shape == (tokens, 12)


# Refusals


def test_pooled_text_of_unknown_width(tmp_path: Path) -> None:
    _sdxl(34, 4).save_pretrained(tmp_path)
    refused(tmp_path, ModelError, "is 34 wide", "not known", "expected", f"{TEXT_ENCODER_2} with projection_dim")


def test_a_text_encoder_without_a_length(tmp_path: Path) -> None:
    save_model(unet2d_condition(), tmp_path)
    write(tmp_path / TEXT_ENCODER, json.dumps({"model_type": "t5"}))
    refused(tmp_path, ModelError, TEXT_ENCODER, "has no max_position_embeddings; expected it, or a tokenizer")


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


def test_a_text_encoder_s_configuration_that_is_no_object(tmp_path: Path) -> None:
    save_model(unet2d_condition(), tmp_path)
    write(tmp_path / TEXT_ENCODER, "[77]")
    refused(tmp_path, ModelError, TEXT_ENCODER, "contains a list; expected an object of settings by name")


@pytest.mark.parametrize("tokens", [None, 0, -3, "7", 7.5, True])
def test_text_geometry_that_is_no_size(tmp_path: Path, tokens: object) -> None:
    save_model(unet2d_condition(), tmp_path)
    write(tmp_path / TEXT_ENCODER, json.dumps({"max_position_embeddings": tokens}))
    refused(tmp_path, ModelError, TEXT_ENCODER, f"max_position_embeddings is {tokens!r}", "a whole number above 0")
