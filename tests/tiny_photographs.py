"""Stand-ins for photographs: four classes, each of one colour, with waves and noise on them; and their classifier."""

from pathlib import Path

import numpy as np
from PIL import Image

from edgediff.data.image_folder import ImageSet
from edgediff.models.classifier import save_classifier
from edgediff.train.train_classifier import ClassifierRecipe, train_classifier

SIZE = 16
LABELS = ("Apple", "Banana", "Kiwi", "Orange")
RECIPE = ClassifierRecipe(widths=(6, 8), epochs=20, batch=20, learning_rate=0.02)


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


def make_photographs(counts: tuple[int, ...] = (18, 12, 6, 4), seed: int = 1, size: int = SIZE) -> ImageSet:
    """So many photographs of each class."""
    labels = np.repeat(np.arange(4), counts)
    rng = np.random.default_rng(seed)
    colours = np.array([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8], [0.7, 0.7, 0.2]])
    waves = 0.1 * np.sin(np.arange(size) * rng.uniform(0.3, 1.5, (len(labels), 1)))
    noisy = rng.normal(0, 0.05, (len(labels), size, size, 3))
    return ImageSet(as_bytes(colours[labels][:, None, None] + waves[:, None, :, None] + noisy), labels, LABELS)


def write_photographs(photographs: ImageSet, folder: Path) -> Path:
    """As an image folder."""
    for i, (image, label) in enumerate(zip(photographs.images, photographs.labels, strict=True)):
        (folder / photographs.names[label]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(folder / photographs.names[label] / f"{i:03}.png")
    return folder


def write_classifier(photographs: ImageSet, folder: Path) -> Path:
    """A tiny classifier's folder."""
    save_classifier(train_classifier(photographs, RECIPE).classifier, folder)
    return folder
