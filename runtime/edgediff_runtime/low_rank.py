"""LoRA at run time: from files of factors to the inputs of a bundle that was exported with ``--lora-inputs RANK``.

A file is a .safetensors file that ``edgediff lora`` wrote: of each layer ``unet.LAYER.lora_A.weight`` [r, in] and
``unet.LAYER.lora_B.weight`` [out, r], with nothing else to multiply them by.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgediff_runtime.conditioning import as_array, plain
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import LORA_DOWN, LORA_UP, LoraInputs, LoraLayer, Tensor
from edgediff_runtime.sessions import Array

Pairs = dict[str, tuple[Array, Array]]
# A file, or what is in one by its names.
Lora = str | os.PathLike[str] | Mapping[str, Array]
PREFIX, DOWN, UP = "unet.", ".lora_A.weight", ".lora_B.weight"
NO_INPUTS = (
    "the bundle's graphs take no LoRA; export with --lora-inputs RANK, or with --lora FILE to fuse it into the weights"
)
# What a file of factors says in its header, that of peft's settings is another.
FORMAT = {"format": "edgediff lora"}
PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")
# numpy's names of a .safetensors file's dtypes; numpy has no bfloat16, the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LENGTH = 8


def spread_over_inputs(
    inputs: LoraInputs | None, lora: Lora | Sequence[Lora] | None, scale: Any, taken: Mapping[str, Tensor]
) -> dict[str, Array]:
    """The factors that graphs take: of one LoRA or several, whose ranks add up; zeros where there is none.

    Args:
        inputs: What the bundle says of them.
        scale: What each update is multiplied by, one number for all or one for each; None is 1.
        taken: The inputs of the graphs, by name.

    Returns:
        [1, n] by name, in the dtypes of `taken`, for those that are among them.

    Raises:
        RequestError: A file is damaged, or a LoRA does not fit.
    """
    listed: list[Any] = [] if lora is None else list(lora) if isinstance(lora, list | tuple) else [lora]
    scales = _scales(scale, len(listed))
    if inputs is None:
        if listed:
            raise RequestError(f"lora was given, but {NO_INPUTS}")
        return {}
    loras = [(_read(each, inputs), factor) for each, factor in zip(listed, scales, strict=True)]
    found: dict[str, Array] = {}
    for part, layers in inputs.layers.items():
        if f"{LORA_DOWN}{part}" not in taken:
            continue
        pairs = [_joined(layer, inputs.rank, loras) for layer in layers]
        for side, name in enumerate((f"{LORA_DOWN}{part}", f"{LORA_UP}{part}")):
            with np.errstate(over="ignore"):
                made = np.concatenate([pair[side].reshape(-1) for pair in pairs]).astype(taken[name].dtype)
            if not np.isfinite(made).all():
                raise RequestError(f"lora times its scale is beyond the numbers of {taken[name].dtype}; give less")
            found[name] = made[None]
    return found


def read_specs(specs: Iterable[str] | None) -> dict[str, Any]:
    """The arguments ``lora`` and ``lora_scale`` of options ``FILE[:scale]``; none where there are none.

    Raises:
        RequestError: There is no such file, or the scale is no number.
    """
    found: list[tuple[Path, float]] = []
    for spec in specs or ():
        path, number = file_and_scale(spec)
        try:
            scale = float(number)
        except ValueError as e:
            raise RequestError(f"--lora {spec}: the scale {number!r} is no number; expected FILE[:scale]") from e
        if not path.is_file():
            raise RequestError(f"--lora {spec}: no such file; expected FILE[:scale]")
        found.append((path, scale))
    return {"lora": [path for path, _ in found], "lora_scale": [scale for _, scale in found]} if found else {}


def file_and_scale(spec: str) -> tuple[Path, str]:
    """The parts of ``FILE[:scale]``, neither of them checked; the scale is 1 where none is said.

    >>> file_and_scale("no-such-file.safetensors:0.8")[1]
    '0.8'
    """
    if Path(spec).is_file() or ":" not in spec:
        return Path(spec), "1"
    name, _, number = spec.rpartition(":")
    return Path(name), number


def _scales(scale: Any, count: int) -> list[float]:
    if scale is not None and not count:
        raise RequestError("lora_scale was given without a lora; give one")
    given = plain(scale)
    listed: list[Any] = list(given) if isinstance(given, list | tuple) else [1.0 if given is None else given] * count
    if len(listed) != count:
        raise RequestError(f"lora_scale has {len(listed)} entries for {count} files; expected one each, or one number")
    for value in map(plain, listed):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"lora_scale is {value!r}; expected a finite number")
    return [float(value) for value in listed]


def _read(lora: Any, inputs: LoraInputs) -> Pairs:
    """A LoRA's factors by layers, checked against the bundle's."""
    if isinstance(lora, Mapping):
        return check_layers("lora", {str(name): as_array(value, "lora") for name, value in lora.items()}, inputs)
    if isinstance(lora, str | os.PathLike):
        called = f"lora {os.fspath(lora)}"
        return check_layers(called, _read_file(Path(lora), called), inputs)
    raise RequestError(f"lora is a {type(lora).__name__}; expected a file, a mapping of arrays, or a list of them")


def check_layers(called: str, tensors: Mapping[str, Array], inputs: LoraInputs) -> Pairs:
    """The factors ``down`` [r, in] and ``up`` [out, r] by layers, of tensors by a file's names.

    Args:
        called: What the LoRA is called in messages.

    Raises:
        RequestError: They are no factors, or do not fit what a bundle's graphs take.
    """
    known = {layer.name: layer for layers in inputs.layers.values() for layer in layers}
    pairs: Pairs = {}
    for name in tensors:
        end = next((end for end in (DOWN, UP) if name.endswith(end)), None)
        layer = name.removeprefix(PREFIX).removesuffix(end or "")
        other = None if end is None else f"{PREFIX}{layer}{UP if end == DOWN else DOWN}"
        if end is None or not name.startswith(PREFIX) or other not in tensors:
            raise RequestError(f"{called} has {name}, which no file of `edgediff lora` has; convert the LoRA with it")
        pairs[layer] = tensors[f"{PREFIX}{layer}{DOWN}"], tensors[f"{PREFIX}{layer}{UP}"]
    if not pairs:
        raise RequestError(f"{called} has no layers of the UNet; convert a LoRA that has some with `edgediff lora`")
    for layer, pair in pairs.items():
        _check(called, layer, pair, known.get(layer), inputs.rank)
    return pairs


def _check(called: str, name: str, pair: tuple[Array, Array], layer: LoraLayer | None, rank: int) -> None:
    if layer is None:
        if name.endswith(PROJECTIONS):
            raise RequestError(f"{called}: the bundle's UNet has no layer {name}; take a LoRA of the same base")
        raise RequestError(f"{called}: layer {name} is not an input of this bundle; export with --lora FILE to fuse it")
    down, up = pair
    if not all(each.dtype.kind == "f" and each.ndim == 2 for each in pair) or down.shape[0] != up.shape[1]:
        shapes = " and ".join(f"{each.dtype.name} {list(each.shape)}" for each in pair)
        raise RequestError(f"{called}: the factors of {name} are {shapes}; expected floats [r, in] and [out, r]")
    shape, wanted = (up.shape[0], down.shape[1]), (layer.outputs, layer.inputs)
    if shape != wanted:
        raise RequestError(
            f"{called}: layer {name} is {list(shape)} there and {list(wanted)} in the bundle; take a LoRA of the same "
            "base"
        )
    if len(down) > rank:
        raise RequestError(
            f"{called} has rank {len(down)}, the bundle's graphs take {rank}; export with --lora-inputs {len(down)}"
        )
    if not all(np.isfinite(each).all() for each in pair):
        raise RequestError(f"{called}: the factors of {name} hold NaN or infinity; expected finite numbers")


def _joined(layer: LoraLayer, rank: int, loras: Sequence[tuple[Pairs, float]]) -> tuple[Array, Array]:
    """One layer's ``down`` [in, rank] and ``up`` [rank, out] of all LoRAs, one after the other, then zeros."""
    down, up = np.zeros((layer.inputs, rank), np.float32), np.zeros((rank, layer.outputs), np.float32)
    at = 0
    for pairs, scale in loras:
        if layer.name in pairs:
            taken, made = pairs[layer.name]
            to = at + len(taken)
            if to > rank:
                needed = sum(len(each[layer.name][0]) for each, _ in loras if layer.name in each)
                raise RequestError(
                    f"the {len(loras)} LoRAs have rank {needed} together, the bundle's graphs take {rank}; give fewer, "
                    f"or export with --lora-inputs {needed}"
                )
            with np.errstate(over="ignore"):
                down[:, at:to], up[at:to] = taken.T, scale * made.T.astype(np.float32)
            at = to
    return down, up


def _read_file(path: Path, called: str) -> dict[str, Array]:
    try:
        return parsed(path.read_bytes(), called)
    except OSError as e:
        raise RequestError(f"{called} cannot be read: {e.strerror or e}; expected a file of `edgediff lora`") from e


def parsed(data: bytes, called: str) -> dict[str, Array]:
    """The tensors of a file of factors by name, float32 where they were bfloat16; a RequestError where it is none."""
    try:
        start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header: dict[str, Any] = json.loads(data[_LENGTH:start])
        said = header.pop("__metadata__", {})
        body = memoryview(data)[start:]
        tensors = {name: _tensor(body, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise RequestError(f"{called} is damaged, or no .safetensors file; write it again with `edgediff lora`") from e
    if said != FORMAT:
        raise RequestError(f"{called} was not written by `edgediff lora`; convert it: edgediff lora BUNDLE FILE -o NEW")
    return tensors


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    begin, end = data_offsets
    if not 0 <= begin <= end <= len(data):
        raise ValueError("beyond the end of the file")
    array = np.frombuffer(data[begin:end], dtype=_DTYPES[dtype]).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
