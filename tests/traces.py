"""Traced graphs that are kept: a module that is traced again gives the graph of the first time.

Tracing is most of an export, and many tests export one model by recipes that differ in what comes after: steps, clocks,
passes, quantization, verification. Each gets a graph of torch.onnx.export that was made of an equal module; all else of
the export runs as ever. Tests of tracing ask for `traces_anew`. A module that differs from a traced one in its
parameters' values alone, as with a LoRA fused, gets that one's graph with its own parameters, and the exporter's
optimization, which folds them, runs anew.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx_ir
import pytest
import torch
from guard import locked, making
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

# What a module has of torch's own; `named_modules`, parameters and buffers have the same, by name.
STRUCTURE = {"_modules", "_parameters", "_buffers"}


# Where a model was loaded from, and which settings nobody gave, in an order that each process has of its own; a graph
# says neither.
UNSAID = {"_name_or_path", "_use_default_values"}


EXPORT = torch.onnx.export
# torch's translations of its operations, which it reads anew, and parses, for each graph.
registry = functools.cache(ONNXRegistry.from_torchlib)


@dataclass(frozen=True)
class Trace:
    """A kept graph, in place of the exporter's own program."""

    path: Path

    def save(self, path: Path, external_data: bool) -> None:
        if external_data:
            onnx_ir.save(onnx_ir.load(self.path), path, external_data=f"{path.name}.data")
        else:
            path.write_bytes(self.path.read_bytes())


def fingerprint(module: nn.Module, args: tuple[torch.Tensor, ...], values: bool = True, **settings: Any) -> str:
    """A hash of all that a module's graph follows from: its parts, their settings and weights, the inputs' shapes.

    Without `values`, parameters count by name and shape alone. Sizes that the graph has as symbols do not count.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in STRUCTURE}
        # Hooks lie under numbers that torch counts up from module to module.
        own = {key: list(v.values()) if "_hooks" in key and isinstance(v, dict) else v for key, v in own.items()}
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {_described(own)}\n".encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if values or not isinstance(tensor, nn.Parameter):
            digest.update(tensor.detach().contiguous().numpy().data)
    # Values of the inputs do not matter: nothing but their shapes is traced.
    (symbols,) = settings.get("dynamic_shapes", ([None] * len(args),))
    for arg, named in zip(args, symbols, strict=True):
        digest.update(f"{[(named or {}).get(i, size) for i, size in enumerate(arg.shape)]} {arg.dtype}".encode())
    digest.update(_described(settings).encode())
    return digest.hexdigest()


def _described(value: Any) -> str:
    """What a value is, in words that are the same in every process; of what cannot be said so, where it lies."""
    if isinstance(value, dict):
        return str(sorted((_described(key), _described(item)) for key, item in value.items() if key not in UNSAID))
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[_described(item) for item in value]}"
    if isinstance(value, set | frozenset):
        return str(sorted(_described(item) for item in value))
    if isinstance(value, FunctionType):
        held = [_described(cell.cell_contents) for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{held}"
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return repr(value)
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return f"{type(value).__module__}.{type(value).__qualname__}{_described(vars(value))}"


def with_parameters(model: onnx_ir.Model, module: nn.Module) -> onnx_ir.Model:
    """A graph that was traced of a module like this one, before its parameters were folded, with this one's."""
    initializers = model.graph.initializers
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in initializers:
            array = parameter.detach().numpy()
            assert initializers[name].shape == array.shape
            initializers[name].const_value = onnx_ir.tensor(array, name=name)
    return model


@contextmanager
def remembering(folder: Path, of: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Within the block, what was traced before, in any process that has the folder, is not traced again.

    Args:
        of: Modules of other classes are traced as ever.
    """
    export: Callable[..., Any] = torch.onnx.export

    def once(part: nn.Module, args: tuple[torch.Tensor, ...], **settings: Any) -> Any:
        if "optimize" in settings or not isinstance(part, of):  # a block inside of this one keeps what it is given
            return export(part, args, **settings)
        kept = folder / f"{fingerprint(part, args, **settings)}.onnx"
        if not kept.exists():
            first = folder / f"{fingerprint(part, args, values=False, **settings)}.first.onnx"
            with making(), locked(first), tempfile.TemporaryDirectory(dir=folder) as scratch:
                traced = Path(scratch) / "traced.onnx"
                if not first.exists():
                    export(part, args, **settings, optimize=False).save(traced, external_data=False)
                    os.replace(traced, first)
                program = torch.onnx.ONNXProgram(with_parameters(onnx_ir.load(first), part), None)
                program.optimize()
                program.save(traced, external_data=False)
                os.replace(traced, kept)
        return Trace(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
        patch.setattr(torch.onnx, "export", once)
        yield
