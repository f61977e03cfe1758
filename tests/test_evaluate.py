"""The classifier whose features are compared, and what a bundle's images come to."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from command_line import Command, assert_error
from PIL import Image
from seals import manifest_of, seal

from edgediff.errors import ConfigError, DataError, EdgediffError, ModelError, UnsupportedError
from edgediff.evaluate.features import (
    Classifier,
    ClassifierShape,
    as_input,
    classifier_of,
    features_of,
    load_classifier,
    save_classifier,
)
from edgediff.evaluate.generation import check_pixels, class_indices, generate
from edgediff.evaluate.report import Reference, evaluate_bundle
from edgediff.train.classifier import ClassifierRecipe, accuracy_of, augment, train_classifier
from edgediff.train.data import ImageSet
from edgediff.zoo import FOLDER
from edgediff_runtime import EdgePipeline, RequestError
from edgediff_runtime.manifest import Source

RNG = np.random.default_rng(0)
SIZE = 16
LABELS = ("Apple", "Banana", "Kiwi", "Orange")


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


# Features


@pytest.fixture(scope="module")
def photographs() -> ImageSet:
    """Four classes, each of one colour, of 18, 12, 6 and 4 images, with waves and noise on them."""
    counts = (18, 12, 6, 4)
    labels = np.repeat(np.arange(4), counts)
    rng = np.random.default_rng(1)
    colours = np.array([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8], [0.7, 0.7, 0.2]])
    waves = 0.1 * np.sin(np.arange(SIZE) * rng.uniform(0.3, 1.5, (len(labels), 1)))
    noisy = rng.normal(0, 0.05, (len(labels), SIZE, SIZE, 3))
    return ImageSet(as_bytes(colours[labels][:, None, None] + waves[:, None, :, None] + noisy), labels, LABELS)


@pytest.fixture(scope="module")
def images(photographs: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as an image folder."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, (image, label) in enumerate(zip(photographs.images, photographs.labels, strict=True)):
        (folder / LABELS[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / LABELS[label] / f"{i:03}.png")
    return folder


RECIPE = ClassifierRecipe(widths=(6, 8), epochs=20, batch=20, learning_rate=0.02)


@pytest.fixture(scope="module")
def trained(photographs: ImageSet) -> Classifier:
    return train_classifier(photographs, RECIPE).classifier


@pytest.fixture(scope="module")
def classifier(trained: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier's folder."""
    folder = tmp_path_factory.mktemp("features") / "tiny"
    save_classifier(trained, folder)
    return folder


def test_a_classifier_learns_and_its_features_are_normalised(trained: Classifier, photographs: ImageSet) -> None:
    assert accuracy_of(trained, photographs) > 0.9
    features = features_of(trained, photographs.images)
    assert features.shape == (40, 8)
    assert np.abs(features.mean(axis=0)).max() < 1
    assert 0.3 < features.std(axis=0).mean() < 3
    with torch.no_grad():
        scores = trained.head(torch.from_numpy(features).float())
        torch.testing.assert_close(scores, trained(as_input(photographs.images)))


