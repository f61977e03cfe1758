"""``edgediff evaluate distance``: images of a bundle or a model, compared with photographs, clock by clock."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.data.classes import class_indices
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.evaluate.distances import MIN_IMAGES
from edgediff.evaluate.neighbours import SUSPICIOUS, Nearest, closeness
from edgediff.evaluate.photographs import Photographs
from edgediff.evaluate.processes import Processes
from edgediff.evaluate.report import ClockRow, Evaluation, Reference, Yardstick
from edgediff.evaluate.row import Row
from edgediff.evaluate.sampler import Sampler, open_sampler
from edgediff.evaluate.suspects import Group, check_picture, draw_suspects, most_suspicious
from edgediff.evaluate.traits import Examiner, Traits
from edgediff.models.classifier import Classifier, accuracy_of, built_in_classifier, load_classifier

NUM_IMAGES = 1000
BATCH = 50

Say = Callable[[str], None]
Masks = dict[str, tuple[bool, ...]]


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
    the reference; a folder that has fewer than twice `num_images` makes all sets smaller: they stay of one size. With
    `train` all photographs of `images`, which the model has not seen, are the reference; as many of the training
    photographs, the first in a seeded order, are the floor; and the nearest training photograph of each image is looked
    for.

    Image i of every clock has the noise of image i under the seed, and the class of the i-th photograph in the order
    that the floor begins, whatever the batch and the number of processes.

    Args:
        source: A bundle, a diffusers directory or a built-in name; of a model that makes images.
        images: A folder with a subfolder for each class, or, of an unconditional model, images alone.
        train: Another, of the photographs that the model was trained on.
        clocks: Periods or masks of the full steps; clock 1 and the bundle's own where None, of a model clock 1.
        num_images: Images of each set; with `train`, of each generated one.
        steps: Denoising steps; the bundle's where None, 8 of a model.
        guidance_scale: Classifier-free guidance; the bundle's, or what is usual for the model, where None.
        scheduler: Of a model; dpmpp_2m where None.
        seed: Of the noise, of the choice of photographs and of the spread.
        batch: Images generated at once; what it changes is memory.
        backend: What runs a bundle's graphs; the usual one where None.
        features: A classifier's folder; the built-in one of the classes where None.
        grid: A .png to be: the images that are nearest to training photographs, and those.
        progress: Told what is being done.

    Returns:
        The distances; None on all processes but the main one.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: `num_images` or `batch` is too small, or an option does not fit the source.
        DataError: A folder cannot be read, or does not fit the source.
        MissingExtraError: accelerate or matplotlib is not installed and needed.
        ModelError: There are no features, or the model cannot be read.
        RequestError: Something else that was asked does not fit the source.
        TargetError: The grid cannot be written where it is to be.
        UnsupportedError: The source makes no images, or of another size than the classifier's.
    """
    if num_images < MIN_IMAGES:
        raise ConfigError(f"num_images is {num_images}; expected {MIN_IMAGES} or more")
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected a whole number above 0")
    if grid is not None:
        check_picture(Path(grid), train)
    processes = Processes.launched()
    say = progress if processes.is_main else _silent
    say(f"opening {source}")
    sampler = open_sampler(
        source, backend=backend, scheduler=scheduler, device=processes.device, warn=processes.is_main
    )
    steps = sampler.steps if steps is None else steps
    guidance_scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    asked = [str(clock) for clock in (sampler.clocks if clocks is None else clocks)]
    masks = {clock: sampler.check(clock, steps, guidance_scale, seed) for clock in asked}
    home = built_in_classifier(sampler.labels, sampler.size) if features is None else Path(features)
    classifier = _classifier(home, sampler).to(processes.device)
    say(f"loading images: {images}")
    if train is None:
        photographs = Photographs.halves(images, sampler.size, num_images, seed)
        num_images = len(photographs.floor)
    else:
        photographs = Photographs.with_train(images, train, sampler.size, seed)
    row = Row(sampler, num_images, _classes(sampler, photographs, num_images), guidance_scale, seed)
    examiner = Examiner(classifier, None if photographs.train is None else photographs.train.images)
    made = {clock: _generate(row, clock, mask, batch, examiner, processes, say) for clock, mask in masks.items()}
    processes.leave()
    if not processes.is_main:
        return None
    real, floor = examiner.examine(photographs.reference.images), examiner.examine(photographs.floor.images, False)
    num_equal = min(num_images, len(real), len(floor))
    reference = Reference(real, sampler.size, num_equal, seed)
    yardstick = None
    if photographs.train is not None and real.nearest is not None:
        near = real.nearest.distance
        threshold = float(np.quantile(near, SUSPICIOUS))
        yardstick = Yardstick(str(train), len(photographs.train), closeness(near, threshold), threshold)
        if grid is not None:
            say("drawing the grid")
            groups = [_held_out(photographs, real.nearest), *_groups(row, masks, made)]
            draw_suspects(groups, photographs.train.images, threshold, sampler.name, Path(grid))
    return Evaluation(
        model=sampler.name,
        backend=sampler.backend,
        scheduler=sampler.scheduler_name,
        num_images=num_images,
        num_reference=len(real),
        num_floor=len(floor),
        num_equal=num_equal,
        available=photographs.available,
        features=str(home),
        num_features=classifier.shape.widths[-1],
        accuracy=_accuracy(classifier, photographs),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        processes=processes.count,
        floor=reference.distances(floor),
        yardstick=yardstick,
        rows=_rows(masks, made, reference, yardstick),
        skipped=photographs.skipped,
    )


