"""How well does a small classifier tell an image folder's classes apart? Trains it, stores it, and says.

What it stores is what `edgediff evaluate distance --features` takes, and how the classifier in edgediff/zoo was made.
The accuracy is measured on the stored fp16 weights, on images that training did not see.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch
from measure import machine

from edgediff.data.image_folder import divide, read_images
from edgediff.models.classifier import accuracy_of, load_classifier, save_classifier
from edgediff.train.train_classifier import ClassifierRecipe, train_classifier

HELD_OUT = 0.1


def main() -> None:
    """Reads the options, trains, stores and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder with a subfolder for each class")
    parser.add_argument("--held-out", type=Path, help="another such folder; left out, a tenth of each class is held")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the classifier is to be")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=ClassifierRecipe.epochs, help="passes over the images at most")
    parser.add_argument("--minutes", type=float, help="wall-clock time at most")
    parser.add_argument("--seed", type=int, default=ClassifierRecipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number rounds otherwise")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    data = read_images(given.images, given.size)
    if given.held_out is None:
        data, held_out = divide(data, HELD_OUT, given.seed)
    else:
        held_out = read_images(given.held_out, given.size)
    print(f"{len(data)} images to train on, {len(held_out)} held out, {len(data.names)} classes")
    start = monotonic()
    recipe = ClassifierRecipe(epochs=given.epochs, minutes=given.minutes, seed=given.seed)
    trained = train_classifier(data, recipe, _told_after(start))
    save_classifier(trained.classifier, given.output)
    stored = load_classifier(given.output)
    parameters = sum(parameter.numel() for parameter in stored.parameters())
    print(f"{parameters:,} parameters, {trained.steps} steps in {monotonic() - start:.0f} s, loss {trained.loss:.3f}")
    print(f"accuracy: {accuracy_of(stored, held_out):.1%} held out, {accuracy_of(stored, data):.1%} trained on")


def _told_after(start: float) -> Callable[[str], None]:
    return lambda what: print(f"{monotonic() - start:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
