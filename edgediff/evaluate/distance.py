"""``edgediff evaluate distance``: images of a bundle or a model, compared with photographs, clock by clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.data.image_folder import ImageSet, class_indices, read_images, shuffled
from edgediff.errors import ConfigError, DataError
from edgediff.evaluate.charts import Group, check_grid, draw_suspects
from edgediff.evaluate.frequency import band_gap, radial_spectrum, spectrum_error, top_octaves
from edgediff.evaluate.metrics import MIN_IMAGES, Features, frechet_distance, kernel_distance, precision_recall
from edgediff.evaluate.neighbours import SUSPICIOUS, Nearest, nearest_neighbours
from edgediff.evaluate.processes import Processes
from edgediff.evaluate.report import ClockResult, Distances, Evaluation, Yardstick
from edgediff.evaluate.sampler import BATCH, Mask, Sampler, Say, check_counts, check_size, chunks, open_sampler
from edgediff.models.classifier import Classifier, accuracy_of, built_in_classifier, features_of, load_classifier
from edgediff.outputs import write_whole

NUM_IMAGES = 1000


def evaluate_distance(
    source: str | Path,
    images: str | Path,
    *,
    train: str | Path | None = None,
    clocks: Sequence[int | str] | None = None,
    num_images: int = NUM_IMAGES,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    batch: int = BATCH,
    backend: str | None = None,
    features: str | Path | None = None,
    grid: str | Path | None = None,
    progress: Say = lambda what: None,
) -> Evaluation | None:
    """Generates images with each clock and compares them with photographs.

    Without `train` the photographs are put in a seeded order: the first `num_images` of them are the floor, the next
    the reference; with fewer than twice `num_images` photographs all sets get smaller. With `train` all photographs of
    `images`, which the model must not have seen, are the reference; as many training photographs, the first in a seeded
    order, are the floor; and the nearest training photograph of each image is found.

    Image i of every clock has the noise of image i under the seed, and the class of the i-th photograph in the order
    that the floor begins, whatever the batch and the number of processes.

    Args:
        source: A bundle, a diffusers directory or a built-in name.
        images, train: Folders with a subfolder for each class, or, of an unconditional model, images alone.
        clocks: Periods or masks. None: 1 and the bundle's own; of a model, 1.
        steps, guidance_scale: None: the bundle's; of a model 8, and what is usual for it.
        scheduler, backend: Of a model (None: dpmpp_2m) and of a bundle (None: the usual one).
        features: A classifier's folder. None: the built-in one of the classes.
        grid: A .png to write: the images nearest to training photographs, above those.

    Returns:
        The distances; None on all processes but the main one.

    Raises:
        BundleError, ModelError: The bundle or the model cannot be read, or there are no features.
        ConfigError, RequestError: An option is out of range or does not fit the source.
        DataError, TargetError: A folder cannot be read or does not fit the source; the grid cannot be written.
        MissingExtraError: accelerate or matplotlib is needed and not installed.
        UnsupportedError: The source makes no images, or of another size than the classifier's.
    """
    check_counts(num_images, batch)
    if grid is not None:
        if train is None:
            raise ConfigError("the grid shows the nearest training photographs; name their folder: --train DIR")
        check_grid(Path(grid))
    processes = Processes.launched()
    say = progress if processes.is_main else (lambda what: None)
    say(f"opening {source}")
    sampler = open_sampler(
        source, backend=backend, scheduler=scheduler, device=processes.device, warn=processes.is_main
    )
    steps = sampler.steps if steps is None else steps
    guidance_scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    asked = [str(clock) for clock in (sampler.clocks if clocks is None else clocks)]
    masks = {clock: sampler.check(clock, steps, guidance_scale, seed) for clock in asked}
    home = built_in_classifier(sampler.labels, sampler.size) if features is None else Path(features)
    classifier = load_classifier(home).to(processes.device)
    check_size(classifier, home, sampler.size, sampler.kind)
    say(f"loading images: {images}")
    photographs = _read_photographs(images, train, sampler.size, num_images, seed)
    if train is None:
        num_images = len(photographs.floor)
    seen = None if photographs.train is None else photographs.train.images
    classes = _classes(sampler, photographs, num_images)
    draw = partial(sampler.draw, classes=classes, guidance_scale=guidance_scale, seed=seed)
    mine = processes.share(chunks(num_images, batch))
    where = "" if processes.count == 1 else f" of the first of {processes.count} processes"

    def generate(clock: str) -> Examined:
        found, done = [], 0
        for numbers in mine:
            found.append(examine(draw(numbers, masks[clock]), classifier, seen))
            done += len(numbers)
            say(f"drawing with clock {clock}: {done} of {sum(map(len, mine))} images{where}")
        return _joined(processes.gather(found))

    made = {clock: generate(clock) for clock in masks}
    processes.leave()
    if not processes.is_main:
        return None
    real = examine(photographs.reference.images, classifier, seen)
    floor = examine(photographs.floor.images, classifier)
    num_equal = min(num_images, len(real.features), len(floor.features))
    against = partial(compare, reference=real, size=sampler.size, num_equal=num_equal, seed=seed)
    yardstick = None
    if photographs.train is not None and real.nearest is not None:
        threshold = float(np.quantile(real.nearest.distance, SUSPICIOUS))
        yardstick = Yardstick(str(train), len(photographs.train), real.nearest.closeness(threshold), threshold)
        if grid is not None:
            say("drawing the grid")
            # Generated images were not kept: these few are made again.
            groups = [_group("photographs held out", real, lambda numbers: photographs.reference.images[numbers])]
            groups += [_group(f"clock {clock}", made[clock], partial(draw, mask=masks[clock])) for clock in masks]
            train_images = photographs.train.images
            write_whole(Path(grid), partial(draw_suspects, groups, train_images, threshold, sampler.name))
    return Evaluation(
        model=sampler.name,
        backend=sampler.backend,
        scheduler=sampler.scheduler_name,
        num_images=num_images,
        num_reference=len(real.features),
        num_floor=len(floor.features),
        num_equal=num_equal,
        available=photographs.available,
        features=str(home),
        num_features=classifier.shape.widths[-1],
        accuracy=_accuracy(classifier, photographs),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        processes=processes.count,
        floor=against(floor),
        yardstick=yardstick,
        rows=_results(masks, made, {clock: against(each) for clock, each in made.items()}, yardstick),
        skipped=photographs.skipped,
    )


@dataclass(frozen=True, eq=False)
class _Photographs:
    """The sets of photographs; generated images have the classes of `classes_of`, which begins with the floor."""

    reference: ImageSet
    floor: ImageSet
    classes_of: ImageSet
    train: ImageSet | None
    available: int
    skipped: str


def _read_photographs(
    images: str | Path, train: str | Path | None, size: int, num_images: int, seed: int
) -> _Photographs:
    """Divides one folder into floor and reference, of one size; with training photographs, takes the floor of those."""
    if train is None:
        real = read_images(images, size, minimum=2 * MIN_IMAGES)
        order = shuffled(len(real), seed)
        count = min(num_images, len(real) // 2)
        floor = real.take(order[:count])
        return _Photographs(real.take(order[count : 2 * count]), floor, floor, None, len(real), real.skipped.in_words())
    if Path(images).resolve() == Path(train).resolve():
        raise DataError(f"{images} is also the folder of the training photographs; expected photographs held out")
    real, seen = (read_images(folder, size, minimum=MIN_IMAGES) for folder in (images, train))
    ordered = seen.take(shuffled(len(seen), seed))
    floor = ordered.take(np.arange(min(len(real), len(ordered))))
    skipped = [f"{f}: {each.skipped.in_words()}" for f, each in ((images, real), (train, seen)) if each.skipped.count]
    return _Photographs(real.take(shuffled(len(real), seed)), floor, ordered, seen, len(real), "; ".join(skipped))


def _classes(sampler: Sampler, photographs: _Photographs, num_images: int) -> NDArray[np.int64] | None:
    """The class of each image to generate: those of photographs, in turns."""
    if photographs.reference.names:
        class_indices(sampler.labels, photographs.reference, sampler.kind)
    classes = class_indices(sampler.labels, photographs.classes_of, sampler.kind)
    return None if classes is None else np.resize(classes, num_images)


@dataclass(frozen=True, eq=False)
class Examined:
    """What is kept of a set of images: features [N, F], mean power [bands], and the nearest training photographs."""

    features: Features
    spectrum: NDArray[np.float64]
    nearest: Nearest | None


def examine(images: NDArray[np.uint8], classifier: Classifier, train: NDArray[np.uint8] | None = None) -> Examined:
    """Takes from images, uint8 [N, H, W, 3], what they are compared by."""
    return Examined(
        features=features_of(classifier, images),
        spectrum=radial_spectrum(images),
        nearest=None if train is None else nearest_neighbours(images, train),
    )


def _joined(parts: Sequence[Examined]) -> Examined:
    """One set of several, in their order."""
    near = [part.nearest for part in parts if part.nearest is not None]
    return Examined(
        features=np.concatenate([part.features for part in parts]),
        spectrum=np.average([part.spectrum for part in parts], axis=0, weights=[len(part.features) for part in parts]),
        nearest=Nearest(*map(np.concatenate, zip(*near, strict=True))) if near else None,
    )


def compare(examined: Examined, reference: Examined, *, size: int, num_equal: int, seed: int) -> Distances:
    """Compares a set of images, of size x size pixels, with the reference; `num_equal` of each where numbers matter.

    DataError: a set has fewer than four images or fewer than `num_equal`, or a feature is not finite.
    """
    kernel = kernel_distance(examined.features, reference.features, seed)
    made, real = examined.features[:num_equal], reference.features[:num_equal]
    cover = precision_recall(made, real)
    spectra = examined.spectrum, reference.spectrum
    return Distances(
        kernel_distance=kernel.value,
        kernel_spread=kernel.spread,
        frechet_distance=frechet_distance(made, real),
        precision=cover.precision,
        recall=cover.recall,
        spectrum_error=spectrum_error(*spectra),
        spectrum_error_top=spectrum_error(*spectra, top_octaves(size)),
        band_gap=tuple(band_gap(*spectra).tolist()),
    )


def _results(
    masks: dict[str, Mask], made: dict[str, Examined], distances: dict[str, Distances], yardstick: Yardstick | None
) -> tuple[ClockResult, ...]:
    always = next((distances[clock].kernel_distance for clock, mask in masks.items() if all(mask)), 0.0)
    return tuple(
        ClockResult(
            clock=clock,
            mask=tuple(map(int, masks[clock])),
            distances=distances[clock],
            ratio=distances[clock].kernel_distance / always if always > 0 else None,
            closeness=None if near is None or yardstick is None else near.closeness(yardstick.threshold),
            suspects=() if near is None else near.suspects(),
        )
        for clock, near in ((clock, each.nearest) for clock, each in made.items())
    )


def _group(name: str, examined: Examined, draw: Callable[[list[int]], NDArray[np.uint8]]) -> Group:
    assert examined.nearest is not None
    return Group(name, draw([each.image for each in examined.nearest.suspects()]), examined.nearest)


def _accuracy(classifier: Classifier, photographs: _Photographs) -> float | None:
    """The classifier's accuracy on photographs held out; None where it may have been trained on them."""
    real = photographs.reference
    if photographs.train is None or not real.names or not {*real.names} <= {*classifier.shape.labels}:
        return None
    return accuracy_of(classifier.cpu(), real)
