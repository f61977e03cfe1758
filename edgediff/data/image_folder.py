"""An image folder as one array: a subfolder for each class, or images alone.

Resizing changes the power at high frequencies, so there is one way, that of the built-in model's own data: crop the
centre, Lanczos to twice the size where it is larger, then the mean of each square of four pixels. What is read and what
is skipped: ../train/README.md. One image is decoded at a time, besides the array.
"""

import mimetypes
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from edgediff.errors import DataError
from edgediff.outputs import as_text
from edgediff_runtime import noise
from edgediff_runtime.errors import one_line

# By content, whatever the name says. Not all of Pillow's: PostScript, for one, would be run.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
# A draw that no generation reaches: the noise that orders images is never an image's own.
_ORDER = 2**32 - 1
_NAMED = 3
_READ_AT_ONCE = 256
_SIXTEEN_BITS = 65535
# Not the machine's own: what is counted as an image is the same everywhere.
_TYPES = mimetypes.MimeTypes()

# An image's caption: the wordings of each form in which it is said.
Caption = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reason:
    """Why `count` files were skipped; `names` are the first three, with their class's folder."""

    what: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """Files of an image folder that were skipped."""

    reasons: tuple[Reason, ...] = ()

    @classmethod
    def of(cls, faults: Iterable[tuple[str, str]]) -> "Skipped":
        """Counts faults, each what is wrong with a file and its name, by reason.

        >>> Skipped.of([("broken", "a/1.png"), ("small", "a/2.png"), ("broken", "b/1.png")]).in_words()
        '3 images skipped: 2 broken (a/1.png, b/1.png), 1 small (a/2.png)'
        """
        found: dict[str, list[str]] = {}
        for what, name in faults:
            found.setdefault(what, []).append(name)
        return cls(tuple(Reason(what, len(names), tuple(names[:_NAMED])) for what, names in found.items()))

    @property
    def count(self) -> int:
        """How many files were skipped."""
        return sum(reason.count for reason in self.reasons)

    def in_words(self) -> str:
        """One line to show; empty where nothing was skipped."""
        if not self.reasons:
            return ""
        more = {each: ", ..." if each.count > len(each.names) else "" for each in self.reasons}
        parts = [f"{each.count} {each.what} ({', '.join(each.names)}{more[each]})" for each in self.reasons]
        return f"{self.count} image{'s' if self.count > 1 else ''} skipped: {', '.join(parts)}"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, uint8 [N, H, W, 3], and their classes.

    `labels`, int64 [N], are indices into `names`: all 0, and the names empty, where there are no classes. `captions`
    are of each image its forms, each with its wordings (captions.py); empty where there are none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    skipped: Skipped = Skipped()
    captions: tuple[Caption, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        """The images of these indices, int64 [M], in their order and with all the names."""
        captions = tuple(self.captions[i] for i in indices) if self.captions else ()
        return ImageSet(self.images[indices], self.labels[indices], self.names, captions=captions)


class _Unfit(DataError):
    """An image that is skipped; `what` is the reason."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


def read_images(
    folder: str | Path, size: int, minimum: int = 1, *, progress: Callable[[str, float], None] | None = None
) -> ImageSet:
    """Reads an image folder and brings each image to `size` x `size` pixels.

    A folder of images alone has no classes. Classes and the files of each are in the order of their names; hidden files
    and files that are no images are ignored. Images that cannot be used are counted in `skipped`.

    Raises:
        DataError: There is no such folder, it has images beside class folders, a class without images (that can be
            read) or whose name is not UTF-8, too few images, or more than there is memory for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file; expected a folder" if folder.exists() else "no such folder"
        raise DataError(f"no images at {as_text(folder)}: {what}")
    entries = _entries(folder)
    classes = [path for path in entries if path.is_dir()]
    loose = [path for path in entries if not path.is_dir() and _is_image(path)]
    if classes and loose:
        raise DataError(
            f"{as_text(folder)} has images ({as_text(loose[0].name)}) beside folders ({as_text(classes[0].name)}); "
            "expected a subfolder for each class, or images alone"
        )
    if not classes and not loose:
        raise DataError(f"no images in {as_text(folder)}: expected a subfolder for each class, or images")
    for path in classes:
        if as_text(path.name) != path.name:
            raise DataError(f"{as_text(path)}: the name of this class is not UTF-8; rename the folder")
    found = {path: list(images_in(path)) for path in classes} or {folder: loose}
    for path, files in found.items():
        if not files:
            raise DataError(f"no images in {as_text(path)}; expected files of the formats {', '.join(FORMATS)}")
    count = sum(len(files) for files in found.values())
    if count < minimum:
        raise DataError(f"{as_text(folder)} has {count} images; expected {minimum} or more")
    return _read_all(folder, found, size, minimum, progress)


def _read_all(
    folder: Path, found: dict[Path, list[Path]], size: int, minimum: int, progress: Callable[[str, float], None] | None
) -> ImageSet:
    files = [file for each in found.values() for file in each]
    images, read, faults = read_files(folder, files, size, progress)
    label_of = np.repeat(np.arange(len(found)), [len(each) for each in found.values()])
    labels = label_of[read].astype(np.int64)
    for label, path in enumerate(found):
        if label not in labels:
            own = [fault for place, fault in faults.items() if label_of[place] == label]
            raise DataError(f"no images left in {as_text(path)}: {Skipped.of(own).in_words()}")
    skipped = Skipped.of(faults.values())
    if len(labels) < minimum:
        raise DataError(
            f"{as_text(folder)} has {len(labels)} images that can be used; expected {minimum} or more; "
            f"{skipped.in_words()}"
        )
    names = () if folder in found else tuple(path.name for path in found)
    return ImageSet(images, labels, names, skipped)


def read_files(
    folder: Path, files: Sequence[Path], size: int, progress: Callable[[str, float], None] | None
) -> tuple[NDArray[np.uint8], list[int], dict[int, tuple[str, str]]]:
    """Reads image files of a folder, each brought to `size` x `size` pixels.

    Returns:
        The images that can be used, uint8 [N, size, size, 3]; their places in `files`; and, by its place, what is wrong
        with each other file and its name.

    Raises:
        DataError: They take more memory than there is.
    """
    total = len(files)
    try:
        images = np.empty((total, size, size, 3), dtype=np.uint8)
    except MemoryError as e:
        raise DataError(
            f"{total} images of {size}x{size} take {3 * size * size * total / 1e9:.1f} GB, more than there is memory"
        ) from e
    read: list[int] = []
    faults: dict[int, tuple[str, str]] = {}
    for place, file in enumerate(files):
        if progress is not None and place % _READ_AT_ONCE == 0:
            progress(f"reading images: {place} of {total}", place / total)
        try:
            images[len(read)] = read_image(file, size)
            read.append(place)
        except _Unfit as e:
            faults[place] = e.what, as_text(file.relative_to(folder).as_posix())
    return images[: len(read)], read, faults


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in the order of the names."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as e:
        raise DataError(f"{as_text(folder)} cannot be read ({e.strerror or e})") from e


def images_in(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The images of a folder and of those in it; a link to a folder that is being read is not followed."""
    above = (*above, os.path.realpath(folder))
    for path in _entries(folder):
        if path.is_dir():
            if os.path.realpath(path) not in above:
                yield from images_in(path, above)
        elif _is_image(path):
            yield path


def _is_image(file: Path) -> bool:
    """Whether a file is an image, by its name (also of a format that is not supported) or by its content."""
    if file.exists() and not file.is_file():
        return False  # opening a pipe would block
    kind = _TYPES.guess_type(file.name, strict=False)[0]
    if (kind or "").startswith("image/") or _format_by_name(file) in Image.OPEN:
        return True
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # a damaged header may raise any error
        return False


def _format_by_name(file: Path) -> str | None:
    """The format that Pillow would write under this name."""
    return Image.registered_extensions().get(file.suffix.lower())


def read_image(file: Path, size: int) -> NDArray[np.uint8]:
    """Reads one image and brings it to size.

    Photographs are turned as their EXIF says, transparency becomes white, of several frames the first is read. 16-bit
    values are divided by 257. 32-bit integers are read as 16-bit values and floats as 0 to 1, where they fit.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: It cannot be read, is smaller than `size`, too large to decode, or of an unknown range of values.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's warnings on odd metadata are hidden; its warning of a decompression bomb is an error.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                if min(opened.size) < size:
                    what = f"{opened.width}x{opened.height}; expected {size}x{size} or larger"
                    raise _Unfit(f"smaller than {size}x{size}", f"{as_text(file)} is {what}")
                image = _to_rgb(ImageOps.exif_transpose(opened), file)
    except _Unfit:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise _Unfit("too large to decode", f"{as_text(file)} is too large to decode: {one_line(e)}") from e
    except Exception as e:  # a damaged file may raise any error
        known = not isinstance(e, UnidentifiedImageError) or _format_by_name(file) in FORMATS
        what = "cannot be read" if known else "of a format that is not read"
        raise _Unfit(what, f"{as_text(file)} cannot be read as an image: {one_line(e)}") from e
    return np.asarray(_to_size(image, size))


def _to_rgb(image: Image.Image, file: Path) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(image, file)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_bytes(image: Image.Image, file: Path) -> NDArray[np.uint8]:
    """Converts grey values of more than 8 bits; Pillow would clip them at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    expected = None
    if image.mode == "F" and not (low >= 0 and high <= 1):
        expected = "0 to 1"
    # Up to 255 they are as likely 8-bit values, and would be black.
    if image.mode == "I" and not (low >= 0 and 255 < high <= _SIXTEEN_BITS):
        expected = f"0 to {_SIXTEEN_BITS}, and above 255 somewhere"
    if expected is not None:
        raise _Unfit(
            "of an unknown range of values", f"{as_text(file)} has values of {low:g} to {high:g}; expected {expected}"
        )
    if image.mode == "F":
        return np.asarray(np.rint(255 * values), dtype=np.uint8)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _to_size(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side < 2 * size:
        return square.resize((size, size), Image.Resampling.BOX)
    # Not resize: its two passes round twice, and upwards.
    return square.resize((2 * size, 2 * size), Image.Resampling.LANCZOS).reduce(2)


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """0 to count - 1 in a seeded order, int64 [count], the same with every version of every library.

    >>> [int(i) for i in shuffled(5, seed=0)]
    [3, 2, 4, 0, 1]
    """
    return np.argsort(noise(seed, (count,), draw=_ORDER), kind="stable")


def divide(data: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divides images into those to learn from and a `share` of each class, 0 to 1, held out; both keep their order.

    The share is rounded, and at least one image of a class of two or more.
    """
    order = shuffled(len(data), seed)
    held_out = np.zeros(len(data), dtype=bool)
    for label in range(max(len(data.names), 1)):
        of_class = order[data.labels[order] == label]
        count = max(round(share * len(of_class)), int(share > 0 and len(of_class) > 1))
        held_out[of_class[:count]] = True
    return data.take(np.flatnonzero(~held_out)), data.take(np.flatnonzero(held_out))


def class_indices(labels: tuple[str, ...] | None, real: ImageSet, whose: str) -> NDArray[np.int64] | None:
    """The index of each image's class in `labels`, int64 [N]; None where there are none. `whose` is for messages.

    Raises:
        DataError: A class of the folder is none of these, or the folder has none.
    """
    if labels is None:
        return None
    if not real.names:
        raise DataError(f"the folder has no classes, which the {whose} has; expected a subfolder for each")
    strange = [name for name in real.names if name not in labels]
    if strange:
        raise DataError(f"the folder's class {strange[0]!r} is not one of the {whose}'s; choices: {', '.join(labels)}")
    return np.array([labels.index(name) for name in real.names], dtype=np.int64)[real.labels]
