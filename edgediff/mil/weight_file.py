"""Apple's storage for the weights of an ML Program, memory-mapped.

A file is a header of 64 bytes (uint32 number of blobs, uint32 version), then for each blob 64 bytes of metadata
(uint32 sentinel, uint32 dtype, uint64 size in bytes, uint64 offset of the data, uint64 padding in bits) and its data,
everything aligned to 64 bytes. A program refers to a blob by the offset of its metadata.
"""

import struct
from pathlib import Path

import numpy as np

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import DTYPES, dtype_of, unpack

SENTINEL = 0xDEADBEEF
VERSION = 2
ALIGNMENT = 64
HEADER = struct.Struct("<II56x")
METADATA = struct.Struct("<IIQQQ32x")
NAMES = {dtype.blob: name for name, dtype in DTYPES.items() if dtype.blob is not None}


class WeightFile:
    """One file of weights."""

    def __init__(self, path: Path) -> None:
        """Maps a file; a ProgramError where it is missing, too short, or of another version."""
        self.path = path
        if not path.is_file():
            raise ProgramError(f"{path}: the weights file is missing")
        self._size = path.stat().st_size
        if self._size < HEADER.size:
            raise ProgramError(f"{path}: {self._size} bytes are not a weights file, whose header takes {HEADER.size}")
        # Copy-on-write: torch wants writable memory, and what it shares is never written to the file.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        _, version = HEADER.unpack(self._bytes[: HEADER.size].tobytes())
        if version != VERSION:
            raise ProgramError(f"{path}: storage version {version}; expected {VERSION}")

    def read(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """Reads the blob [count] whose metadata is at an offset, on the mapped file where an element is whole bytes.

        ProgramError: the file is cut off, or has something else there.
        """
        where = f"{self.path}: the blob at {offset}"
        if offset < HEADER.size or offset + METADATA.size > self._size:
            raise ProgramError(f"{where} is out of the file's {self._size} bytes")
        sentinel, code, size, start, padding = METADATA.unpack(self._bytes[offset : offset + METADATA.size].tobytes())
        if sentinel != SENTINEL:
            raise ProgramError(f"{where} begins with {sentinel:#x}; expected the sentinel {SENTINEL:#x}")
        expected = dtype_of(dtype)
        if code != expected.blob:
            raise ProgramError(f"{where} is {NAMES.get(code, f'of unknown dtype {code}')}; the program says {dtype}")
        needed = -(-count * expected.bits // 8)
        if size != needed or padding != needed * 8 - count * expected.bits:
            raise ProgramError(f"{where} has {size} bytes; {count} elements of {dtype} take {needed}")
        if offset % ALIGNMENT or start % ALIGNMENT:
            raise ProgramError(f"{where}, or its data at {start}, is not at a multiple of {ALIGNMENT}")
        if start + size > self._size:
            raise ProgramError(f"{where} ends at {start + size}; the file is cut off at {self._size} bytes")
        data = self._bytes[start : start + size]
        if expected.bits < 8:
            return unpack(data, expected.bits, count, signed=dtype.startswith("int"))
        return np.asarray(data).view(expected.array)
