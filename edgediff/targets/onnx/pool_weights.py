"""Weights of ONNX graphs in a file beside them, read and written one tensor at a time: equal ones are stored once."""

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


class WeightFile:
    """A file of weights that is being written; equal ones, by the hash of their bytes, share a place."""

    def __init__(self, path: Path) -> None:
        """Begins an empty file, in the folder of the graphs."""
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
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
        offset, length = place_weights(data, self._places, self._stream)
        tensor = TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


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


def pool_weights(graphs: Iterable[Path], weights: Path) -> None:
    """Moves the weights of graphs into one file beside them.

    Args:
        graphs: ONNX files, weights inside or in a file of their own, which is removed; changed in place.
        weights: The file to write, in the folder of the graphs.
    """
    with WeightFile(weights) as pool:
        for path in graphs:
            model = onnx.load(path, load_external_data=False)
            move_weights(model, path.parent, pool)
            path.write_bytes(model.SerializeToString(deterministic=True))
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def place_weights(data: bytes, places: dict[bytes, tuple[int, int]], pool: BinaryIO) -> tuple[int, int]:
    """Offset and length of these bytes in the pool, written there if they are new."""
    key = hashlib.sha256(data).digest()
    if key not in places:
        pool.write(bytes(-pool.tell() % ALIGNMENT))
        places[key] = pool.tell(), len(data)
        pool.write(data)
    return places[key]
