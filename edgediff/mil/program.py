"""An ML Program's functions, decoded from the protobuf into something that runs.

A program is a list of ops per function. An op's parameters are bound to names or to values themselves; those of the
constexpr ops, which unpack compressed weights, are attributes up to iOS 17 and inputs from iOS 18 on. Both are one
here.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Container, Hashable
from pathlib import Path
from typing import Any

from torch import Tensor

from edgediff.errors import ProgramError
from edgediff.mil.function import Function, Step
from edgediff.mil.ops import MOVES, OPS
from edgediff.mil.package import Package, read_package
from edgediff.mil.values import Constant, Spec, Values

CONSTEXPR = "constexpr_"


class Program:
    """A saved ML Program; `default` is the function that runs where none is named."""

    def __init__(self, package: Package, values: Values) -> None:
        self.package = package
        self.functions = package.functions
        self.default = package.default
        self.specification_version = package.specification_version
        self._values = values
        self._constants: dict[Hashable, Constant] = {}
        self._prepared: dict[str, Function] = {}

    def function(self, name: str | None = None) -> Function:
        """Prepares a function, the default one if None: decodes its constants and binds each op's parameters.

        It is the same object each time, and constants of equal content are in memory once.

        Raises:
            ProgramError: There is no such function, or it cannot be evaluated: the message names the op and its output.
        """
        name = self.default if name is None else name
        if name not in self.functions:
            choices = ", ".join(self.functions) or "none"
            raise ProgramError(f"{self.package.path} has no function {name!r}; choices: {choices}")
        if name not in self._prepared:
            try:
                self._prepared[name] = self._prepare(name)
            except ProgramError as e:
                raise ProgramError(f"{self.package.path}: {name}: {e}") from e
        return self._prepared[name]

    def _prepare(self, name: str) -> Function:
        proto = self.package.spec.mlProgram.functions[name]
        if list(proto.block_specializations) != [proto.opset]:
            blocks = ", ".join(sorted(proto.block_specializations)) or "none"
            raise ProgramError(f"blocks for the opsets {blocks}; expected one, for {proto.opset!r}")
        self.package.check_opset(proto.opset)
        block = proto.block_specializations[proto.opset]
        inputs: dict[str, Spec] = {}
        for item in proto.inputs:
            try:
                inputs[item.name] = self._values.spec(item.type)
            except ProgramError as e:
                raise ProgramError(f"input {item.name}: {e}") from e
        specs = dict(inputs)
        constants: dict[str, Constant] = {}
        steps: list[Step] = []
        for op in block.operations:
            label = f"{op.type} {op.outputs[0].name if op.outputs else '(no output)'}"
            try:
                outputs = tuple((item.name, self._values.spec(item.type)) for item in op.outputs)
                for output, _ in outputs:
                    if output in specs:
                        raise ProgramError(f"{output} is made twice")
                specs.update(outputs)
                if op.type == "const":
                    constants[op.outputs[0].name] = self._constant(op.attributes["val"])
                elif op.type.startswith(CONSTEXPR):
                    constants.update(self._unpack(op, outputs, constants))
                else:
                    steps.append(self._bind(op, outputs, constants, specs)[0])
            except ProgramError as e:
                raise ProgramError(f"{label}: {e}") from e
        missing = [output for output in block.outputs if output not in specs]
        if missing:
            raise ProgramError(f"no operation computes the output {missing[0]}")
        gives = {output: specs[output] for output in block.outputs}
        self.package.check_description(name, inputs, gives)
        return Function(name, inputs, gives, steps, constants)

    def _value(self, value: Any) -> Constant:
        # The place of a blob, or the value itself: the same for all functions that share a weight.
        key = value.SerializeToString(deterministic=True)
        return Constant(self._values.spec(value.type).dtype, self._values.array(value), key)

    def _constant(self, value: Any) -> Constant:
        constant = self._value(value)
        return self._constants.setdefault(constant.key, constant)

    def _unpack(
        self, op: Any, outputs: tuple[tuple[str, Spec], ...], constants: dict[str, Constant]
    ) -> dict[str, Constant]:
        step, keys = self._bind(op, outputs, constants, constants)
        made: list[Hashable] = [(op.type, *keys, i) for i in range(len(outputs))]
        if not all(key in self._constants for key in made):
            for key, tensor, (_, spec) in zip(made, step.run({}, rounded=True), outputs, strict=True):
                self._constants[key] = Constant(spec.dtype, tensor.numpy(), key)
        return {name: self._constants[key] for (name, _), key in zip(outputs, made, strict=True)}

    def _bind(
        self,
        op: Any,
        outputs: tuple[tuple[str, Spec], ...],
        constants: dict[str, Constant],
        known: Container[str],
    ) -> tuple[Step, list[Hashable]]:
        """Binds an op's parameters to those of the function that computes it; also gives its constants' keys."""
        if op.type not in OPS:
            raise ProgramError("this op is not known to the evaluator")
        kinds, required = _parameters(OPS[op.type])
        step = Step(op.type, OPS[op.type], outputs, moves=op.type in MOVES)
        keys: list[Hashable] = []
        given = self._given(op, constants, known)
        for key, sources in given.items():
            if key not in kinds:
                raise ProgramError(f"input {key} is not known to the evaluator; choices: {', '.join(kinds)}")
            fixed = [item for item in sources if isinstance(item, Constant)]
            keys.append((key, *(item.key for item in fixed)))
            if kinds[key] == "tensors":
                step.lists[key] = [item.tensor if isinstance(item, Constant) else item for item in sources]
            elif kinds[key] == "numbers":
                if len(fixed) != len(sources):
                    raise ProgramError(f"input {key} is computed; expected constants")
                step.fixed[key] = tuple(item.number for item in fixed)
            elif len(sources) != 1:
                raise ProgramError(f"input {key} has {len(sources)} values; expected one")
            elif fixed:
                step.fixed[key] = fixed[0].tensor if kinds[key] == "tensor" else fixed[0].number
            else:
                (step.tensors if kinds[key] == "tensor" else step.numbers)[key] = str(sources[0])
        missing = [key for key in required if key not in given]
        if missing:
            raise ProgramError(f"input {missing[0]} is missing")
        return step, keys

    def _given(self, op: Any, constants: dict[str, Constant], known: Container[str]) -> dict[str, list[str | Constant]]:
        """What an op is given for each parameter: names, and constants."""
        # Only the results of constexpr ops are shared: what they are made from is not kept.
        read = self._value if op.type.startswith(CONSTEXPR) else self._constant
        given: dict[str, list[str | Constant]] = {}
        for key, argument in sorted(op.inputs.items()):
            sources = given.setdefault(key, [])
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value":
                    sources.append(read(binding.value))
                elif binding.name in constants:
                    sources.append(constants[binding.name])
                elif binding.name in known:
                    sources.append(binding.name)
                else:
                    raise ProgramError(f"no earlier operation computes {binding.name}, its input {key}")
        for key, value in sorted(op.attributes.items()):
            if key != "name":
                given.setdefault(key, []).append(read(value))
        return given


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """How a function takes each parameter, read from its annotations; and those without a default."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    kinds = {}
    for name in parameters:
        hint = hints[name]
        if hint == list[Tensor]:
            kinds[name] = "tensors"
        elif typing.get_origin(hint) is tuple:
            kinds[name] = "numbers"
        elif Tensor in (hint, *typing.get_args(hint)):
            kinds[name] = "tensor"
        else:
            kinds[name] = "number"
    required = tuple(name for name, item in parameters.items() if item.default is inspect.Parameter.empty)
    return kinds, required


def open_program(path: str | Path) -> Program:
    """Opens a saved ML Program; its weights are mapped when a function is prepared.

    Raises:
        ProgramError: It is no .mlpackage, damaged, no ML Program, or newer than the installed coremltools.
        MissingExtraError: coremltools is not installed.
    """
    from edgediff.mil.coremltools_quiet import import_coremltools

    package = read_package(path)
    return Program(package, Values(package, import_coremltools("reading an ML Program").proto.MIL_pb2))
