"""Images on disk: a grid as one PNG through Pillow, or the latents."""

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.sessions import Array

if TYPE_CHECKING:
    from edgediff_runtime.pipeline import Result

SUFFIXES = (".png", ".npy")
NO_PREVIEW = "the bundle has no preview decoder; export it with --preview DIR, an AutoencoderTiny of the same latents"


def to_uint8(pixels: Array) -> Array:
    """From float32 [N, C, H, W], clipped to [-1, 1], to uint8 [N, H, W, C]; halves go to the even neighbour.

    >>> to_uint8(np.array([-2, -1, 0, 1], dtype=np.float32).reshape(1, 1, 2, 2)).ravel().tolist()
    [0, 0, 128, 255]
    """
    scaled = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1))


def grid(images: Array) -> Array:
    """Lays images out as square as possible: uint8 [N, H, W, C] to [rows * H, columns * W, C], the rest black."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    canvas[:count] = images
    tiled = canvas.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiled.reshape(rows * height, columns * width, channels))


def write_png(path: str | Path, image: Array, scale: int = 1) -> None:
    """Writes uint8 [H, W, C], each pixel as a square of `scale`; a RequestError where C is not 1 or 3."""
    from PIL import Image

    if image.shape[-1] not in (1, 3):
        raise RequestError(f"the image has {image.shape[-1]} channels; a PNG takes 1 or 3, write .npy")
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(path, format="PNG")


def size_in(text: str) -> tuple[int, int] | None:
    """Width and height, up to six digits each, that WIDTHxHEIGHT stands for; None where it is no size."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height that WIDTHxHEIGHT stands for; None and None where there is no text.

    Raises:
        RequestError: It is no size.

    >>> read_size("512x768")
    (512, 768)
    """
    if text is None:
        return None, None
    found = size_in(text)
    if found is None:
        raise RequestError(f"--size is {text!r}; expected WIDTHxHEIGHT in pixels, such as 512x768")
    return found


def check_output(path: Path, scale: int, has_decoder: bool) -> None:
    """Refuses an output that could not be written, before graphs are opened.

    Raises:
        RequestError: The suffix is unknown, the place cannot be written, the scale is not 1 to 64, or latents were
            asked for as a picture.
    """
    if path.suffix not in SUFFIXES:
        raise RequestError(f"cannot write {path}: the suffix is unknown; expected {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: the folder {path.parent} does not exist; create it")
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder; choose another name")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"cannot write {path}: the folder {path.parent} is read-only; choose another")
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # an OSError where the name is too long
    if not 1 <= scale <= 64:
        raise RequestError(f"--scale is {scale}; expected 1 to 64")
    if not has_decoder and path.suffix == ".png":
        raise RequestError("the bundle's model works on latents and has no decoder; write them with -o out.npy")


def check_previews(folder: Path, can_preview: bool) -> None:
    """Refuses a folder for previews that could not be written, and previews that nothing makes, with a RequestError."""
    if not can_preview:
        raise RequestError(NO_PREVIEW)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"cannot write previews to {folder}: it is a file; choose another name")
    if not folder.exists() and not folder.parent.is_dir():
        raise RequestError(f"cannot write previews to {folder}: the folder {folder.parent} does not exist; create it")
    existing = folder if folder.exists() else folder.parent
    if not os.access(existing, os.W_OK):
        raise RequestError(f"cannot write previews to {folder}: the folder {existing} is read-only; choose another")


def write_preview(folder: Path, index: int, images: Array, scale: int) -> Path:
    """Writes the pictures of a step, counted from 0, as a grid: ``step-001.png`` and so on in a folder, made if new."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{index + 1:03}.png"
    with replacing(path) as scratch:
        write_png(scratch, grid(images), scale)
    return path


def write_output(result: "Result", path: Path, scale: int) -> None:
    """Writes a generation: ``.png`` for a grid of the images, ``.npy`` for float32 latents [N, C, H, W].

    Raises:
        RequestError: The bundle's model works on latents, which are no picture.
    """
    with replacing(path) as scratch:
        if path.suffix == ".npy":
            _write_npy(scratch, result.latents)
        else:
            write_png(scratch, grid(result.images), scale)


def write_latents(latents: Array, path: Path) -> None:
    """Writes float32 latents [N, C, H, W] as ``.npy``."""
    with replacing(path) as scratch:
        _write_npy(scratch, latents)


def read_latents(path: Path) -> Array:
    """Reads latents from a ``.npy``; a RequestError where it is none."""
    try:
        with path.open("rb") as stream:
            found = np.load(stream, allow_pickle=False)
    except Exception as e:  # a damaged file may end in errors of zip archives or of Python's tokenizer
        raise RequestError(f"--latents {path} cannot be read as .npy: {one_line(e, 200)}") from e
    if not isinstance(found, np.ndarray):
        raise RequestError(f"--latents {path} is an archive of arrays (.npz); expected one array (.npy)")
    return found


def _write_npy(path: Path, array: Array) -> None:
    data = io.BytesIO()  # numpy does not report a full disk
    np.save(data, array)
    path.write_bytes(data.getvalue())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end: a full disk or an interrupt keeps the old one."""
    scratch = path.with_name(f".{path.stem[:200]}.{os.getpid()}{path.suffix}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
