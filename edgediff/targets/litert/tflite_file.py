"""A .tflite file as an object: read, changed, written back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.extras import needing, quiet

# flatbuffers' builder in Python counts bytes in 32 bits with a sign, and grows by copying.
LARGEST = 2**30


def read_tflite(path: Path) -> Any:
    """Reads a file into the schema's objects."""
    return _library().read_model(str(path))


def write_tflite(path: Path, model: Any) -> None:
    """Writes a file, in the place of the one that it was read from too."""
    made = path.with_name(f".{path.name}")
    _library().write_model(model, str(made))
    made.rename(path)


def schema() -> Any:
    """The module of the schema's enums and objects."""
    with needing("litert", "reading .tflite files"), quiet():
        from ai_edge_litert import schema_py_generated
    return schema_py_generated


def operations(model: Any) -> Iterator[tuple[Any, Any, str]]:
    """Each operation with its subgraph and its name in the schema, such as CONV_2D."""
    names = {code: name for name, code in vars(schema().BuiltinOperator).items() if isinstance(code, int)}
    kinds = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    for graph in model.subgraphs:
        for operation in graph.operators:
            yield graph, operation, kinds[operation.opcodeIndex]


def constant(model: Any, tensor: Any) -> np.ndarray | None:
    """The numbers of a float32 tensor that is stored in the file; None for any other."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0 or tensor.type != schema().TensorType.FLOAT32:
        return None
    return np.frombuffer(data, np.float32).reshape(tensor.shape)


def shorten_names(path: Path) -> None:
    """Leaves modules' names of tensors' names, and leaves out their classes: a tenth of a small UNet's file.

    The converter's names are such as ``package.Chain_part/package.HighresIn_0/torch.nn.modules.conv.Conv2d_conv_in;3``;
    of that ``part/0/conv_in;3`` stays. Very large files, where names are nothing, stay as they are.
    """
    if path.stat().st_size > LARGEST:
        return
    model = read_tflite(path)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.name = "/".join(map(_module, tensor.name.decode().split("/"))).encode()
    write_tflite(path, model)


def _module(step: str) -> str:
    """``package.Class_name`` without package and class."""
    path, dot, last = step.rpartition(".")
    cls, line, name = last.partition("_")
    return name if dot and line and cls[:1].isupper() and path.replace("_", "").replace(".", "").isalnum() else step


def _library() -> Any:
    with needing("litert", "reading .tflite files"), quiet():
        from ai_edge_litert.tools import flatbuffer_utils
    return flatbuffer_utils
