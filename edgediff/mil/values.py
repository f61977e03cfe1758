"""Values of a program's protobuf, decoded into arrays: immediate ones, and blobs of a weight file."""

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import STRING, dtype_of, to_tensor, unpack
from edgediff.mil.package import Package
from edgediff.mil.weight_file import WeightFile

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Spec:
    """What a tensor is declared to be.

    Attributes:
        dtype: As numpy names it; below a byte as MIL does, and ``string``.
        shape: None where a size is flexible.
    """

    dtype: str
    shape: Shape

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of a shape is what is declared."""
        return len(shape) == len(self.shape) and all(b in (None, a) for a, b in zip(shape, self.shape, strict=True))


@dataclass(eq=False)
class Constant:
    """A constant of a program; its fp32 copy is made when a function first wants it as a tensor.

    Attributes:
        array: As it is stored, on the mapped weight file where it is in one; or a string.
        key: Equal for constants of equal content, whichever function they belong to.
    """

    dtype: str
    array: np.ndarray | str
    key: Hashable

    @functools.cached_property
    def tensor(self) -> Tensor:
        """The constant as ops take it."""
        if isinstance(self.array, str):
            raise ProgramError(f"the string {self.array!r} where a tensor is expected")
        return to_tensor(self.array)

    @property
    def number(self) -> Any:
        """The constant as a plain number, string, or nested list of them."""
        return self.array if isinstance(self.array, str) else self.array.tolist()


class Values:
    """Decodes the values of one package; its weight files are mapped once."""

    def __init__(self, package: Package, proto: Any) -> None:
        self._package = package
        self._proto = proto
        self._files: dict[str, WeightFile] = {}

    def spec(self, kind: Any) -> Spec:
        """Reads a ``ValueType``; a ProgramError where it is no tensor, or of an unknown dtype."""
        if kind.WhichOneof("type") != "tensorType":
            raise ProgramError(
                f"a {(kind.WhichOneof('type') or 'value without a type').removesuffix('Type')}, no tensor"
            )
        tensor = kind.tensorType
        if tensor.dataType not in self._proto.DataType.values():
            raise ProgramError(f"dtype number {tensor.dataType} is not known to the installed coremltools")
        dtype = self._proto.DataType.Name(tensor.dataType).lower()
        if dtype != STRING:
            dtype_of(dtype)
        shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
        return Spec(dtype, shape)

    def array(self, value: Any) -> np.ndarray | str:
        """Decodes a ``Value`` into an array of the declared shape, on the mapped file where it is in one; or a string.

        ProgramError: the value is not of its type, or the weight file is damaged.
        """
        spec = self.spec(value.type)
        shape = tuple(size for size in spec.shape if size is not None)
        if len(shape) != len(spec.shape):
            raise ProgramError("a constant of flexible shape")
        count = math.prod(shape)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            if blob.fileName not in self._files:
                self._files[blob.fileName] = WeightFile(self._package.weights(blob.fileName))
            return self._files[blob.fileName].read(blob.offset, spec.dtype, count).reshape(shape)
        content = value.immediateValue
        if content.WhichOneof("value") != "tensor":
            raise ProgramError(f"a {content.WhichOneof('value') or 'missing value'}, no tensor")
        field = content.tensor.WhichOneof("value")
        elements: Any = getattr(content.tensor, field).values if field is not None else ()
        if spec.dtype == STRING:
            if field != "strings" or len(elements) != 1 or shape:
                raise ProgramError("strings that are not one string")
            return str(elements[0])
        dtype = dtype_of(spec.dtype)
        try:
            if field != "bytes":
                array = np.array(elements).astype(dtype.array)
            elif dtype.bits < 8:
                packed = np.frombuffer(elements, dtype=np.uint8)
                if packed.size * 8 < count * dtype.bits:
                    raise ProgramError(f"{packed.size} bytes for {count} elements of {spec.dtype}")
                array = unpack(packed, dtype.bits, count, signed=spec.dtype.startswith("int"))
            else:
                array = np.frombuffer(bytearray(elements), dtype=dtype.array)
        except (ValueError, TypeError, OverflowError) as e:
            raise ProgramError(f"{field or 'nothing'} where {count} elements of {spec.dtype} are expected: {e}") from e
        if array.size != count:
            raise ProgramError(f"{array.size} elements of {spec.dtype}; its shape {list(shape)} takes {count}")
        return array.reshape(shape)
