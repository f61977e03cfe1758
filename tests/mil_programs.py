"""ML Programs built op by op with coremltools' builder and saved, for the evaluator to read back."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgediff.mil.coremltools_quiet import import_coremltools, quiet

OPSETS = ("iOS16", "iOS17", "iOS18")
FLOATS = ("float32", "float16")
# Programs take and return these alone; others are cast within.
AT_THE_BORDER = ("float32", "float16", "int32")
MIL_NAMES = {"float16": "fp16", "float32": "fp32"}
Reference = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op with parameters, on inputs, and what torch says of it.

    Attributes:
        op: The op's type.
        given: What the program computes the op from: arrays, or lists of them. Floats become the program's dtype.
        reference: Takes `given` as torch tensors (floats as float64) and returns what the op should.
        params: What stands in the program: numbers, strings, arrays.
        opsets: The opsets that have the op with these parameters.
        dtypes: Float dtypes to try, where any of `given` is a float.
    """

    op: str
    given: dict[str, Any]
    reference: Reference
    params: dict[str, Any] = field(default_factory=dict)
    opsets: tuple[str, ...] = OPSETS
    dtypes: tuple[str, ...] = FLOATS

    @property
    def floats(self) -> tuple[str, ...]:
        """The dtypes to try; one where nothing depends on it."""
        arrays = [*_flat(self.given.values()), *_flat(self.params.values())]
        return self.dtypes if any(_is_float(array) for array in arrays) else self.dtypes[:1]

    def expected(self, dtype: str) -> list[np.ndarray]:
        """What torch says, in float64 where it is a float, from inputs as the program gets them."""
        given = {
            key: _map(value, lambda a: torch.from_numpy(_as(a, dtype, np.float64))) for key, value in self.given.items()
        }
        results = self.reference(*given.values())
        return [torch.as_tensor(item).numpy() for item in (results if isinstance(results, tuple | list) else [results])]


def floats(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Uniform numbers that float16 has, the same for the same arguments."""
    seed = zlib.crc32(repr((shape, low, high)).encode())
    numbers = np.random.default_rng(seed).uniform(low, high, shape)
    return np.asarray(numbers, dtype=np.float16).astype(np.float32)


def ints(*shape: int, low: int = -9, high: int = 9, dtype: str = "int32") -> np.ndarray:
    """Uniform integers, the same for the same arguments."""
    seed = zlib.crc32(repr((shape, low, high)).encode())
    return np.asarray(np.random.default_rng(seed).integers(low, high, shape), dtype=dtype)


def bools(*shape: int) -> np.ndarray:
    return ints(*shape, low=0, high=2) != 0


def build(cases: Sequence[tuple[str, Case, str]], opset: str, path: Path) -> dict[str, np.ndarray]:
    """Saves one program of many cases.

    Args:
        cases: A label, a case and a float dtype each.
        opset: For example ``iOS17``.
        path: Where the .mlpackage goes.

    Returns:
        The program's inputs. Its outputs are called ``LABEL_0``, ``LABEL_1``...
    """
    ct = import_coremltools("this test")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    of_name = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
    target = getattr(ct.target, opset)
    feeds: dict[str, np.ndarray] = {}
    for label, case, dtype in cases:
        for i, array in enumerate(_flat(case.given.values())):
            array = _as(array, dtype)
            feeds[f"{label}_in{i}"] = array if array.dtype.name in AT_THE_BORDER else array.astype(np.int32)
    with quiet():
        holders = {name: mb.placeholder(a.shape, of_name[a.dtype.name]) for name, a in feeds.items()}
        program = Program()
        with Function(holders, opset_version=target) as function:
            outputs = []
            for label, case, dtype in cases:
                count = iter(range(1000))

                def variable(array: np.ndarray, label: str = label, dtype: str = dtype, count: Any = count) -> Any:
                    var = function.inputs[f"{label}_in{next(count)}"]
                    name = _as(array, dtype).dtype.name
                    return var if name in AT_THE_BORDER else mb.cast(x=var, dtype=name)

                given = {key: _map(value, variable) for key, value in case.given.items()}
                params = {key: _map(value, lambda a, dtype=dtype: _as(a, dtype)) for key, value in case.params.items()}
                results = getattr(mb, case.op)(**given, **params)
                for i, var in enumerate(results if isinstance(results, tuple | list) else [results]):
                    name = f"{label}_{i}"
                    if types.builtin_to_string(var.dtype) in ("fp32", "fp16", "int32"):
                        outputs.append(mb.identity(x=var, name=name))
                    else:
                        outputs.append(mb.cast(x=var, dtype="int32", name=name))
            function.set_outputs(outputs)
        program.add_function("main", function)
        save(program, opset, path)
    return feeds


def save(program: Any, opset: str, path: Path) -> None:
    """Converts a program as it is, without a single pass, and saves it."""
    ct = import_coremltools("this test")
    with quiet():
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, opset),
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(path))


def misses(got: np.ndarray, expected: np.ndarray, dtype: str) -> str | None:
    """Says where a result is not what it should be; None where it is.

    fp32: 1e-5 of the largest number, since sums are added up in another order. fp16: one ulp, as the fp32 result rounds
    to the same number or its neighbour; what cancels adds 1e-6 of the largest. Integers and flags: the same.
    """
    if got.shape != expected.shape:
        return f"shape {got.shape}; expected {expected.shape}"
    if expected.dtype.kind != "f":
        return None if np.array_equal(got.astype(np.int64), expected.astype(np.int64)) else f"{got} is not {expected}"
    with np.errstate(over="ignore"):
        finite = np.isfinite(expected.astype(dtype))
    if not np.array_equal(np.isfinite(got), finite):
        return "other numbers are infinite"
    got, expected = got[finite].astype(np.float64), expected[finite]
    if not expected.size:
        return None
    largest = float(np.abs(expected).max())
    if dtype == "float16":
        allowed = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64) + 1e-6 * largest
    else:
        allowed = np.full(expected.shape, 1e-5 * max(largest, 1e-6))
    worst = float((np.abs(got - expected) / allowed).max())
    return None if worst <= 1 and not math.isnan(worst) else f"off by {worst:.2f} times what is allowed"


def variants(case: Case, **params: Any) -> Case:
    """A case with other parameters."""
    return dataclasses.replace(case, params={**case.params, **params})


def _as(value: Any, dtype: str, floats_as: Any = None) -> Any:
    """Float arrays in the dtype, anything else as it is."""
    if not _is_float(value):
        return value
    return value.astype(dtype).astype(dtype if floats_as is None else floats_as)


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f"


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list) and any(isinstance(item, np.ndarray) for item in value):
        return [change(item) for item in value]
    return change(value) if isinstance(value, np.ndarray | np.generic) else value


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]
