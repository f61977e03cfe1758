"""``edgediff evaluate distance`` of a bundle."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command_line import Command, Said, assert_error
from PIL import Image
from seals import manifest_of, seal
from tiny_photographs import LABELS, SIZE, as_bytes

from edgediff.data.image_folder import ImageSet, class_indices
from edgediff.errors import DataError, UnsupportedError
from edgediff.evaluate.distance import compare, evaluate_distance, examine
from edgediff.evaluate.report import Distances
from edgediff.evaluate.sampler import check_manifest, chunks, sample_bundle
from edgediff.models.classifier import Classifier, ClassifierShape, load_classifier, save_classifier
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.samplers import SAMPLERS
from edgediff_runtime.schedulers import SchedulerConfig

RNG = np.random.default_rng(0)


@pytest.fixture
def pipe(class_bundle: Path) -> EdgePipeline:
    return EdgePipeline.from_pretrained(class_bundle)


def test_image_i_is_the_same_whatever_the_batch(class_bundle: Path, pipe: EdgePipeline) -> None:
    classes = np.array([3, 0, 1, 1, 2, 0, 3])
    sampler = sample_bundle(class_bundle)
    mask = sampler.check("2", 3, 2.0, 7)
    draw = partial(sampler.draw, mask=mask, classes=classes, guidance_scale=2.0, seed=7)
    made = [np.concatenate([draw(part) for part in chunks(7, batch)]) for batch in (1, 3, 7, 100)]
    for images in made:
        assert images.shape == (7, SIZE, SIZE, 3)
        # Kernels may add up in another order for another batch.
        assert np.abs(images.astype(int) - made[0]).max() <= 1
    ran = pipe(label=classes.tolist(), num_inference_steps=3, clock=2, guidance_scale=2.0, seed=7)
    assert np.abs(made[1].astype(int) - ran.images).max() <= 1
    assert np.abs(np.diff(made[0].astype(int), axis=0)).max() > 20
    some = draw([6, 2])
    assert np.abs(some.astype(int) - made[2][[6, 2]]).max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
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
        check_manifest(manifest)


def test_classes_go_by_name(tiny_set: ImageSet) -> None:
    some = ImageSet(tiny_set.images, tiny_set.labels, ("Orange", "Kiwi", "Banana", "Apple"))
    found = class_indices(LABELS, some, "bundle")
    assert found is not None
    assert found.tolist() == [3 - label for label in tiny_set.labels]
    strange = ImageSet(tiny_set.images, tiny_set.labels, ("Apple", "Banana", "Kiwi", "Plum"))
    with pytest.raises(DataError, match="'Plum' is not one of the bundle's; choices: Apple"):
        class_indices(LABELS, strange, "bundle")
    assert class_indices(None, strange, "bundle") is None


def test_distances_grow_with_noise_and_blur(classifier: Path, tiny_set: ImageSet) -> None:
    order = np.random.default_rng(2).permutation(40)
    network = load_classifier(classifier)
    reference = examine(tiny_set.images[order[:20]], network)

    def far(images: np.ndarray) -> Distances:
        return compare(examine(images, network), reference, size=SIZE, num_equal=20, seed=0)

    others = tiny_set.images[order[20:]]
    noise = RNG.normal(0, 1, others.shape)
    found = [far(as_bytes(others / 255 + scale * noise)) for scale in (0, 0.15, 0.4)]
    for name in ("frechet_distance", "spectrum_error", "spectrum_error_top", "kernel_distance"):
        values = [getattr(each, name) for each in found]
        assert values == sorted(values), name
    blurred = far((others // 2 + np.roll(others, 1, axis=2) // 2).astype(np.uint8))
    assert blurred.band_gap[SIZE // 2] < -0.2
    assert blurred.spectrum_error_top > blurred.spectrum_error
    itself = far(tiny_set.images[order[:20]])
    assert itself.frechet_distance == pytest.approx(0, abs=1e-6)
    assert itself.precision == itself.recall == 1
    assert itself.spectrum_error == 0


def test_a_bundle_is_evaluated(class_bundle: Path, images: Path, classifier: Path) -> None:
    told: list[str] = []
    found = evaluate_distance(
        class_bundle, images, clocks=[1, "2", "1,1,1"], num_images=12, steps=3, seed=3, batch=5, features=classifier,
        progress=told.append,
    )  # fmt: skip
    assert (found.num_images, found.available, found.num_features) == (12, 40, 8)
    assert [row.mask for row in found.rows] == [(1, 1, 1), (1, 0, 1), (1, 1, 1)]
    always, clocked, masked = found.rows
    assert always.distances == masked.distances != clocked.distances
    assert always.ratio == 1
    assert clocked.ratio == clocked.distances.kernel_distance / always.distances.kernel_distance
    # An untrained model's images are far from photographs.
    assert always.distances.frechet_distance > 3 * found.floor.frechet_distance
    assert always.distances.spectrum_error > 3 * found.floor.spectrum_error
    assert told[-1] == "drawing with clock 1,1,1: 12 of 12 images"
    assert "drawing with clock 2: 5 of 12 images" in told
    again = evaluate_distance(class_bundle, images, clocks=[2], num_images=12, steps=3, seed=3, features=classifier)
    assert again.floor == found.floor
    assert again.rows[0].ratio is None
    assert again.rows[0].distances.frechet_distance == pytest.approx(clocked.distances.frechet_distance, rel=1e-2)


def test_all_sets_are_of_one_size(class_bundle: Path, images: Path, classifier: Path) -> None:
    found = evaluate_distance(class_bundle, images, clocks=[1], num_images=1000, steps=1, features=classifier)
    assert found.num_images == 20


def test_evaluate_on_the_command_line(class_bundle: Path, images: Path, classifier: Path, command: Command) -> None:
    asked = ("evaluate", "distance", class_bundle, "--images", images, "--features", classifier, "--steps", 2,
             "--num-images", 8)  # fmt: skip
    said = command(*asked, "--clock", 1, "--clock", 2, "--json")
    assert (said.code, said.errors) == (0, [])
    data = json.loads(said.out)
    assert data["num_images"] == 8
    assert [row["clock"] for row in data["rows"]] == ["1", "2"]
    assert data["rows"][0]["ratio"] == 1
    assert {*data["floor"]} == {*data["rows"][0]["distances"]}
    said = command(*asked)
    assert (said.code, said.errors) == (0, [])
    for words in ("photographs", "x1000", "Frechet", "precision", "spectrum", "octaves", "clock 1", "+-"):
        assert words in said.out
    assert "8 images in each set, 2 steps of dpmpp_2m" in " ".join(said.out.split())
    assert "no more images than features (8)" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--features": None}, ("no features", "name the folder of one")),
        ({"--features": "nowhere"}, ("no classifier at nowhere",)),
        ({"--clock": 0}, ("clock is 0; expected a period of 1 or more",)),
        ({"--steps": 0}, ("steps",)),
        ({"--seed": -1}, ("seed -1: expected an integer",)),
        ({"--guidance-scale": "inf"}, ("guidance_scale is inf; expected a finite number",)),
        ({"--backend": "abacus"}, ("no backend 'abacus'",)),
    ],
)
def test_bad_requests_are_one_line(
    class_bundle: Path, images: Path, classifier: Path, command: Command, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    options = {"--images": images, "--features": classifier, "--steps": 2} | change
    given = [each for option, value in options.items() if value is not None for each in (option, value)]
    assert_error(command("evaluate", "distance", class_bundle, *given), *parts)


def test_bundles_that_cannot_be_evaluated(
    bundle: Path, images: Path, classifier: Path, tmp_path: Path, command: Command
) -> None:
    def say(source: Path, images: Path = images, features: Path = classifier) -> Said:
        return command("evaluate", "distance", source, "--images", images, "--features", features)

    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    assert_error(say(empty), "empty is neither a bundle, with a manifest.json, nor a model, with unet/config.json")
    assert_error(say(bundle, empty), "no images in")
    Image.new("RGB", (SIZE, SIZE)).save(empty / "one.png")
    assert_error(say(bundle, empty), "has 1 image", "expected 8 or more")
    save_classifier(Classifier(ClassifierShape(8, (4,), ("a",))), other)
    assert_error(say(bundle, features=other), "takes 8x8 pixels, the bundle makes 16x16")
    manifest = manifest_of(bundle)
    seal(bundle, msgspec.structs.replace(manifest, sample=msgspec.structs.replace(manifest.sample, space="latent")))
    assert_error(say(bundle), "works on latents")


@pytest.mark.parametrize("settings", [{"name": name} for name in SAMPLERS] + [{"name": "ddim", "eta": 0.5}])
def test_samplers_that_draw_noise_are_not_compared_with_photographs(settings: dict[str, Any]) -> None:
    bundle = open_bundle(Path(__file__).parents[1] / "runtime/golden/bundle")
    config = SchedulerConfig(**settings)
    manifest = msgspec.structs.replace(bundle.manifest, scheduler=config)
    if config.draws_noise:
        with pytest.raises(UnsupportedError, match=f"sampler is {config.name}, which draws fresh noise"):
            check_manifest(manifest)
    else:
        check_manifest(manifest)
