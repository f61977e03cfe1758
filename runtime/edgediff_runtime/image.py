"""Images on disk: a grid as one PNG, through Pillow."""

import math
from pathlib import Path

import numpy as np

from edgediff_runtime.errors import RequestError
from edgediff_runtime.sessions import Array


def grid(images: Array, columns: int | None = None) -> Array:
    """Lays images out in rows, as square as they will go.

    Args:
        images: uint8 [N, H, W, C].
        columns: Images in a row.

    Returns:
        uint8 [rows * H, columns * W, C]; places without an image are black.

    >>> grid(np.zeros((3, 8, 8, 3), dtype=np.uint8)).shape
    (16, 16, 3)
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    canvas[:count] = images
    tiled = canvas.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiled.reshape(rows * height, columns * width, channels))


def write_png(path: str | Path, image: Array, scale: int = 1) -> None:
    """Writes a PNG.

    Args:
        path: Where to; the folder must exist.
        image: uint8 [H, W, C] with 1 or 3 channels.
        scale: Each pixel becomes a square of this many.

    Raises:
        RequestError: The image has another number of channels, or the folder does not exist.
    """
    from PIL import Image

    path = Path(path)
    if image.shape[-1] not in (1, 3):
        raise RequestError(f"an image of {image.shape[-1]} channels cannot be a PNG; expected 1 or 3")
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: the folder {path.parent} does not exist")
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(path, format="PNG")
