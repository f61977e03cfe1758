"""``edgediff evaluate retrieval``: is a picture the thing that its prompt asks for? A classifier of drawings says."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.data.captions import TAUGHT, TEXT, read_captioned, values_of
from edgediff.data.image_folder import ImageSet, shuffled
from edgediff.errors import ConfigError, DataError
from edgediff.evaluate.charts import PROMPTS_SHOWN, Sheet, check_grid, draw_sheets
from edgediff.evaluate.distance import Examined, compare, examine
from edgediff.evaluate.metrics import MIN_IMAGES
from edgediff.evaluate.neighbours import SUSPICIOUS, nearest_neighbours
from edgediff.evaluate.processes import Processes
from edgediff.evaluate.report import Answer, Asked, Recognised, Retrieval
from edgediff.evaluate.sampler import BATCH, Mask, Say, check_batch, check_size, chunks
from edgediff.evaluate.text_sampler import open_text_sampler
from edgediff.models.classifier import Classifier, built_in_classifier, load_classifier, ranks_of, scores_of
from edgediff.outputs import write_whole

HELD_OUT = "test"
SPLITS = (TAUGHT, HELD_OUT)
LABEL, STYLE = "name", "style"
TOP = 5

Ints = NDArray[np.int64]


def evaluate_retrieval(
    source: str | Path,
    images: str | Path,
    *,
    only: Mapping[str, str] | None = None,
    split: str | None = None,
    num_prompts: int = 0,
    label: str = LABEL,
    style: str = STYLE,
    clocks: Sequence[int | str] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    batch: int = BATCH,
    backend: str | None = None,
    features: str | Path | None = None,
    grid: str | Path | None = None,
    progress: Say = lambda what: None,
) -> Retrieval:
    """Draws the captions of a folder of drawings with each clock, and asks a classifier what the pictures are.

    The captions of each split are put in a seeded order and the first `num_prompts` are drawn. Image i of a split has
    the noise of image i under the seed, with every clock and batch.

    Args:
        source: A bundle, or the directory of a diffusers pipeline.
        images: Captioned drawings: metadata.jsonl with ``text``, the columns `label` and `style`, and ``split``.
        only: By column, a file of the values to keep, one a line.
        split: ``train`` or ``test``; None asks for both, each in lines of its own.
        num_prompts: At most so many of each split; 0 for all.
        style: The column of styles; not read where the classifier knows none.
        clocks, steps, guidance_scale: None: of a bundle 1 and its own clock, and its operating point; of a model clock
            1, and what is usual for it.
        scheduler, backend: Of a model (None: its own) and of a bundle (None: the usual one).
        features: The classifier's folder. None: a built-in one that knows the things.
        grid: A .png to write: the first pictures with their prompts.

    Raises:
        BundleError, ModelError: The source cannot be read, or there is no classifier.
        ConfigError, RequestError: An option is out of range, or a column is not there.
        DataError, TargetError: The folder cannot be read, the classifier does not know a thing, too few prompts are
            left; the grid cannot be written.
        UnsupportedError: The source takes no prompts, or makes pictures of another size than the classifier's.
    """
    check_batch(batch)
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected {' or '.join(SPLITS)}")
    if num_prompts < 0:
        raise ConfigError(f"num_prompts is {num_prompts}; expected 0, for all, or more")
    if grid is not None:
        check_grid(Path(grid))
    processes = Processes.launched()
    if processes.count > 1:
        raise ConfigError(f"evaluate retrieval runs on one process, not on {processes.count}")
    progress(f"opening {source}")
    sampler = open_text_sampler(source, backend=backend, scheduler=scheduler, device=processes.device)
    steps = sampler.steps if steps is None else steps
    guidance_scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    asked = [str(clock) for clock in (sampler.clocks if clocks is None else clocks)]
    masks = {clock: sampler.check(clock, steps, guidance_scale, seed) for clock in asked}
    progress(f"reading drawings: {images}")
    read = partial(read_captioned, images, sampler.size, only=only)
    if features is None:
        things = {name for each in read(forms=(f"{{{label}}}",)) for name in values_of(each, 0)}
        features = built_in_classifier(tuple(things), sampler.size)
    classifier = load_classifier(features).to(processes.device)
    check_size(classifier, features, sampler.size, sampler.kind)
    columns = (label, style) if classifier.shape.styles else (label,)
    data = dict(zip(SPLITS, read(forms=tuple(f"{{{column}}}" for column in (TEXT, *columns))), strict=True))
    taught, held_out = (data[each].images for each in SPLITS)
    near = nearest_neighbours(held_out, taught) if len(held_out) else None
    threshold = None if near is None else float(np.quantile(near.distance, SUSPICIOUS))
    splits = [each for each in SPLITS if len(data[each])] if split is None else [split]
    sets = [_choose(each, data[each], num_prompts, seed, classifier, images) for each in splits]
    draw = partial(sampler.draw, steps=steps, guidance_scale=guidance_scale, seed=seed)
    rows, sheets = [], []
    for clock, mask in masks.items():
        for prompts in sets:
            made = []
            for numbers in chunks(len(prompts.texts), batch):
                made.append(draw(prompts.texts[numbers.start : numbers.stop], numbers.start, clock=clock))
                done = f"{numbers.stop} of {len(prompts.texts)}"
                progress(f"drawing with clock {clock}, {prompts.split} prompts: {done} images")
            pictures = np.concatenate(made)
            row = _answer(clock, mask, prompts, examine(pictures, classifier, taught), classifier, threshold, seed)
            rows.append(row)
            sheets.append(_sheet(row, prompts, pictures))
    if grid is not None:
        progress("drawing the grid")
        write_whole(Path(grid), partial(draw_sheets, sheets, sampler.name))
    return Retrieval(
        model=sampler.name,
        backend=sampler.backend,
        scheduler=sampler.scheduler.recipe_name,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        images=str(images),
        features=str(features),
        num_labels=len(classifier.shape.labels),
        num_train=len(taught),
        threshold=threshold,
        asked=tuple(Asked(each.split, each.texts, _recognise(each.drawings, each, classifier)[0]) for each in sets),
        held_out=None if near is None or threshold is None else near.closeness(threshold),
        rows=tuple(rows),
        skipped=data[TAUGHT].skipped.in_words(),
    )


@dataclass(frozen=True, eq=False)
class _Prompts:
    """The prompts of a split: texts, the real drawings [N, H, W, 3] as examined, and what they are.

    `labels` and `styles`, int64 [N], are the classifier's; no styles where it knows none.
    """

    split: str
    texts: tuple[str, ...]
    drawings: Examined
    labels: Ints
    styles: Ints | None


def _choose(
    split: str, data: ImageSet, num_prompts: int, seed: int, classifier: Classifier, images: str | Path
) -> _Prompts:
    """The first prompts of a split in a seeded order; a DataError for too few, or for what the classifier lacks."""
    count = min(num_prompts, len(data)) if num_prompts else len(data)
    if count < MIN_IMAGES:
        raise DataError(
            f"{images}: {count} prompts are left of split {split}; expected {MIN_IMAGES} or more: change --only, "
            "--split or --num-prompts"
        )
    chosen = data.take(shuffled(len(data), seed)[:count])
    known = [classifier.shape.labels, *([classifier.shape.styles] if classifier.shape.styles else [])]
    found = [_indices(values_of(chosen, 1 + i), each, images) for i, each in enumerate(known)]
    return _Prompts(
        split=split,
        texts=values_of(chosen, 0),
        drawings=examine(chosen.images, classifier),
        labels=found[0],
        styles=found[1] if len(found) > 1 else None,
    )


def _indices(values: Sequence[str], known: tuple[str, ...], images: str | Path) -> Ints:
    places = {name: i for i, name in enumerate(known)}
    strange = sorted({*values} - {*places})
    if strange:
        raise DataError(
            f"{images}: the classifier does not know {strange[0]!r}{_more(len(strange) - 1)} among its {len(known)}; "
            "leave such prompts out (--only), or train a classifier that does"
        )
    return np.array([places[value] for value in values], dtype=np.int64)


def _more(count: int) -> str:
    return f" and {count} others" if count else ""


def _answer(
    clock: str,
    mask: Mask,
    prompts: _Prompts,
    made: Examined,
    classifier: Classifier,
    threshold: float | None,
    seed: int,
) -> Answer:
    found, ranks, first = _recognise(made, prompts, classifier)
    assert made.nearest is not None
    size, count = classifier.shape.size, len(ranks)
    return Answer(
        clock=clock,
        mask=tuple(map(int, mask)),
        split=prompts.split,
        found=found,
        distances=compare(made, prompts.drawings, size=size, num_equal=count, seed=seed),
        nearest=None if threshold is None else made.nearest.closeness(threshold),
        ranks=tuple(ranks.tolist()),
        taken_for=tuple(classifier.shape.labels[i] for i in first),
    )


def _recognise(examined: Examined, prompts: _Prompts, classifier: Classifier) -> tuple[Recognised, Ints, Ints]:
    """How many are what is asked for; the rank of what is, from 1, and the classifier's first choice, int64 [N]."""
    scores, *others = scores_of(classifier, examined.features)
    ranks = ranks_of(scores, prompts.labels)
    style = None if prompts.styles is None else float((others[0].argmax(axis=1) == prompts.styles).mean())
    (top_1, spread_1), (top_5, spread_5) = (_share(ranks <= top) for top in (1, TOP))
    found = Recognised(len(ranks), top_1, spread_1, top_5, spread_5, style)
    return found, ranks, scores.argmax(axis=1)


def _share(hits: NDArray[np.bool_]) -> tuple[float, float]:
    """A share and its standard error."""
    share = float(hits.mean())
    return share, math.sqrt(share * (1 - share) / len(hits))


def _sheet(row: Answer, prompts: _Prompts, pictures: NDArray[np.uint8]) -> Sheet:
    """The first pictures, with what was asked for and, where that is not it, what the classifier takes them for."""
    words = [
        text if rank == 1 else f"{text}\n{rank}: {taken}"
        for text, rank, taken in zip(prompts.texts, row.ranks, row.taken_for, strict=True)
    ]
    title = (
        f"clock {row.clock}, {row.split} prompts: {row.found.top_1:.0%} first, {row.found.top_5:.0%} in the top {TOP}"
    )
    return Sheet(title, pictures[:PROMPTS_SHOWN], words[:PROMPTS_SHOWN])
