"""What `edgediff run` writes: a grid of images, or the latents."""

import io
import os
from pathlib import Path

import numpy as np

from edgediff.errors import ConfigError
from edgediff_runtime import Result
from edgediff_runtime.image import grid, write_png

SUFFIXES = (".png", ".npy")


def check_output(path: Path, scale: int) -> None:
    """Refuses an output that could not be written, before anything is generated.

    Args:
        path: Where to.
        scale: Size of a pixel.

    Raises:
        ConfigError: The suffix is unknown, the folder does not exist, or the scale is not above 0.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"cannot write {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder")
    if not 1 <= scale <= 64:
        raise ConfigError(f"--scale is {scale}; expected 1 to 64")


def write_output(result: Result, path: Path, scale: int) -> None:
    """Writes a generation.

    Args:
        result: What was generated.
        path: ``.png`` for a grid of the images, ``.npy`` for float32 latents [N, C, H, W].
        scale: Each pixel of a PNG becomes a square of this many.

    Raises:
        RequestError: The bundle has no images to show.
    """
    # Beside its place and then renamed: a full disk or an interrupt leaves what was there.
    scratch = path.with_name(f".{path.stem[:200]}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".npy":
            data = io.BytesIO()  # numpy does not say that a disk is full
            np.save(data, result.latents)
            scratch.write_bytes(data.getvalue())
        else:
            write_png(scratch, grid(result.images), scale)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
