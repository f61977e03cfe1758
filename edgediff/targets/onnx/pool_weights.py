"""One file of weights for several ONNX graphs: what two graphs share is stored once."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from edgediff.targets.onnx.passes import tensor_bytes

# Smaller tensors (shapes, axes, scales) stay in the graph, where shape inference looks for them.
POOLED_BYTES = 1024
# Readers map weights into memory; vector loads need a cache line's alignment.
ALIGNMENT = 64


def pool_weights(graphs: Iterable[Path], weights: Path) -> None:
    """Moves the weights of graphs into one file beside them; equal ones, by the hash of their bytes, share a place.

    Args:
        graphs: ONNX files, weights inside or in a file of their own, which is removed; changed in place.
        weights: The file to write, in the folder of the graphs.
    """
    places: dict[bytes, tuple[int, int]] = {}
    with weights.open("wb") as pool:
        for path in graphs:
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                if tensor_bytes(tensor) >= POOLED_BYTES:
                    data = numpy_helper.to_array(tensor).tobytes()
                    tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
                    tensor.raw_data = b""  # set_external_data needs the field
                    set_external_data(tensor, weights.name, *place_weights(data, places, pool))
                    tensor.ClearField("raw_data")
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