def _silent(what: str) -> None:
    """Tells nobody."""


def _classifier(home: Path, sampler: Sampler) -> Classifier:
    classifier = load_classifier(home)
    known, size = classifier.shape.size, sampler.size
    if known != size:
        raise UnsupportedError(
            f"the classifier in {home} takes {known}x{known} pixels, the {sampler.kind} makes {size}x{size}"
        )
    return classifier


def _classes(sampler: Sampler, photographs: Photographs, num_images: int) -> NDArray[np.int64] | None:
    """The class of each image of the row: those of photographs, in turns."""
    if photographs.reference.names:
        class_indices(sampler.labels, photographs.reference, sampler.kind)
    classes = class_indices(sampler.labels, photographs.classes_of, sampler.kind)
    return None if classes is None else np.resize(classes, num_images)


def _generate(
    row: Row, clock: str, mask: tuple[bool, ...], batch: int, examiner: Examiner, processes: Processes, say: Say
) -> Traits:
    """Makes this process's share of a row, chunk by chunk, and brings what all processes keep together."""
    mine = processes.share(row.chunks(batch))
    total, done = sum(map(len, mine)), 0
    where = "" if processes.count == 1 else f" of the first of {processes.count} processes"
    found = []
    for numbers in mine:
        found.append(examiner.examine(row.draw(numbers, mask)))
        done += len(numbers)
        say(f"drawing with clock {clock}: {done} of {total} images{where}")
    return Traits.joined(processes.gather(found))


def _rows(
    masks: Masks, made: dict[str, Traits], reference: Reference, yardstick: Yardstick | None
) -> tuple[ClockRow, ...]:
    distances = {clock: reference.distances(traits) for clock, traits in made.items()}
    always = next((distances[clock].kernel_distance for clock, mask in masks.items() if all(mask)), 0.0)
    return tuple(
        ClockRow(
            clock=clock,
            mask=tuple(int(full) for full in masks[clock]),
            distances=distances[clock],
            ratio=distances[clock].kernel_distance / always if always > 0 else None,
            closeness=None
            if traits.nearest is None or yardstick is None
            else closeness(traits.nearest.distance, yardstick.threshold),
            suspects=() if traits.nearest is None else most_suspicious(traits.nearest),
        )
        for clock, traits in made.items()
    )


def _held_out(photographs: Photographs, nearest: Nearest) -> Group:
    suspects = most_suspicious(nearest)
    shown = photographs.reference.images[[each.image for each in suspects]]
    return Group("photographs held out", shown, suspects, nearest.distance)


def _groups(row: Row, masks: Masks, made: dict[str, Traits]) -> list[Group]:
    """What the grid shows of each clock: its images were not kept, so those few are made again."""
    groups = []
    for clock, traits in made.items():
        assert traits.nearest is not None
        suspects = most_suspicious(traits.nearest)
        drawn = row.draw([each.image for each in suspects], masks[clock])
        groups.append(Group(f"clock {clock}", drawn, suspects, traits.nearest.distance))
    return groups


def _accuracy(classifier: Classifier, photographs: Photographs) -> float | None:
    """How well the classifier does on photographs that were held out; not known of a folder that it may have seen."""
    real = photographs.reference
    if photographs.train is None or not real.names or not {*real.names} <= {*classifier.shape.labels}:
        return None
    return accuracy_of(classifier.cpu(), real)
