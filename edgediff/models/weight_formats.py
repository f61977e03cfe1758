"""Weights in fewer bits: the formats, and the nearest to a weight that each of them can hold.

Only how a weight is stored changes; what it is multiplied with stays in the graph's precision. The rounding is done
here, once, for every target: what is written into a graph is what was measured in torch.

- ``fp16`` halves a graph whose arithmetic stays fp32.
- ``int8`` has a scale for each output channel, ``int4`` one for each 32 inputs of an output channel; both are numbers
  that fp16 holds. The element of the largest magnitude in a block is -8 times its scale, so that all sixteen codes are
  of use. Where a target has no blocks, ``int4`` has a scale for each output channel too, the one of the least error.
- ``paletteN`` has a table of 2^N numbers for each weight and N bits for each element: the table's numbers are the means
  of the elements that are nearest to them (k-means in one dimension).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import UnsupportedError
from edgediff_runtime.manifest import WeightFormat

BLOCK = 32
# Of k-means, after which the table hardly moves; and bins of the histogram that it begins from: at most so many, and
# so many numbers in each on average, since a density cannot be seen in bins of one.
ITERATIONS, BINS, NUMBERS_A_BIN = 40, 2048, 8
# What the largest element of an output channel may be cut to, in int4 without blocks.
CUTS = np.linspace(0.4, 1.05, 27)


@dataclass(frozen=True)
class Linear:
    """Codes times scales.

    Attributes:
        codes: int8, the weight's shape.
        scales: float16; of each output channel [O], or of blocks of the flattened inputs [O, blocks]. float32 where
            a channel's is too small for fp16.
    """

    bits: Literal[4, 8]
    codes: NDArray[np.int8]
    scales: NDArray[np.floating]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.size * self.bits // 8 + self.scales.nbytes

    def values(self) -> NDArray[np.float32]:
        """The weight that they stand for, float32."""
        flat = self.codes.reshape(len(self.codes), -1).astype(np.float32)
        scales = self.scales.astype(np.float32)
        spread = scales[:, None] if scales.ndim == 1 else np.repeat(scales, BLOCK, axis=1)[:, : flat.shape[1]]
        return (flat * spread).reshape(self.codes.shape)


@dataclass(frozen=True)
class Palette:
    """Places in a table.

    Attributes:
        places: uint8, the weight's shape.
        table: float32 [2^bits], ascending.
    """

    bits: Literal[2, 3, 4, 6, 8]
    places: NDArray[np.uint8]
    table: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of the places, without gaps between them, and of the table in fp16."""
        return -(-self.places.size * self.bits // 8) + 2 * self.table.size

    def values(self) -> NDArray[np.float32]:
        """The weight that they stand for, float32."""
        return self.table[self.places]


@dataclass(frozen=True)
class Half:
    """A weight in fp16."""

    half: NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.half.nbytes

    def values(self) -> NDArray[np.float32]:
        """The weight, float32."""
        return self.half.astype(np.float32)


def packed_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes of four bits in C order, two in a byte, the first in the lower half."""
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.int8)).astype(np.uint8) & 15
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


Stored = Linear | Palette | Half
# Where int4 has its scales: one for each block of inputs, of which the last may be shorter; the same, for weights of
# whole blocks alone; or one for each output channel.
Scales = Literal["blocks", "whole_blocks", "channels"]


def store(weight: NDArray[np.float32], form: WeightFormat, name: str = "a weight", scales: Scales = "blocks") -> Stored:
    """The nearest to a weight that a format holds.

    Args:
        weight: Output channels first, as torch has them: [O, I], [O, I, h, w]; of an embedding, a row for each token.
        scales: Where int4 has them.

    Raises:
        UnsupportedError: It is not finite, or beyond fp16's range where it is to be fp16.
    """
    if not np.isfinite(weight).all():
        count = int(np.count_nonzero(~np.isfinite(weight)))
        raise UnsupportedError(f"{name}: {count:,} of its {weight.size:,} numbers are not finite; {form} holds none")
    if form == "fp16":
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
        if not np.isfinite(half).all():
            raise UnsupportedError(
                f"{name}: fp16 overflows (largest {np.abs(weight).max():.2g}, fp16 holds 65504); store it in int8"
            )
        return Half(half)
    if form == "int8":
        return _by_channel(weight)
    if form == "int4":
        return _of_least_error(weight) if scales == "channels" else _in_blocks(weight)
    return _palette(weight, int(form.removeprefix("palette")))


def _by_channel(weight: NDArray[np.float32]) -> Linear:
    flat = weight.reshape(len(weight), -1)
    scales = _usable(np.abs(flat).max(axis=1) / 127)
    codes = np.clip(np.rint(flat / scales.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    return Linear(8, codes.reshape(weight.shape), scales)


def _of_least_error(weight: NDArray[np.float32]) -> Linear:
    """int4 by channel: the largest elements are cut off where the others gain more by it. Scales are above zero."""
    flat = weight.reshape(len(weight), -1)
    widest = np.abs(flat).max(axis=1)
    best, least = np.ones(len(flat), np.float16), np.full(len(flat), np.inf)
    for share in CUTS:
        half = (share * widest / 7.5).astype(np.float16)
        half[half == 0] = 1
        spread = half.astype(np.float32)[:, None]
        errors = np.square(_codes(flat, spread) * spread - flat).sum(axis=1)
        best, least = np.where(errors < least, half, best), np.minimum(errors, least)
    codes = _codes(flat, best.astype(np.float32)[:, None]).astype(np.int8)
    return Linear(4, codes.reshape(weight.shape), best)


def _codes(flat: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.clip(np.rint(flat / scales), -8, 7)
    return codes


def _in_blocks(weight: NDArray[np.float32]) -> Linear:
    flat = weight.reshape(len(weight), -1)
    count = flat.shape[1]
    blocks = np.pad(flat, ((0, 0), (0, -count % BLOCK))).reshape(len(flat), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    half = (largest / -8).astype(np.float16)
    half[half == 0] = 1
    codes = _codes(blocks, half.astype(np.float32)[..., None]).astype(np.int8)
    return Linear(4, codes.reshape(len(flat), -1)[:, :count].reshape(weight.shape), half)


def _palette(weight: NDArray[np.float32], bits: int) -> Palette:
    size = 2**bits
    numbers = np.sort(weight, axis=None).astype(np.float64)
    distinct = np.unique(numbers)
    if len(distinct) <= size:
        table = np.concatenate([distinct, np.full(size - len(distinct), distinct[-1])])
    else:
        table = _means(numbers, size)
    table = table.astype(np.float32)
    places = np.searchsorted((table[1:] + table[:-1]) / 2, weight.reshape(-1), side="right")
    return Palette(bits, places.astype(np.uint8).reshape(weight.shape), table)  # type: ignore[arg-type]


def _means(numbers: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Lloyd's algorithm over sorted numbers: each of `size` means is that of the numbers nearest to it.

    It begins with a table as dense as the cube root of the numbers' density, which is the best one for many small steps
    (Panter and Dite 1951). From quantiles it stops in places that are 3 dB worse at 6 bits, 7 dB at 8.
    """
    counted, ends = np.histogram(numbers, bins=min(BINS, -(-len(numbers) // NUMBERS_A_BIN)))
    below = np.cumsum(np.cbrt(counted))
    table: NDArray[np.float64] = np.interp((np.arange(size) + 0.5) / size, below / below[-1], ends[1:])
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    for _ in range(ITERATIONS):
        ends = np.concatenate([[0], np.searchsorted(numbers, (table[1:] + table[:-1]) / 2), [len(numbers)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        new = np.sort(np.where(counts > 0, means, table))
        if np.array_equal(new, table):
            break
        table = new
    return table


def _usable(scales: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scales, with 1 where all of a channel is zero; in fp16 where that holds them all."""
    scales = np.where(scales < np.finfo(np.float32).tiny, 1, scales).astype(np.float32)
    half = scales.astype(np.float16)
    return half if (half >= np.finfo(np.float16).smallest_normal).all() and np.isfinite(half).all() else scales
