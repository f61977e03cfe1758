"""Seeded normal noise that every runtime draws alike: Philox4x32-10, then Box-Muller.

- The same seed gives the same picture in Python, in a browser and on a phone: the generator is a counter-based one
  (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which is a page of code in any language.
- Image ``i`` is the same however many images are drawn: the image and the draw are in the counter.
- Logarithm, cosine and sine are taken in float64 and rounded once to float32, so that mathematical libraries agree
  nearly everywhere.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: four words for each counter, uint32 [..., 4], in Random123's order; the key's low word is first.

    >>> [f"{word:08x}" for word in philox(np.zeros(4, np.uint32), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low, shift = np.uint64(_WORD), np.uint64(32)
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product_1 >> shift) ^ c1 ^ np.uint64(k0), (product_0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_1 & low, product_0 & low
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def noise(seed: int, shape: Sequence[int], image: int = 0, draw: int = 0) -> NDArray[np.float32]:
    """Standard normal values of one image and one draw, the same in every runtime.

    Args:
        seed: Any integer in [0, 2**64): it is the key.
        shape: The array's shape; the float32 values fill it in C order.
        image: Which image of the generation, in [0, 2**32).
        draw: 0 is the initial latent, ``k`` the ``k``-th fresh noise, in [0, 2**32).

    Raises:
        RequestError: If the seed, a dimension, the image or the draw is not an integer in its range.
    """
    seed = _integer("seed", seed, 2**64)
    image = _integer("image", image, 2**32)
    draw = _integer("draw", draw, 2**32)
    dimensions = _shape(shape)

    size = math.prod(dimensions)
    blocks = -(-size // 4)
    counter = np.zeros((blocks, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(blocks, dtype=np.uint32)
    counter[:, 1] = image
    counter[:, 2] = draw
    words = philox(counter, (seed & _WORD, seed >> 32))

    # The half keeps u away from 0, whose logarithm is infinite, and from 1.
    u = (words.astype(np.float64) + 0.5) / 2.0**32
    radius = np.sqrt(-2.0 * np.log(u[:, 0::2]))
    angle = (2.0 * np.pi) * u[:, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[:size].astype(np.float32).reshape(dimensions)


def _integer(what: str, given: SupportsIndex, end: int) -> int:
    value = _as_integer(given)
    if value is None or not 0 <= value < end:
        raise RequestError(f"{what} {given!r}: expected an integer in [0, 2**{end.bit_length() - 1})")
    return value


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        given = tuple(shape)
    except TypeError:
        given = ()
    dimensions = tuple(d for d in map(_as_integer, given) if d is not None and d > 0)
    if not given or len(dimensions) != len(given):
        raise RequestError(f"shape {shape!r}: expected one or more positive integers")
    if math.prod(dimensions) > 4 * 2**32:
        raise RequestError(f"shape {shape!r}: expected at most 2**34 elements, the reach of the counter")
    return dimensions


def _as_integer(given: Any) -> int | None:
    """Python's or numpy's integer as an ``int``; a bool or anything else as None."""
    if isinstance(given, (bool, np.bool_)):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None
