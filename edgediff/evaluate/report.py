"""How far a bundle's images are from photographs, clock by clock, beside how far photographs are from one another."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgediff.errors import ConfigError, ModelError, UnsupportedError
from edgediff.evaluate.distances import MIN_IMAGES, frechet_distance, kernel_distance
from edgediff.evaluate.features import Classifier, classifier_of, features_of, load_classifier
from edgediff.evaluate.generation import check_pixels, class_indices, generate
from edgediff.evaluate.spectra import band_gap, radial_spectrum, spectrum_error
from edgediff.train.data import read_images, shuffled
from edgediff.verify.backends import open_session, usual_backend
from edgediff_runtime import EdgePipeline, clock_mask, open_bundle
from edgediff_runtime.manifest import Manifest

NUM_IMAGES = 1000
BATCH = 50


class Distances(msgspec.Struct, frozen=True):
    """How far one set of images is from the reference.

    Attributes:
        kernel_distance: Unbiased, so that sets of one distribution come out around 0, on either side.
        kernel_spread: Its standard error, from subsets.
        frechet_distance: In squared units of the features; grows as sets get smaller.
        spectrum_error: Mean over the bands of |log10(power / reference power)|.
        band_gap: The same for each band, with its sign; band 0, the brightness, has no part in the mean.
    """

    kernel_distance: float
    kernel_spread: float
    frechet_distance: float
    spectrum_error: float
    band_gap: tuple[float, ...]


class ClockRow(msgspec.Struct, frozen=True):
    """What one clock's images come to.

    Attributes:
        clock: As it was asked for.
        mask: Spelt out, 1 = full.
        distances: From the reference.
        ratio: Its kernel distance over clock 1's; None where that was not measured or is not above 0.
    """

    clock: str
    mask: tuple[int, ...]
    distances: Distances
    ratio: float | None


class Evaluation(msgspec.Struct, frozen=True):
    """Distances of a bundle's images from photographs.

    Attributes:
        model: The bundle's source.
        backend: What ran the graphs.
        num_images: Images of each set: reference, floor, and one set for each clock.
        available: Images in the folder.
        features: The folder of the classifier that they are compared by.
        num_features: How many it has.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        seed: Of the noise, of the choice of photographs and of the spread.
        floor: Other photographs of the same folder against the reference.
        rows: In the order in which the clocks were given.
    """

    model: str
    backend: str
    num_images: int
    available: int
    features: str
    num_features: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    floor: Distances
    rows: tuple[ClockRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain data."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data


class Reference:
    """A set of images that others are compared with.

    Attributes:
        classifier: Whose features are compared.
    """

    def __init__(self, images: NDArray[np.uint8], classifier: Classifier, seed: int = 0) -> None:
        """Takes the features and the spectrum of the set.

        Args:
            images: uint8 [N, H, W, 3].
            classifier: Of that size.
            seed: Of the spread.
        """
        self.classifier = classifier
        self._seed = seed
        self._features = features_of(classifier, images)
        self._spectrum = radial_spectrum(images)

    def distances(self, images: NDArray[np.uint8]) -> Distances:
        """Compares a set.

        Args:
            images: uint8 [M, H, W, 3].

        Returns:
            Its distances.

        Raises:
            DataError: There are fewer than four images, or they are of another size.
        """
        spectrum = radial_spectrum(images)
        gap = band_gap(spectrum, self._spectrum)
        features = features_of(self.classifier, images)
        kernel = kernel_distance(features, self._features, self._seed)
        return Distances(
            kernel_distance=kernel.value,
            kernel_spread=kernel.spread,
            frechet_distance=frechet_distance(features, self._features),
            spectrum_error=spectrum_error(spectrum, self._spectrum),
            band_gap=tuple(float(value) for value in gap),
        )


def evaluate_bundle(
    bundle: str | Path,
    images: str | Path,
    *,
    clocks: Sequence[int | str] | None = None,
    num_images: int = NUM_IMAGES,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch: int = BATCH,
    backend: str | None = None,
    features: str | Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Evaluation:
    """Generates images with each clock and compares them with photographs.

    The photographs are put in a seeded order. The first `num_images` of them are the floor, the next the reference; a
    folder that has fewer than twice `num_images` makes all sets smaller, so that they stay of one size. Image i of
    every clock has the class of the floor's photograph i and the noise of image i under the seed, whatever the batch.

    Args:
        bundle: A bundle of a model that makes images.
        images: A folder with a subfolder for each class.
        clocks: Periods or masks of the full steps; clock 1 and the bundle's own where None.
        num_images: Images of each set.
        steps: Denoising steps; the bundle's where None.
        guidance_scale: Classifier-free guidance; the bundle's where None.
        seed: Of the noise, of the choice of photographs and of the spread.
        batch: Images generated at once; what it changes is memory.
        backend: What runs the graphs; the usual one where None.
        features: A classifier's folder; that of the built-in model that the bundle was made of where None.
        progress: Told what is being done.

    Returns:
        The distances.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: `num_images` or `batch` is too small.
        DataError: The folder cannot be read, or does not fit the bundle.
        ModelError: There are no features.
        RequestError: Something else that was asked does not fit the bundle.
        UnsupportedError: The bundle makes no images, or of another size than the classifier's.
    """
    if num_images < MIN_IMAGES:
        raise ConfigError(f"num_images is {num_images}; expected {MIN_IMAGES} or more")
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected a whole number above 0")
    progress(f"opening {bundle}")
    opened = open_bundle(bundle)
    manifest = opened.manifest
    point = manifest.operating_point
    steps = point.num_inference_steps if steps is None else steps
    guidance_scale = point.guidance_scale if guidance_scale is None else guidance_scale
    asked = [str(clock) for clock in ((1, point.clock) if clocks is None else clocks)]
    masks = {clock: clock_mask(clock, steps) for clock in asked}
    size = check_pixels(manifest)
    features = _features_folder(manifest) if features is None else features
    classifier = load_classifier(features)
    if classifier.shape.size != size:
        known = classifier.shape.size
        raise UnsupportedError(
            f"the classifier in {features} takes {known}x{known} pixels, the bundle makes {size}x{size}"
        )
    backend = usual_backend(opened) if backend is None else backend
    pipe = EdgePipeline(manifest, open_session(opened, backend))
    progress(f"loading images: {images}")
    real = read_images(images, size, minimum=2 * MIN_IMAGES)
    order = shuffled(len(real), seed)
    num_images = min(num_images, len(real) // 2)
    floor, reference = order[:num_images], order[num_images : 2 * num_images]
    classes = class_indices(manifest, real)
    drawn = None if classes is None else classes[floor]
    compared = Reference(real.images[reference], classifier, seed)
    found: dict[str, Distances] = {}
    for clock in masks:
        made: list[NDArray[np.uint8]] = []
        for chunk in generate(
            pipe, drawn, num_images,
            clock=clock, steps=steps, guidance_scale=guidance_scale, seed=seed, batch=batch,
        ):  # fmt: skip
            made.append(chunk)
            progress(f"drawing with clock {clock}: {sum(map(len, made))} of {num_images} images")
        found[clock] = compared.distances(np.concatenate(made))
    always = next((found[clock].kernel_distance for clock, mask in masks.items() if all(mask)), 0.0)
    return Evaluation(
        model=manifest.source.name,
        backend=backend,
        num_images=num_images,
        available=len(real),
        features=str(features),
        num_features=classifier.shape.widths[-1],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        floor=compared.distances(real.images[floor]),
        rows=tuple(
            ClockRow(
                clock=clock,
                mask=tuple(int(full) for full in masks[clock]),
                distances=distances,
                ratio=distances.kernel_distance / always if always > 0 else None,
            )
            for clock, distances in found.items()
        ),
    )


def _features_folder(manifest: Manifest) -> Path:
    source = manifest.source
    if source.path is not None:
        raise ModelError(f"no features for {source.path}: only built-in models bring a classifier; name one's folder")
    return classifier_of(source.name)
