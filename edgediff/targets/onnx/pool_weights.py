"""Weights of ONNX graphs in files beside them, read and written one tensor at a time: equal ones are stored once."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgediff.targets.onnx.passes import tensor_bytes

# Smaller tensors (shapes, axes, scales) stay in the graph, where shape inference looks for them.
POOLED_BYTES = 1024
# Readers map weights into memory; vector loads need a cache line's alignment.
ALIGNMENT = 64
# A browser on a phone does not hold a file of more than about this.
FILE_BYTES = 2**30


class WeightFile:
    """Files of weights that are being written; equal ones, by the hash of their bytes, share a place."""

    def __init__(self, path: Path, most: float | None = None) -> None:
        """Begins an empty file, in the folder of the graphs.

        Args:
            path: The first file; those that follow it have a number after their stem: ``weights-2.bin``.
            most: Bytes of a file, unless one tensor has more; None takes `FILE_BYTES`.
        """
        self._first, self._most = path, FILE_BYTES if most is None else most
        self._count = 1
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._stream: BinaryIO = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stream.close()

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Writes the numbers, and gives the initialiser that says where they lie."""
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.move(TensorProto(name=name, data_type=kind, dims=array.shape), array.tobytes())

    def move(self, tensor: TensorProto, data: bytes) -> TensorProto:
        """Writes the bytes of an initialiser, and gives one of the same name, type and sizes that says where."""
        place = self.place(data)
        tensor = TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        for key, value in zip(("location", "offset", "length"), place, strict=True):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def place(self, data: bytes) -> tuple[str, int, int]:
        """The name of the file that these bytes lie in, offset and length; they are written if they are new."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            offset = self._stream.tell() + -self._stream.tell() % ALIGNMENT
            if offset and offset + len(data) > self._most:
                self._count, offset = self._count + 1, 0
                self._stream.close()
                name = f"{self._first.stem}-{self._count}{self._first.suffix}"
                self._stream = self._first.with_name(name).open("wb")
            self._stream.write(bytes(offset - self._stream.tell()))
            self._places[key] = Path(self._stream.name).name, offset, len(data)
            self._stream.write(data)
        return self._places[key]


def read_weight(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The numbers of an initialiser, inside or in a file of a folder: read, not mapped, so that they leave memory."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.fromfile(folder / Path(place["location"]).name, dtype, tensor_bytes(tensor) // dtype.itemsize,
                        offset=int(place.get("offset", 0)))  # fmt: skip
    return array.reshape(tuple(tensor.dims))


def read_bytes(tensor: TensorProto, folder: Path) -> bytes:
    """The bytes of an initialiser as they are stored: two numbers of four bits in one."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / Path(place["location"]).name).open("rb") as stream:
        stream.seek(int(place.get("offset", 0)))
        return stream.read(tensor_bytes(tensor))


def move_weights(model: ModelProto, folder: Path, file: WeightFile | None) -> None:
    """Moves a model's weights, inside or in files of a folder, into one file, the small ones inside; None: all."""
    for tensor in model.graph.initializer:
        if file is not None and tensor_bytes(tensor) >= POOLED_BYTES:
            tensor.CopyFrom(file.move(tensor, read_bytes(tensor, folder)))
        elif tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = read_bytes(tensor, folder)
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def locations(model: ModelProto) -> tuple[str, ...]:
    """The names of the files that a model's weights lie in."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


def remove_weights(graph: Path) -> None:
    """Removes the files of its own that a graph's weights lie in."""
    for file in graph.parent.glob(f"{graph.name}*.data"):
        file.unlink()


def pool_weights(graphs: Iterable[Path], weights: Path) -> list[tuple[str, ...]]:
    """Moves the weights of graphs into one file beside them, or more where they are large.

    Args:
        graphs: ONNX files, weights inside or in files of their own, which are removed; changed in place.
        weights: The first file to write, in the folder of the graphs.

    Returns:
        For each graph the names of the files that its weights lie in.
    """
    found = []
    with WeightFile(weights) as pool:
        for path in graphs:
            model = onnx.load(path, load_external_data=False)
            move_weights(model, path.parent, pool)
            path.write_bytes(model.SerializeToString(deterministic=True))
            remove_weights(path)
            found.append(locations(model))
    return found
