"""The nearest training photograph of each image: whether a model repeats what it was trained on.

Distances are over pixels, where a copy is near and a new picture of the same things is not. A smooth image is near to
everything, so images are compared with photographs held out: suspicious is what is nearer than nearly all of those. A
training photograph's mirror image counts as the photograph, since models are trained on both.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError
from edgediff.evaluate.report import Closeness, Suspect

# Images as near as the nearest 1 % of the photographs held out are suspicious.
SUSPICIOUS = 0.01
# Suspects listed and drawn of each set.
SHOWN = 8
# Numbers of training photographs in memory as float32.
_CHUNK = 2**25


class Nearest(NamedTuple):
    """The nearest training photograph of each image of a set, mirrored or not, [N] each.

    Distances are root mean squared differences over pixels and channels, in 8-bit levels.
    """

    distance: NDArray[np.float64]
    neighbour: NDArray[np.int64]
    mirrored: NDArray[np.bool_]

    def suspects(self) -> tuple[Suspect, ...]:
        """The images nearest to a training photograph, the nearest first."""
        first = np.argsort(self.distance, kind="stable")[:SHOWN]
        return tuple(Suspect(int(i), *(each[i].item() for each in self)) for i in first)

    def closeness(self, threshold: float) -> Closeness:
        """Sums the distances up; `threshold` is the `SUSPICIOUS` quantile of those of photographs held out."""
        median, low = (float(value) for value in np.quantile(self.distance, (0.5, 0.05)))
        return Closeness(median, low, share_nearer=float((self.distance <= threshold).mean()))


def nearest_neighbours(images: NDArray[np.uint8], train: NDArray[np.uint8]) -> Nearest:
    """Finds the nearest training photograph, uint8 [T, H, W, C], of each image, uint8 [N, H, W, C], mirrored or not.

    DataError: there are no images or training photographs, or they are of different sizes.
    """
    if not len(images) or not len(train) or images.shape[1:] != train.shape[1:]:
        raise DataError(
            f"images of shape {list(images.shape)} and training photographs of {list(train.shape)}; expected one or "
            "more of each, of one size"
        )
    # To mirror the image is to mirror the photograph.
    both = np.concatenate([images, images[:, :, ::-1]])
    flat = _flat(both)
    least = np.full(len(both), np.inf, dtype=np.float32)
    index = np.zeros(len(both), dtype=np.int64)
    chunk = max(_CHUNK // images[0].size, 1)
    for start in range(0, len(train), chunk):
        photographs = _flat(train[start : start + chunk])
        # Half of the squared distance, but for the image's own square, which is the same for all photographs.
        halves = 0.5 * (photographs**2).sum(axis=1) - flat @ photographs.T
        found = halves.argmin(axis=1)
        halves = halves[np.arange(len(both)), found]
        index[halves < least] = start + found[halves < least]
        least = np.minimum(least, halves)
    # Measured again in float64: a copy is at 0.
    plain, mirror = np.split(np.array([_distance(image, train[i]) for image, i in zip(both, index, strict=True)]), 2)
    mirrored = mirror < plain
    return Nearest(
        distance=np.where(mirrored, mirror, plain),
        neighbour=np.where(mirrored, index[len(images) :], index[: len(images)]),
        mirrored=mirrored,
    )


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, H*W*C]; around 0, which keeps float32's rounding small."""
    return images.reshape(len(images), -1).astype(np.float32) - 127.5


def _distance(image: NDArray[np.uint8], photograph: NDArray[np.uint8]) -> float:
    return float(np.sqrt(((image.astype(np.float64) - photograph) ** 2).mean()))
