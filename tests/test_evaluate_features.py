"""The classifier by whose features images are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_photographs import LABELS, RECIPE, SIZE

from edgediff import load_model
from edgediff.data.image_folder import ImageSet
from edgediff.errors import ConfigError, DataError, ModelError
from edgediff.models.classifier import (
    Classifier,
    ClassifierShape,
    accuracy_of,
    as_input,
    built_in_classifier,
    features_of,
    load_classifier,
)
from edgediff.train.train_classifier import ClassifierRecipe, augment, train_classifier
from edgediff.zoo import FOLDER

RNG = np.random.default_rng(0)


# Features


@pytest.fixture(scope="module")
def trained(tiny_set: ImageSet) -> Classifier:
    return train_classifier(tiny_set, RECIPE).classifier


def test_a_classifier_learns_and_its_features_are_normalised(trained: Classifier, tiny_set: ImageSet) -> None:
    assert accuracy_of(trained, tiny_set) > 0.9
    features = features_of(trained, tiny_set.images)
    assert features.shape == (40, 8)
    assert np.abs(features.mean(axis=0)).max() < 1
    assert 0.3 < features.std(axis=0).mean() < 3
    with torch.no_grad():
        scores = trained.head(torch.from_numpy(features).float())
        torch.testing.assert_close(scores, trained(as_input(tiny_set.images)))


def test_training_is_repeatable_and_keeps_torchs_seed(tiny_set: ImageSet) -> None:
    recipe = ClassifierRecipe(widths=(4,), epochs=1, batch=20, seed=5)
    state = torch.get_rng_state()
    told: list[str] = []
    first, again = (train_classifier(tiny_set, recipe, told.append) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.epochs, first.steps) == (1, 2)
    assert first.loss == again.loss
    assert told[0].startswith("epoch 1 of 1: loss ")
    for mine, theirs in zip(first.classifier.parameters(), again.classifier.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_training_ends_at_its_time_limit(tiny_set: ImageSet) -> None:
    trained = train_classifier(tiny_set, ClassifierRecipe(widths=(4,), epochs=10_000, batch=20, minutes=0.005))
    assert 1 <= trained.steps < 20_000
    assert train_classifier(tiny_set, ClassifierRecipe(widths=(4,), batch=20, minutes=1e-9)).steps == 1


def test_augmentation_keeps_mean_colours(tiny_set: ImageSet) -> None:
    given = as_input(tiny_set.images)
    made = augment(given, torch.Generator().manual_seed(0))
    assert made.shape == given.shape
    assert not torch.equal(made, given)
    assert (made.mean(dim=(2, 3)) - given.mean(dim=(2, 3))).abs().max() < 0.25


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch": 1}, {"minutes": 0.0}, {"learning_rate": -1.0}])
def test_recipes_out_of_range_are_refused(tiny_set: ImageSet, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        train_classifier(tiny_set, ClassifierRecipe(**change))


def test_too_few_images_and_unknown_classes_are_refused(trained: Classifier, tiny_set: ImageSet) -> None:
    with pytest.raises(DataError, match="40 images of 4 classes; expected two classes and 64"):
        train_classifier(tiny_set)
    strange = ImageSet(tiny_set.images, tiny_set.labels, ("Apple", "Banana", "Kiwi", "Plum"))
    with pytest.raises(DataError, match="'Plum' is not one of the classifier's"):
        accuracy_of(trained, strange)


def test_a_classifier_is_loaded_as_it_was_saved(trained: Classifier, classifier: Path, tiny_set: ImageSet) -> None:
    loaded = load_classifier(classifier)
    assert loaded.shape == trained.shape == ClassifierShape(SIZE, (6, 8), LABELS)
    assert not loaded.training
    expected = features_of(trained, tiny_set.images)
    np.testing.assert_allclose(features_of(loaded, tiny_set.images), expected, atol=0.02)  # fp16 on disk
    assert json.loads((classifier / "config.json").read_text())["_class_name"] == "Classifier"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("config.json", "{", "does not describe a classifier"),
        ("config.json", '{"_class_name": "UNet2DModel"}', "does not describe a classifier"),
        ("config.json", '{"_class_name": "Classifier", "size": 0, "widths": [4], "labels": ["a"]}', "size"),
        ("config.json", '{"_class_name": "Classifier", "size": 16, "widths": [6, 9], "labels": ["a"]}', "do not fit"),
        ("model.safetensors", "", "cannot be read as weights"),
    ],
)
def test_bad_classifiers_are_one_line(
    classifier: Path, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_built_in_classifier_is_found_by_classes_and_size() -> None:
    labels = load_model("grocery-32").labels
    home = built_in_classifier(labels[::-1], 32)
    loaded = load_classifier(home)
    assert loaded.shape.size == 32
    assert list(loaded.shape.labels) == json.loads((FOLDER / "grocery-32" / "classes.json").read_text())
    assert sum(parameter.numel() for parameter in loaded.parameters()) < 500_000
    assert (home / "model.safetensors").stat().st_size < 1_000_000
    for others, size in ((labels, 16), (labels[1:], 32), (None, 32)):
        with pytest.raises(ModelError, match="no built-in classifier knows these"):
            built_in_classifier(others, size)
