"""The classifier by whose features images are compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned import rows_of, write_rows
from photographs import folder_of_images
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
    ranks_of,
    scores_of,
)
from edgediff.train.train_classifier import ClassifierRecipe, augment, distort, train_classifier
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
        torch.testing.assert_close(scores, trained(as_input(tiny_set.images))[0])


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
    for others, size in ((labels, 16), ((*labels, "Durian"), 32), (None, 32)):
        with pytest.raises(ModelError, match="no built-in classifier knows these"):
            built_in_classifier(others, size)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["photographs", "drawings"])
def test_the_training_script_stores_what_evaluate_takes(kind: str, tmp_path: Path) -> None:
    colours = ("red", "green", "blue", "grey")
    data = folder_of_images(tmp_path / "data", colours, each=20)
    more: tuple[str, ...] = ()
    if kind == "drawings":
        write_rows(data, [{**row, "style": row["text"].rpartition(", ")[2]} for row in rows_of(20)])
        more = ("--label", "name", "--style", "style")
    script = Path(__file__).parents[1] / "benchmarks" / "train_classifier.py"
    done = subprocess.run(
        [sys.executable, script, "--images", data, "--size", "16", "--epochs", "1", "-o", tmp_path / "made", *more],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held out: top 1 " in done.stdout
    assert ("style" in done.stdout) == (kind == "drawings")
    shape = load_classifier(tmp_path / "made").shape
    assert set(shape.labels) == set(colours)
    assert shape.styles == (("flat", "noisy") if kind == "drawings" else ())


# What drawings go through


def test_distortion_keeps_white_and_differs_by_image() -> None:
    white = torch.ones(8, 3, 16, 16)
    made = distort(white, torch.Generator().manual_seed(0))
    assert made.mean() > 0.9
    grey = distort(torch.zeros(8, 3, 16, 16), torch.Generator().manual_seed(0))
    assert grey.abs().max() <= 1
    assert len({round(float(image.mean()), 4) for image in grey}) == 8
    again = distort(torch.zeros(8, 3, 16, 16), torch.Generator().manual_seed(0))
    assert torch.equal(grey, again)


def test_distortion_blurs_and_moves_a_dot() -> None:
    dots = torch.ones(64, 3, 33, 33)
    dots[:, :, 16, 16] = -1
    made = distort(dots, torch.Generator().manual_seed(1))
    places = made.mean(1).flatten(1).argmin(1)
    assert len(set(places.tolist())) > 8
    depth = 1 - made.mean(1).flatten(1).min(1).values
    assert depth.min() < 0.7  # blurred
    assert depth.max() > 1  # as it was


def test_a_second_head_learns_styles(tiny_set: ImageSet) -> None:
    styles = ["dark" if image.mean() < 115 else "light" for image in tiny_set.images]
    assert len({*styles}) == 2
    recipe = ClassifierRecipe(widths=(6, 8), stride=2, epochs=30, batch=20, learning_rate=0.02)
    learnt = train_classifier(tiny_set, recipe, styles=styles).classifier
    assert learnt.shape == ClassifierShape(SIZE, (6, 8), LABELS, ("dark", "light"), 2)
    things, moods = scores_of(learnt, features_of(learnt, tiny_set.images))
    accuracy = (ranks_of(things, tiny_set.labels) == 1).mean()
    assert accuracy == pytest.approx(accuracy_of(learnt, tiny_set))
    assert accuracy > 0.8
    assert np.mean([learnt.shape.styles[i] == style for i, style in zip(moods.argmax(1), styles, strict=True)]) > 0.7


def test_ranks_count_from_1() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.3]], np.float32)
    assert ranks_of(scores, np.array([1, 2, 1])).tolist() == [1, 3, 2]
