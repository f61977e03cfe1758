"""Which photographs are compared with which: the reference, and others that say how far photographs are from those."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediff.data.image_folder import ImageSet, read_images, shuffled
from edgediff.errors import DataError
from edgediff.evaluate.distances import MIN_IMAGES


@dataclass(frozen=True, eq=False)
class Photographs:
    """The sets of an evaluation.

    Attributes:
        reference: What everything is compared with.
        floor: Other photographs, compared with the reference like generated images.
        classes_of: The photographs whose classes generated images have, in turns; they begin with the floor.
        train: What the model was trained on, where that was named.
        available: How many the reference's folder has.
        skipped: Files that were left out, and why; empty where there are none.
    """

    reference: ImageSet
    floor: ImageSet
    classes_of: ImageSet
    train: ImageSet | None
    available: int
    skipped: str

    @classmethod
    def halves(cls, images: str | Path, size: int, num_images: int, seed: int) -> "Photographs":
        """Divides one folder.

        Args:
            images: A folder with a subfolder for each class, or images alone.
            size: Height and width wanted, in pixels.
            num_images: Photographs of each set, as far as there are twice as many.
            seed: Of their order: the first are the floor, the next the reference.

        Returns:
            The sets, both of one size.

        Raises:
            DataError: The folder cannot be read, or has too few images.
        """
        real = read_images(images, size, minimum=2 * MIN_IMAGES)
        order = shuffled(len(real), seed)
        count = min(num_images, len(real) // 2)
        floor = real.take(order[:count])
        return cls(real.take(order[count : 2 * count]), floor, floor, None, len(real), real.skipped.in_words())

    @classmethod
    def with_train(cls, images: str | Path, train: str | Path, size: int, seed: int) -> "Photographs":
        """Takes what a model was trained on and what it was not.

        Args:
            images: A folder of photographs that the model has not seen, all of which are the reference.
            train: Another of those that it was trained on; as many as the reference has are the floor.
            size: Height and width wanted, in pixels.
            seed: Of the order of either.

        Returns:
            The sets.

        Raises:
            DataError: The two are one folder, or one of them cannot be read or has too few images.
        """
        if Path(images).resolve() == Path(train).resolve():
            raise DataError(f"{images} is also the folder of the training photographs; expected photographs held out")
        real, seen = (read_images(folder, size, minimum=MIN_IMAGES) for folder in (images, train))
        shown = seen.take(shuffled(len(seen), seed))
        floor = shown.take(np.arange(min(len(real), len(shown))))
        words = "; ".join(f"{folder}: {each.skipped.in_words()}" for folder, each in ((images, real), (train, seen))
                          if each.skipped.count)  # fmt: skip
        return cls(real.take(shuffled(len(real), seed)), floor, shown, seen, len(real), words)
