"""A function of an ML Program, prepared: constants decoded, parameters bound, and run op by op.

A model of the device and not the device: each op is computed in fp32 from operands of the declared dtypes, and its
result rounded to the dtype that it declares. What a device keeps in float16 within an op (a sum, a softmax's
exponentials) is not seen here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import to_declared
from edgediff.mil.values import Constant, Spec

Watch = Callable[[str, str, Tensor, str], None]
# torch's errors for an impossible operation.
FAULTS = (RuntimeError, ValueError, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError)


@dataclass
class Step:
    """One op with its parameters bound.

    Attributes:
        moves: Whether each number of the result is a number of an operand, so that there is nothing to round.
        fixed: Parameters that are constants.
        tensors: Parameters that are tensors, by name.
        lists: Parameters that are lists of tensors: names, or constants themselves.
        numbers: Parameters that are plain numbers and yet computed by an earlier op, by the name of its result.
        done: Names of tensors that no later op takes.
    """

    op: str
    function: Callable[..., Any]
    outputs: tuple[tuple[str, Spec], ...]
    moves: bool
    fixed: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str | Tensor]] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    done: tuple[str, ...] = ()

    def takes(self) -> set[str]:
        """Names of the tensors that the op takes."""
        listed = {item for items in self.lists.values() for item in items if isinstance(item, str)}
        return {*self.tensors.values(), *self.numbers.values(), *listed}

    def run(self, values: Mapping[str, Tensor], rounded: bool) -> tuple[Tensor, ...]:
        """Computes the op's outputs; a ProgramError where that fails, or a result is not of the declared shape."""
        arguments = self.fixed | {key: values[name] for key, name in self.tensors.items()}
        for key, items in self.lists.items():
            arguments[key] = [values[item] if isinstance(item, str) else item for item in items]
        for key, name in self.numbers.items():
            arguments[key] = values[name].tolist()
        try:
            results = self.function(**arguments)
        except FAULTS as e:
            raise ProgramError(f"{self}: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
        except ProgramError as e:
            raise ProgramError(f"{self}: {e}") from e
        if isinstance(results, Tensor):
            results = (results,)
        if len(results) != len(self.outputs):
            raise ProgramError(f"{self}: {len(results)} results; the program declares {len(self.outputs)}")
        declared = []
        for value, (name, spec) in zip(results, self.outputs, strict=True):
            if not spec.takes(tuple(value.shape)):
                raise ProgramError(f"{self}: {name} has shape {list(value.shape)}; declared is {_sizes(spec)}")
            try:
                declared.append(to_declared(value, spec.dtype, rounded and not self.moves))
            except FAULTS as e:
                raise ProgramError(f"{self}: {name} cannot be converted to {spec.dtype}") from e
        return tuple(declared)

    def __str__(self) -> str:
        return f"{self.op} {self.outputs[0][0] if self.outputs else '(no output)'}"


@dataclass(eq=False)
class Function:
    """A function of a program, ready to run: `steps` are its ops without constants."""

    name: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    steps: list[Step]
    constants: Mapping[str, Constant]

    def __post_init__(self) -> None:
        kept = set(self.outputs)
        for step in reversed(self.steps):
            names = step.takes() | {name for name, _ in step.outputs}
            step.done = tuple(sorted(names - kept))
            kept |= names

    @torch.no_grad()
    def run(
        self, inputs: Mapping[str, np.ndarray | Tensor], *, rounded: bool = True, watch: Watch | None = None
    ) -> dict[str, Tensor]:
        """Evaluates the function.

        Args:
            inputs: By name, of the declared shapes; cast to the declared dtypes.
            rounded: Whether each float16 result is rounded. Without, fp32 arithmetic on the stored weights.
            watch: Called with each op's type, output name, value and declared dtype, as they are computed.

        Returns:
            The outputs by name; float16 ones as float32 tensors. An output may be on an input's memory.

        Raises:
            ProgramError: An input is missing, unknown or of another shape, or an op cannot be computed.
        """
        values = self._take(inputs, rounded)
        for step in self.steps:
            results = step.run(values, rounded)
            for (name, spec), value in zip(step.outputs, results, strict=True):
                values[name] = value
                if watch is not None:
                    watch(step.op, name, value, spec.dtype)
            del results
            for name in step.done:
                del values[name]
        return {name: values[name] if name in values else self.constants[name].tensor for name in self.outputs}

    def _take(self, inputs: Mapping[str, np.ndarray | Tensor], rounded: bool) -> dict[str, Tensor]:
        if set(inputs) != set(self.inputs):
            raise ProgramError(
                f"{self.name} takes {', '.join(self.inputs) or 'nothing'}; got {', '.join(inputs) or 'none'}"
            )
        values = {}
        for name, spec in self.inputs.items():
            given = inputs[name]
            if isinstance(given, np.ndarray):
                if given.dtype.kind not in "fiub":
                    raise ProgramError(f"input {name} is an array of {given.dtype}; expected {spec.dtype}")
                native = given.astype(given.dtype.newbyteorder("="), copy=False)
                given = torch.from_numpy(np.require(native, requirements=("C", "W")))
            if not spec.takes(tuple(given.shape)):
                raise ProgramError(f"input {name} has shape {list(given.shape)}; expected {_sizes(spec)}")
            values[name] = to_declared(given, spec.dtype, rounded)
        return values


def _sizes(spec: Spec) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in spec.shape)}]"
