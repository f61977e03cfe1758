"""Saved .mlpackages, changed by hand: what a wrong converter or a damaged build would have left."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.mil.coremltools_quiet import import_coremltools

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
# Of MIL.proto: FLOAT16, FLOAT32, INT32.
DTYPES = {10: np.float16, 11: np.float32, 23: np.int32}


def change_package(package: Path, change: Callable[["Opened"], None]) -> None:
    """Opens a package, lets `change` have its way with program and weights, and writes both back."""
    opened = Opened(package)
    change(opened)
    (package / MODEL).write_bytes(opened.spec.SerializeToString(deterministic=True))
    (package / WEIGHTS).write_bytes(bytes(opened.data))


class Opened:
    """A package's protobuf and its weights, both open to changes."""

    def __init__(self, package: Path) -> None:
        self.spec: Any = import_coremltools("tests").proto.Model_pb2.Model()
        self.spec.ParseFromString((package / MODEL).read_bytes())
        self.data = bytearray((package / WEIGHTS).read_bytes())

    def ops(self, *kinds: str) -> list[Any]:
        """Operations of these types in every function."""
        return [op for block in self.blocks() for op in block.operations if op.type in kinds]

    def blocks(self) -> Iterator[Any]:
        for _, function in sorted(self.spec.mlProgram.functions.items()):
            yield from function.block_specializations.values()

    def constant(self, op: Any, name: str) -> Any:
        """The value that an operation's input is bound to."""
        binding = op.inputs[name].arguments[0]
        if binding.WhichOneof("binding") == "value":
            return binding.value
        for block in self.blocks():
            if op in block.operations:
                for other in block.operations:
                    if other.type == "const" and other.outputs[0].name == binding.name:
                        return other.attributes["val"]
        raise KeyError(binding.name)

    def array(self, op: Any, name: str) -> np.ndarray:
        """A copy of an operation's constant, wherever it lies."""
        value = self.constant(op, name)
        shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
        dtype = DTYPES[value.type.tensorType.dataType]
        if value.WhichOneof("value") == "blobFileValue":
            where, size = self._place(value)
            return np.frombuffer(bytes(self.data[where : where + size]), dtype=dtype).reshape(shape).copy()
        tensor = value.immediateValue.tensor
        if tensor.WhichOneof("value") == "bytes":
            return np.frombuffer(tensor.bytes.values, dtype=dtype).reshape(shape).copy()
        return np.array(getattr(tensor, tensor.WhichOneof("value")).values, dtype=dtype).reshape(shape)

    def change(self, op: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Changes an operation's constant, where it lies."""
        before = self.array(op, name)
        after = np.asarray(change(before.copy()), dtype=before.dtype, order="C")
        assert after.shape == before.shape
        assert not np.array_equal(before, after), "this changes nothing"
        value = self.constant(op, name)
        if value.WhichOneof("value") == "blobFileValue":
            where, size = self._place(value)
            self.data[where : where + size] = after.tobytes()
            return
        tensor = value.immediateValue.tensor
        if tensor.WhichOneof("value") == "bytes":
            tensor.bytes.values = after.tobytes()
        else:
            getattr(tensor, tensor.WhichOneof("value")).values[:] = after.reshape(-1).tolist()

    def _place(self, value: Any) -> tuple[int, int]:
        """Where the bytes of a blob lie, and how many they are."""
        _, _, size, offset = struct.unpack_from("<IIQQ", self.data, value.blobFileValue.offset)
        return offset, size

    def users(self, op: Any) -> set[str]:
        """Types of the operations that take the first output of `op`."""
        name = op.outputs[0].name
        return {
            other.type
            for block in self.blocks()
            if op in block.operations
            for other in block.operations
            for values in other.inputs.values()
            for argument in values.arguments
            if argument.name == name
        }