def test_training_is_repeatable_and_leaves_torchs_seed_alone(photographs: ImageSet) -> None:
    recipe = ClassifierRecipe(widths=(4,), epochs=1, batch=20, seed=5)
    state = torch.get_rng_state()
    told: list[str] = []
    first, again = (train_classifier(photographs, recipe, told.append) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.epochs, first.steps) == (1, 2)
    assert first.loss == again.loss
    assert told[0].startswith("epoch 1 of 1: loss ")
    for mine, theirs in zip(first.classifier.parameters(), again.classifier.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_training_ends_when_its_time_does(photographs: ImageSet) -> None:
    trained = train_classifier(photographs, ClassifierRecipe(widths=(4,), epochs=10_000, batch=20, minutes=0.005))
    assert 1 <= trained.steps < 20_000


def test_augmentation_keeps_what_an_image_is(photographs: ImageSet) -> None:
    given = as_input(photographs.images)
    made = augment(given, torch.Generator().manual_seed(0))
    assert made.shape == given.shape
    assert not torch.equal(made, given)
    assert (made.mean(dim=(2, 3)) - given.mean(dim=(2, 3))).abs().max() < 0.25


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch": 1}, {"minutes": 0.0}, {"learning_rate": -1.0}])
def test_recipes_out_of_range_are_refused(photographs: ImageSet, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        train_classifier(photographs, ClassifierRecipe(**change))


def test_too_few_images_and_strange_classes_are_refused(trained: Classifier, photographs: ImageSet) -> None:
    with pytest.raises(DataError, match="40 images of 4 classes; expected two classes and 64"):
        train_classifier(photographs)
    strange = ImageSet(photographs.images, photographs.labels, ("Apple", "Banana", "Kiwi", "Plum"))
    with pytest.raises(DataError, match="'Plum' is none of"):
        accuracy_of(trained, strange)


def test_a_classifier_comes_back_as_it_was_stored(trained: Classifier, classifier: Path, photographs: ImageSet) -> None:
    loaded = load_classifier(classifier)
    assert loaded.shape == trained.shape == ClassifierShape(SIZE, (6, 8), LABELS)
    assert not loaded.training
    expected = features_of(trained, photographs.images)
    np.testing.assert_allclose(features_of(loaded, photographs.images), expected, atol=0.02)  # fp16 on disk
    assert json.loads((classifier / "config.json").read_text())["_class_name"] == "Classifier"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("config.json", "{", "does not describe a classifier"),
        ("config.json", '{"_class_name": "UNet2DModel"}', "does not describe a classifier"),
        ("config.json", '{"_class_name": "Classifier", "size": 0, "widths": [4], "labels": ["a"]}', "size"),
        ("config.json", '{"_class_name": "Classifier", "size": 16, "widths": [6, 9], "labels": ["a"]}', "does not fit"),
        ("model.safetensors", "no weights", "cannot be read as weights"),
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


def test_the_built_in_models_classifier_knows_its_classes() -> None:
    home = classifier_of("grocery-32")
    loaded = load_classifier(home)
    assert loaded.shape.size == 32
    assert list(loaded.shape.labels) == json.loads((FOLDER / "grocery-32" / "classes.json").read_text())
    assert sum(parameter.numel() for parameter in loaded.parameters()) < 500_000
    assert (home / "model.safetensors").stat().st_size < 1_000_000
    with pytest.raises(ModelError, match="no features for sd15"):
        classifier_of("sd15")


# Bundles


@pytest.fixture
def pipe(class_bundle: Path) -> EdgePipeline:
    return EdgePipeline.from_pretrained(class_bundle)


REQUEST = {"clock": 2, "steps": 3, "guidance_scale": 2.0, "seed": 7}


def test_image_i_is_the_same_whatever_the_batch(pipe: EdgePipeline) -> None:
    classes = np.array([3, 0, 1, 1, 2, 0, 3])
    made = [np.concatenate([*generate(pipe, classes, 7, batch=batch, **REQUEST)]) for batch in (1, 3, 7, 100)]
    for images in made:
        assert images.shape == (7, SIZE, SIZE, 3)
        # Kernels may add up in another order for another batch.
        assert np.abs(images.astype(int) - made[0]).max() <= 1
    ran = pipe(label=classes.tolist(), num_inference_steps=3, clock=2, guidance_scale=2.0, seed=7)
    assert np.abs(made[1].astype(int) - ran.images).max() <= 1
    assert np.abs(np.diff(made[0].astype(int), axis=0)).max() > 20


def test_what_does_not_fit_is_said_before_anything_runs(pipe: EdgePipeline) -> None:
    for change, words in (({"clock": 0}, "clock"), ({"steps": 0}, "steps"), ({"guidance_scale": math.inf}, "finite")):
        with pytest.raises(RequestError, match=words):
            generate(pipe, np.array([0]), 1, batch=1, **REQUEST | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": {"space": "latent"}}, "works on latents"),
        ({"sample": {"channels": 1}}, "1x16x16"),
        ({"sample": {"width": 8}}, "expected square"),
        ({"conditioning": {"kind": "text"}}, "conditioned on text"),
    ],
)
def test_bundles_that_make_no_photographs_are_refused(
    pipe: EdgePipeline, change: dict[str, dict[str, Any]], words: str
) -> None:
    ((part, values),) = change.items()
    replaced = msgspec.structs.replace(getattr(pipe.manifest, part), **values)
    manifest = msgspec.structs.replace(pipe.manifest, **{part: replaced})
    with pytest.raises(UnsupportedError, match=words):
        check_pixels(manifest)


def test_classes_go_by_name(pipe: EdgePipeline, photographs: ImageSet) -> None:
    some = ImageSet(photographs.images, photographs.labels, ("Orange", "Kiwi", "Banana", "Apple"))
    found = class_indices(pipe.manifest, some)
    assert found is not None
    assert found.tolist() == [3 - label for label in photographs.labels]
    strange = ImageSet(photographs.images, photographs.labels, ("Apple", "Banana", "Kiwi", "Plum"))
    with pytest.raises(DataError, match="'Plum' is none of the bundle's; choices: Apple"):
        class_indices(pipe.manifest, strange)


def test_photographs_are_nearer_to_photographs_than_what_was_done_to_them(
    classifier: Path, photographs: ImageSet
) -> None:
    order = np.random.default_rng(2).permutation(40)
    compared = Reference(photographs.images[order[:20]], load_classifier(classifier))
    others = photographs.images[order[20:]]
    noise = RNG.normal(0, 1, others.shape)
    found = [compared.distances(as_bytes(others / 255 + scale * noise)) for scale in (0, 0.15, 0.4)]
    for name in ("frechet_distance", "spectrum_error", "kernel_distance"):
        values = [getattr(each, name) for each in found]
        assert values == sorted(values), name
    blurred = compared.distances((others // 2 + np.roll(others, 1, axis=2) // 2).astype(np.uint8))
    assert blurred.band_gap[SIZE // 2] < -0.2
    itself = compared.distances(photographs.images[order[:20]])
    assert itself.frechet_distance == pytest.approx(0, abs=1e-6)
    assert itself.spectrum_error == 0


def test_a_bundle_is_evaluated(class_bundle: Path, images: Path, classifier: Path) -> None:
    told: list[str] = []
    found = evaluate_bundle(
        class_bundle, images, clocks=[1, "2", "1,1,1"], num_images=12, steps=3, seed=3, batch=5, features=classifier,
        progress=told.append,
    )  # fmt: skip
    assert (found.num_images, found.available, found.num_features) == (12, 40, 8)
    assert [row.mask for row in found.rows] == [(1, 1, 1), (1, 0, 1), (1, 1, 1)]
    always, clocked, spelt_out = found.rows
    assert always.distances == spelt_out.distances != clocked.distances
    assert always.ratio == 1
    assert clocked.ratio == clocked.distances.kernel_distance / always.distances.kernel_distance
    # An untrained model's images are nothing like them.
    assert always.distances.frechet_distance > 3 * found.floor.frechet_distance
    assert always.distances.spectrum_error > 3 * found.floor.spectrum_error
    assert told[-1] == "drawing with clock 1,1,1: 12 of 12 images"
    assert "drawing with clock 2: 5 of 12 images" in told
    again = evaluate_bundle(class_bundle, images, clocks=[2], num_images=12, steps=3, seed=3, features=classifier)
    assert again.floor == found.floor
    assert again.rows[0].ratio is None
    assert again.rows[0].distances.frechet_distance == pytest.approx(clocked.distances.frechet_distance, rel=1e-2)


def test_all_sets_are_of_one_size(class_bundle: Path, images: Path, classifier: Path) -> None:
    found = evaluate_bundle(class_bundle, images, clocks=[1], num_images=1000, steps=1, features=classifier)
    assert found.num_images == 20


def test_evaluate_on_the_command_line(class_bundle: Path, images: Path, classifier: Path, command: Command) -> None:
    asked = ("evaluate", class_bundle, "--images", images, "--features", classifier, "--steps", 2, "--num-images", 8)
    said = command(*asked, "--clock", 1, "--clock", 2, "--json")
    assert (said.code, said.errors) == (0, [])
    data = json.loads(said.out)
    assert data["num_images"] == 8
    assert [row["clock"] for row in data["rows"]] == ["1", "2"]
    assert data["rows"][0]["ratio"] == 1
    assert {*data["floor"]} == {*data["rows"][0]["distances"]}
    said = command(*asked)
    assert (said.code, said.errors) == (0, [])
    for words in ("photographs", "kernel x1000", "Frechet", "spectrum error", "ratio to clock 1", "+-"):
        assert words in said.out
    assert "8 images in each set, 2 steps" in " ".join(said.out.split())
    assert "no more images than features (8)" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--images": "nowhere"}, ("no images at nowhere", "no such folder")),
        ({"--features": None}, ("no features for", "name one's folder")),
        ({"--features": "nowhere"}, ("no classifier at nowhere",)),
        ({"--num-images": 3}, ("num_images is 3", "4 or more")),
        ({"--batch": 0}, ("batch is 0",)),
        ({"--clock": 0}, ("clock is 0",)),
        ({"--guidance-scale": -1}, ("guidance_scale",)),
        ({"--backend": "abacus"}, ("no backend 'abacus'",)),
    ],
)
def test_bad_requests_are_one_line(
    class_bundle: Path, images: Path, classifier: Path, command: Command, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    options = {"--images": images, "--features": classifier, "--steps": 2} | change
    given = [each for option, value in options.items() if value is not None for each in (option, value)]
    assert_error(command("evaluate", class_bundle, *given), *parts)


def test_bundles_that_cannot_be_evaluated(
    bundle: Path, images: Path, classifier: Path, tmp_path: Path, command: Command
) -> None:
    asked = ("--images", images, "--features", classifier)
    (tmp_path / "empty").mkdir()
    assert_error(command("evaluate", tmp_path / "empty", *asked), "manifest.json is missing")
    assert_error(command("evaluate", bundle, "--images", tmp_path / "empty", "--features", classifier), "no images in")
    other = tmp_path / "other"
    save_classifier(Classifier(ClassifierShape(8, (4,), ("a",))), other)
    assert_error(
        command("evaluate", bundle, "--images", images, "--features", other), "takes 8x8 pixels, the bundle makes 16x16"
    )
    manifest = manifest_of(bundle)
    seal(bundle, msgspec.structs.replace(manifest, sample=msgspec.structs.replace(manifest.sample, space="latent")))
    assert_error(command("evaluate", bundle, *asked), "works on latents")


def test_a_built_in_source_brings_its_classifier_and_no_other_does(bundle: Path, images: Path) -> None:
    manifest = manifest_of(bundle)
    with pytest.raises(ModelError, match="only built-in models bring"):
        evaluate_bundle(bundle, images)
    for name, words in (("grocery-32", "takes 32x32 pixels, the bundle makes 16x16"), ("sd15", "no features for sd15")):
        seal(bundle, msgspec.structs.replace(manifest, source=Source(name, None, manifest.source.sha256)))
        with pytest.raises(EdgediffError, match=words):
            evaluate_bundle(bundle, images)
