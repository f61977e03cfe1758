"""The dtypes of ML Programs, and the dtype in which the evaluator computes with each.

A float16 tensor is a float32 one that has only numbers of float16, so that torch's fast fp32 kernels compute each op
and nothing is converted back and forth. Unsigned integers that torch computes with poorly take the next wider signed
type.
"""

from dataclasses import dataclass

import numpy as np
import torch

from edgediff.errors import ProgramError


@dataclass(frozen=True)
class Dtype:
    """One dtype.

    Attributes:
        bits: Of one element, in a weight file.
        array: What numpy reads it as; elements below a byte take one each.
        computed: What the evaluator computes with.
        blob: Its code in a weight file's metadata; None where weight files do not have it.
    """

    bits: int
    array: type[np.generic]
    computed: torch.dtype
    blob: int | None


DTYPES = {
    "float16": Dtype(16, np.float16, torch.float32, 1),
    "float32": Dtype(32, np.float32, torch.float32, 2),
    "bool": Dtype(8, np.bool_, torch.bool, None),
    "uint8": Dtype(8, np.uint8, torch.uint8, 3),
    "int8": Dtype(8, np.int8, torch.int8, 4),
    "int16": Dtype(16, np.int16, torch.int16, 6),
    "uint16": Dtype(16, np.uint16, torch.int32, 7),
    "int32": Dtype(32, np.int32, torch.int32, 14),
    "uint32": Dtype(32, np.uint32, torch.int64, 15),
    "int4": Dtype(4, np.int8, torch.int8, 8),
    "uint1": Dtype(1, np.uint8, torch.uint8, 9),
    "uint2": Dtype(2, np.uint8, torch.uint8, 10),
    "uint3": Dtype(3, np.uint8, torch.uint8, 12),
    "uint4": Dtype(4, np.uint8, torch.uint8, 11),
    "uint6": Dtype(6, np.uint8, torch.uint8, 13),
}
STRING = "string"
UNPACKED = 2**20
# What `cast` and its kin call them.
MIL_NAMES = {"fp16": "float16", "fp32": "float32"}


def dtype_of(name: str) -> Dtype:
    """Looks a dtype up by numpy's name, or MIL's below a byte; a ProgramError names those that are known."""
    if name not in DTYPES:
        raise ProgramError(f"dtype {name} is not known to the evaluator; choices: {', '.join(DTYPES)}")
    return DTYPES[name]


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool) -> np.ndarray:
    """Unpacks elements below a byte, uint8 [ceil(count * bits / 8)] -> uint8 or int8 [count].

    They are packed from the least significant bit on, across bytes.

    >>> unpack(np.array([0b11001110], dtype=np.uint8), 2, 3, signed=False)
    array([2, 3, 0], dtype=uint8)
    """
    whole = np.empty(count, dtype=np.uint8)
    # In pieces of whole bytes: unpacked, a bit takes a byte.
    for first in range(0, count, UNPACKED):
        some = min(UNPACKED, count - first)
        piece = packed[first * bits // 8 : -(-(first + some) * bits // 8)]
        loose = np.unpackbits(piece, bitorder="little", count=some * bits).reshape(some, bits)
        if signed:
            loose = np.concatenate([loose, np.repeat(loose[:, -1:], 8 - bits, axis=1)], axis=1)
        whole[first : first + some] = np.packbits(loose, axis=1, bitorder="little").reshape(some)
    return whole.view(np.int8) if signed else whole


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the dtype in which the evaluator computes, on the array's memory where that allows it."""
    return torch.from_numpy(array).to(DTYPES[array.dtype.name].computed)


def to_declared(value: torch.Tensor, dtype: str, rounded: bool = True) -> torch.Tensor:
    """Brings what an op computed to the dtype that it declares.

    `rounded`: a float16 is rounded to what float16 has; what is too large becomes infinite.
    """
    if dtype == "float16":
        return value.half().float() if rounded else value.float()
    computed, wider = DTYPES[dtype].computed, dtype in ("uint16", "uint32")
    if (value.dtype == computed and not wider) or computed.is_floating_point or computed == torch.bool:
        return value.to(computed)
    # Through 64 bits: toward zero, and what does not fit wraps as it does in numpy.
    whole = value.long()
    return (whole & ((1 << DTYPES[dtype].bits) - 1) if wider else whole).to(computed)
