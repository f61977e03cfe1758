"""How well does a small classifier tell an image folder's classes apart? Trains it, stores it, and says.

What it stores is what `edgediff evaluate --features` takes: of photographs by folders, for `evaluate distance`, or of
captioned drawings (--label), for `evaluate retrieval`. The accuracy is measured on the stored fp16 weights, on images
that training did not see; drawings are those that the folder's column split holds out.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

import msgspec
import numpy as np
import torch
from measure import machine

from edgediff.cli.app import read_only
from edgediff.data.captions import read_captioned, values_of
from edgediff.data.image_folder import ImageSet, divide, read_images
from edgediff.models.classifier import Classifier, features_of, load_classifier, ranks_of, save_classifier, scores_of
from edgediff.train.train_classifier import ClassifierRecipe, train_classifier

HELD_OUT = 0.1
# Of drawings: the first convolution halves the map, which costs little accuracy and saves three quarters of the time.
DRAWINGS = ClassifierRecipe(widths=(24, 64, 128, 256), stride=2, epochs=60, distorts=True)
Styles = tuple[str, ...]


def main() -> None:
    """Reads the options, trains, stores and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, required=True, help="a folder with a subfolder for each class, or captioned"
    )
    parser.add_argument("--held-out", type=Path, help="another such folder; left out, a tenth of each class is held")
    parser.add_argument("--label", help="of captioned drawings: the column of what is told apart")
    parser.add_argument("--style", help="of captioned drawings: the column that a second head tells apart")
    parser.add_argument("--only", action="append", metavar="COLUMN=FILE", help="drawings whose column is in the file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the classifier is to be")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, help="passes over the images at most")
    parser.add_argument("--minutes", type=float, help="wall-clock time at most")
    parser.add_argument("--seed", type=int, default=ClassifierRecipe().seed)
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number rounds otherwise")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    recipe, sets = _photographs(given) if given.label is None else _drawings(given)
    (data, styles), (held_out, _) = sets
    print(f"{len(data)} images to train on, {len(held_out)} held out, {len(data.names)} classes")
    start = monotonic()
    changes = {"minutes": given.minutes, "seed": given.seed, "epochs": given.epochs or recipe.epochs}
    trained = train_classifier(data, msgspec.structs.replace(recipe, **changes), _told_after(start), styles)
    save_classifier(trained.classifier, given.output)
    stored = load_classifier(given.output)
    parameters = sum(parameter.numel() for parameter in stored.parameters())
    print(f"{parameters:,} parameters, {trained.steps} steps in {monotonic() - start:.0f} s, loss {trained.loss:.3f}")
    for what, (each, of) in zip(("trained on", "held out"), sets, strict=True):
        print(f"{what}: {_accuracies(stored, each, of)}")


def _photographs(given: argparse.Namespace) -> tuple[ClassifierRecipe, tuple[tuple[ImageSet, Styles], ...]]:
    data = read_images(given.images, given.size)
    if given.held_out is None:
        data, held_out = divide(data, HELD_OUT, given.seed)
    else:
        held_out = read_images(given.held_out, given.size)
    return ClassifierRecipe(), ((data, ()), (held_out, ()))


def _drawings(given: argparse.Namespace) -> tuple[ClassifierRecipe, tuple[tuple[ImageSet, Styles], ...]]:
    columns = [given.label, *([] if given.style is None else [given.style])]
    read = read_captioned(given.images, given.size, tuple(f"{{{column}}}" for column in columns), read_only(given.only))
    names = tuple(sorted({name for data in read for name in values_of(data, 0)}))
    sets = [_labelled(data, names, given.style is not None) for data in read]
    return DRAWINGS, tuple(sets)


def _labelled(data: ImageSet, names: tuple[str, ...], has_styles: bool) -> tuple[ImageSet, Styles]:
    labels = np.array([names.index(name) for name in values_of(data, 0)], dtype=np.int64)
    return replace(data, labels=labels, names=names), values_of(data, 1) if has_styles else ()


def _accuracies(classifier: Classifier, data: ImageSet, styles: Sequence[str]) -> str:
    scores, *others = scores_of(classifier, features_of(classifier, data.images))
    known = classifier.shape.labels
    ranks = ranks_of(scores, np.array([known.index(name) for name in data.names])[data.labels])
    words = f"top 1 {np.mean(ranks == 1):.1%}, top 5 {np.mean(ranks <= 5):.1%}"
    if not styles:
        return words
    named = [classifier.shape.styles[i] for i in others[0].argmax(axis=1)]
    return f"{words}, style {np.mean(np.array(named) == np.array(styles)):.1%}"


def _told_after(start: float) -> Callable[[str], None]:
    return lambda what: print(f"{monotonic() - start:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
