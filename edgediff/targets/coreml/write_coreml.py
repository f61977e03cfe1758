"""Core ML packages through torch.export: ML Programs of fixed shapes, made on any machine.

A package comes out the same for the same input: coremltools' own files carry random identifiers, the date and map
entries in no fixed order, so its manifest and its model are rewritten.
"""

import contextlib
import errno
import gc
import json
import os
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgediff.errors import UnsupportedError
from edgediff.mil.coremltools_quiet import import_coremltools, quiet, without_validation
from edgediff.mil.package import read_package
from edgediff.models.part import Part
from edgediff.models.stored_weights import StoredWeights
from edgediff.targets.coreml import CoreMLConfig
from edgediff.targets.coreml.constexpr_weights import storing
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import Graph, Tensor

# What the sine and cosine of a time embedding are taken of goes into the thousands, where fp16 counts in whole steps:
# in fp16 the embedding of t >= 500 is noise at 24 to 32 dB.
PERIODIC = ("sin", "cos")
# Apple's names of the two items of a package; the identifiers are ours, made of the names.
ITEMS = {
    "model.mlmodel": ("com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
    "weights": ("com.apple.CoreML/weights", "CoreML Model Weights"),
}
AUTHOR = "com.apple.CoreML"
WEIGHTS = "weights/weight.bin"
# Operations of torch.export that Core ML does not know and that change nothing.
WITHOUT_EFFECT: dict[Any, Any] = {torch.ops.aten.alias.default: lambda x: x}
DATED = "com.github.apple.coremltools.conversion_date"


def write_coreml(
    folder: Path,
    graphs: Iterable[Graph],
    modules: Mapping[str, Part],
    config: CoreMLConfig,
    say: Callable[[str], None],
    component: str = "unet",
    weights: StoredWeights | None = None,
) -> int:
    """Writes every Core ML package of a component and gives their specification version.

    Args:
        weights: What weights are stored as; None leaves them in the precision of the recipe.

    Raises:
        UnsupportedError: The converter failed, or made what the deployment target cannot hold.
        MissingExtraError: coremltools is not installed.
    """
    ct = import_coremltools("exporting to Core ML")
    packages: dict[str, dict[str, Path]] = {}
    found: set[str] = set()
    with _scratch(folder) as scratch:
        for graph in graphs:
            if graph.file is not None:
                say(f"exporting {graph.key} to Core ML")
                made = scratch / f"{graph.key}.mlpackage"
                passes = {} if weights is None else {"pass_pipeline": storing(ct, weights, found)}
                _convert(ct, modules[graph.name], graph, made, config, passes)
                packages.setdefault(graph.file, {})[graph.function or ""] = made
        if weights is not None:
            weights.check_found(component, found, "Core ML programs")
        for file, functions in packages.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            if "" in functions:
                functions[""].rename(path)
            else:
                say(f"joining {' and '.join(functions)} into one package")
                _join(ct, functions, path)
            version = _settle(path)
    return version


def _convert(ct: Any, module: Part, graph: Graph, path: Path, config: CoreMLConfig, passes: Mapping[str, Any]) -> None:
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    examples = tuple(_example(inputs[name]) for name in module.inputs)
    with _faults(f"{graph.name}: conversion to Core ML for {config.deployment_target} failed", path.parent):
        program = torch.export.export(module, examples).run_decompositions(WITHOUT_EFFECT)
        ct.convert(
            program,
            inputs=[_tensor_type(ct, inputs[name]) for name in module.inputs],
            outputs=[ct.TensorType(name=each.stored_name, dtype=_dtype(each)) for each in graph.outputs],
            minimum_deployment_target=ct.target[config.deployment_target],
            compute_precision=_half_but_time(ct) if config.dtype == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
            package_dir=str(path),
            **passes,
        )


def _example(tensor: Tensor) -> torch.Tensor:
    # torch.export uses only shapes and dtypes; classes are indices, and 0 is one.
    dtype = torch.int64 if tensor.dtype == "int32" else torch.float32
    return torch.zeros([size for size in tensor.shape if isinstance(size, int)], dtype=dtype)


def _tensor_type(ct: Any, tensor: Tensor) -> Any:
    return ct.TensorType(name=tensor.name, shape=tensor.shape, dtype=_dtype(tensor))


def _dtype(tensor: Tensor) -> Any:
    return np.dtype(tensor.dtype).type


def _half_but_time(ct: Any) -> Any:
    """fp16 for every operation but casts to integers and those whose results a sine or a cosine is taken of."""
    exact: dict[Any, set[Any]] = {}

    def is_half(op: Any) -> bool:
        block = op.enclosing_block
        if block not in exact:
            exact[block] = _before_periodic(block)
        # Ids of tokens are whole numbers beyond those that fp16 has.
        return op.name not in exact[block] and not (op.op_type == "cast" and op.dtype.val in ("int32", "int64"))

    return ct.transform.FP16ComputePrecision(op_selector=is_half)


def _before_periodic(block: Any) -> set[Any]:
    """Names of the operations that lead to a sine or a cosine, these included."""
    waiting = [op for op in block.operations if op.op_type in PERIODIC]
    found = {op.name for op in waiting}
    while waiting:
        for var in waiting.pop().inputs.values():
            for one in var if isinstance(var, list | tuple) else (var,):
                before = getattr(one, "op", None)
                if before is not None and before.name not in found:
                    found.add(before.name)
                    waiting.append(before)
    return found


def _join(ct: Any, functions: Mapping[str, Path], path: Path) -> None:
    """One package of several functions, whose equal weights are stored once."""
    described = ct.utils.MultiFunctionDescriptor()
    for name, package in functions.items():
        described.add_function(str(package), src_function_name="main", target_function_name=name)
    described.default_function_name = next(iter(functions))
    scratch = next(iter(functions.values())).parent
    with _faults(f"{path.name}: joining {' and '.join(functions)} failed", scratch):
        ct.utils.save_multifunction(described, str(path))


@contextlib.contextmanager
def _faults(what: str, folder: Path) -> Iterator[None]:
    """Runs a converter quietly; what it raises becomes an error of ours, a full disk a full disk."""
    try:
        with quiet(), without_validation(), torch.no_grad():
            yield
    except BaseException as e:  # neither torch.export's nor the converter's errors share a base class
        # coremltools copies in C++, where a full disk is a RuntimeError like any other, and whole folders, which gives
        # a shutil.Error without a number: what cannot be written a second time did not fit.
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        no_room = isinstance(e, RuntimeError | OSError) and shutil.disk_usage(folder).free < written
        # The frames that failed hold coremltools' temporary files, which complain when they are closed late.
        with quiet():
            traceback.clear_frames(e.__traceback__)
            gc.collect()
        if not isinstance(e, Exception):  # an interrupt
            raise
        if isinstance(e, OSError) and e.errno is not None:
            e.with_traceback(None)
            raise OSError(e.errno, e.strerror, e.filename) from None
        if no_room:
            e.with_traceback(None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise UnsupportedError(f"{what}: {one_line(e)}") from e


def _settle(path: Path) -> int:
    """Writes a package's manifest and model in one form only; what is no part of a package goes."""
    package = read_package(path)
    spec = package.spec
    spec.description.metadata.userDefined.pop(DATED, None)
    settled = path.with_name(f"{path.name}.settled")
    data = settled / "Data" / AUTHOR
    data.mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    if (package.folder / WEIGHTS).exists():
        (data / WEIGHTS).parent.mkdir()
        (package.folder / WEIGHTS).rename(data / WEIGHTS)
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{AUTHOR}/{name}")) for name in ITEMS}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            ids[name]: {"author": AUTHOR, "description": description, "name": name, "path": where}
            for name, (where, description) in ITEMS.items()
            if (settled / "Data" / where).exists()
        },
        "rootModelIdentifier": ids["model.mlmodel"],
    }
    # In the form in which coremltools writes it back when it opens the package: its hash stays.
    (settled / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    shutil.rmtree(path)
    settled.rename(path)
    return int(spec.specificationVersion)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder in the bundle for what is on its way: an export that is killed leaves nothing outside of its place.

    coremltools writes weights to Python's default temporary folder and cannot be told otherwise, so that is set for as
    long as it works.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=folder, prefix=".converting-") as scratch:
        tempfile.tempdir = scratch
        try:
            yield Path(scratch)
        finally:
            tempfile.tempdir = before
