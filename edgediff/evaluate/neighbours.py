"""The nearest training photograph of each image: whether a model repeats what it was trained on.

Distances are taken over pixels, where a copy is near and a new picture of the same things is not. A smooth image is
near to everything, so the yardstick is what photographs that were held out come to, and suspicious is what is nearer
than nearly all of those. A training photograph's mirror image counts as the photograph: models are trained on both.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError

# Of the held-out photographs: what is nearer to a training photograph than this share of them is suspicious.
SUSPICIOUS = 0.01
# Numbers of training photographs that are in memory as float32 at once.
_CHUNK = 2**25


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest training photograph of each image of a set.

    Attributes:
        distance: float64 [N], root of the mean squared difference over pixels and channels, in steps of 8 bits.
        index: int64 [N], which training photograph.
        mirrored: bool [N], whether it is nearest as its mirror image.
    """

    distance: NDArray[np.float64]
    index: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


class Closeness(msgspec.Struct, frozen=True):
    """How near the images of a set are to training photographs, in steps of 8 bits.

    Attributes:
        median: Half of the images are nearer.
        quantile_5: 5 % of the images are nearer.
        share_nearer: Share of the images that are as near as the nearest 1 % of the held-out photographs; about 0.01
            of a model that repeats nothing.
    """

    median: float
    quantile_5: float
    share_nearer: float


def nearest_neighbours(images: NDArray[np.uint8], train: NDArray[np.uint8]) -> Nearest:
    """Finds the nearest training photograph of each image, mirrored ones included.

    Args:
        images: uint8 [N, H, W, C].
        train: uint8 [T, H, W, C].

    Returns:
        The nearest ones.

    Raises:
        DataError: There are no images or training photographs, or they are of different sizes.
    """
    if not len(images) or not len(train) or images.shape[1:] != train.shape[1:]:
        raise DataError(
            f"images of shape {list(images.shape)} and training photographs of {list(train.shape)}; expected one or "
            "more of each, of one size"
        )
    size = images[0].size
    # To mirror the image is to mirror the photograph.
    both = np.concatenate([_flat(images), _flat(images[:, :, ::-1])])
    least = np.full(len(both), np.inf, dtype=np.float32)
    index = np.zeros(len(both), dtype=np.int64)
    at_once = max(_CHUNK // size, 1)
    for start in range(0, len(train), at_once):
        photographs = _flat(train[start : start + at_once])
        # Half of the squared distance, but for the image's own square, which is the same for all photographs.
        halves = 0.5 * (photographs**2).sum(axis=1) - both @ photographs.T
        found = halves.argmin(axis=1)
        halves = halves[np.arange(len(both)), found]
        index[halves < least] = start + found[halves < least]
        least = np.minimum(least, halves)
    # What float32 found is measured anew: a copy is at 0, and neighbours as good as equal are told apart no further.
    flipped = np.concatenate([images, images[:, :, ::-1]])
    exact = np.array([_distance(image, train[i]) for image, i in zip(flipped, index, strict=True)])
    plain, mirror = np.split(exact, 2)
    mirrored = mirror < plain
    return Nearest(
        distance=np.where(mirrored, mirror, plain),
        index=np.where(mirrored, index[len(images) :], index[: len(images)]),
        mirrored=mirrored,
    )


def closeness(distance: NDArray[np.float64], threshold: float) -> Closeness:
    """Sums up how near a set is.

    Args:
        distance: float64 [N], to the nearest training photographs.
        threshold: The `SUSPICIOUS` quantile of the held-out photographs' distances.

    Returns:
        Median, 5 % quantile and the share up to the threshold.
    """
    median, low = (float(value) for value in np.quantile(distance, (0.5, 0.05)))
    return Closeness(median=median, quantile_5=low, share_nearer=float((distance <= threshold).mean()))


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[N, H*W*C]; around 0, which keeps float32's rounding small."""
    return images.reshape(len(images), -1).astype(np.float32) - 127.5


def _distance(image: NDArray[np.uint8], photograph: NDArray[np.uint8]) -> float:
    return float(np.sqrt(((image.astype(np.float64) - photograph) ** 2).mean()))
