"""An image folder, a subfolder for each class, as one array.

How an image is brought to size is part of what it is compared with: a sharper reduction has more power at high
frequencies. So there is one way, that of the built-in model's own data (its card): cut out the centre, Lanczos to twice
the size where it is larger, then the mean of each square of four pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edgediff.errors import DataError
from edgediff_runtime import noise

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# A draw that no generation comes to: the noise that orders images is never an image's own.
_ORDER = 2**32 - 1


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int64 [N], indices into `names`.
        names: Names of the classes.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        """Some of the images.

        Args:
            indices: int64 [M], which.

        Returns:
            Those, in that order, with all the names.
        """
        return ImageSet(self.images[indices], self.labels[indices], self.names)


def read_images(folder: str | Path, size: int, minimum: int = 1) -> ImageSet:
    """Reads an image folder.

    Hidden files and files of other kinds are passed over. Photographs are turned as their EXIF says; transparency is
    ignored.

    Args:
        folder: It has a subfolder for each class.
        size: Height and width wanted, in pixels.
        minimum: How many images there must be.

    Returns:
        The images; classes and the files of each in the order of their names.

    Raises:
        DataError: There is no such folder, a class without images, too few images, an image that is smaller than
            `size`, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no images at {folder}: no such folder")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"no images in {folder}: expected a subfolder for each class")
    files = [[file for file in sorted(path.iterdir()) if _is_image(file)] for path in classes]
    for path, found in zip(classes, files, strict=True):
        if not found:
            raise DataError(f"no images in {path}; expected files that end in {', '.join(SUFFIXES)}")
    count = sum(len(found) for found in files)
    if count < minimum:
        raise DataError(f"{folder} has {count} images; expected {minimum} or more")
    return ImageSet(
        images=np.stack([read_image(file, size) for found in files for file in found]),
        labels=np.repeat(np.arange(len(classes)), [len(found) for found in files]).astype(np.int64),
        names=tuple(path.name for path in classes),
    )


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def read_image(file: Path, size: int) -> NDArray[np.uint8]:
    """Reads one image and brings it to size.

    Args:
        file: The image.
        size: Height and width wanted, in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: It cannot be read, or is smaller than `size`.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise DataError(f"{file} cannot be read as an image: {' '.join(str(e).split())}") from e
    if min(image.size) < size:
        raise DataError(f"{file} is {image.width}x{image.height}; expected {size}x{size} or larger")
    return np.asarray(_to_size(image, size))


def _to_size(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side < 2 * size:
        return square.resize((size, size), Image.Resampling.BOX)
    # Not resize: its two passes round twice, and upwards.
    return square.resize((2 * size, 2 * size), Image.Resampling.LANCZOS).reduce(2)


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Puts numbers in a seeded order, the same with every version of every library.

    Args:
        count: How many.
        seed: 0 to 2^64 - 1.

    Returns:
        int64 [count]: 0 to count - 1, each once.

    >>> [int(i) for i in shuffled(5, seed=0)]
    [3, 2, 4, 0, 1]
    """
    return np.argsort(noise(seed, (count,), draw=_ORDER), kind="stable")


def divide(data: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Holds images of each class out.

    Args:
        data: The images.
        share: Of each class, 0 to 1; rounded, and at least one image of a class of two or more.
        seed: Which ones.

    Returns:
        The rest, and what is held out, both in the order of `data`.
    """
    order = shuffled(len(data), seed)
    held_out = np.zeros(len(data), dtype=bool)
    for label in range(len(data.names)):
        of_class = order[data.labels[order] == label]
        count = max(round(share * len(of_class)), int(share > 0 and len(of_class) > 1))
        held_out[of_class[:count]] = True
    return data.take(np.flatnonzero(~held_out)), data.take(np.flatnonzero(held_out))
