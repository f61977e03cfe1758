"""A reference evaluator of saved ML Programs, on any machine.

Reads an .mlpackage, protobuf and weights, and computes it in torch on the CPU as a model of the device: each op in
fp32, its result rounded to the dtype that the program declares. It shares nothing with the converter but the
protobuf's definition, so that it checks what the converter wrote against the model.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgediff.errors import ProgramError
from edgediff.mil.dtypes import DTYPES
from edgediff.mil.function import Function
from edgediff.mil.program import Program, open_program

__all__ = ["Function", "Program", "evaluate", "open_program"]


def evaluate(path: str | Path, inputs: Mapping[str, np.ndarray], function: str | None = None) -> dict[str, np.ndarray]:
    """Evaluates a function of a saved ML Program once, the default one if None; `open_program` keeps it for more.

    Args:
        inputs: Arrays by the program's own names, of the shapes that it declares; cast to its dtypes.

    Returns:
        The outputs by the program's own names, of the shapes and dtypes that it declares.

    Raises:
        ProgramError: The package is damaged or no ML Program, contains an op, a parameter or a dtype that is not known,
            has no such function, or the inputs are not what it takes.
        MissingExtraError: coremltools is not installed.
    """
    prepared = open_program(path).function(function)
    try:
        values = prepared.run(inputs)
    except ProgramError as e:
        raise ProgramError(f"{path}: {e}") from e
    return {name: values[name].numpy().astype(DTYPES[spec.dtype].array) for name, spec in prepared.outputs.items()}
