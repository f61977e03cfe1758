"""Folders of small pictures, seeded."""

from pathlib import Path

import numpy as np
from PIL import Image


def folder_of_images(folder: Path, names: tuple[str, ...], each: int, size: int = 16, seed: int = 0) -> Path:
    """A class's pictures have its colour, with stripes and noise; without names they lie in the folder itself."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names or ("",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(number).uniform(40, 215, 3)
        for i in range(each):
            stripes = 30 * np.sin(np.arange(size) * (i % 3 + 1))[:, None, None]
            pixels = colour + stripes + rng.normal(0, 10, (size, size, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder
