"""Weights of an ML Program in fewer bits: a pass over coremltools' program that puts tables and codes in their place.

Core ML makes the weights when a model is loaded, or keeps the tables where the Neural Engine computes with them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from edgediff.errors import UnsupportedError
from edgediff.models.stored_weights import StoredWeights
from edgediff.models.weight_formats import Linear, Palette, Stored

NAME = "common::edgediff_store_weights"
# Consts of coremltools that hold a number for each element.
FLOATS = ("float16", "float32")


def storing(ct: Any, weights: StoredWeights, found: set[str]) -> Any:
    """The passes of a conversion with one after them that stores weights; it adds the names of those it finds."""
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    PASS_REGISTRY.passes[NAME] = _store_pass(lambda program: _store(program, weights, found))
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.append_pass(NAME)
    return pipeline


def _store_pass(apply: Callable[[Any], None]) -> Any:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass

    class StorePass(AbstractGraphPass):  # type: ignore[misc]
        """Applies a function to a program."""

        def apply(self, prog: Any) -> None:
            """Changes the program in place."""
            apply(prog)

    return StorePass()


def _store(program: Any, weights: StoredWeights, found: set[str]) -> None:
    for function in program.functions.values():
        for op in list(function.operations):
            if op.op_type != "const" or not isinstance(op.val.val, np.ndarray) or op.val.val.dtype.name not in FLOATS:
                continue
            value = op.val.val
            names = weights.find(value) if value.ndim > 1 else []
            if names:
                found.update(names)
                _replace(function, op, weights.stored(names[0]), value)


def _replace(block: Any, op: Any, stored: Stored, value: np.ndarray) -> None:
    """Puts what makes a weight in the place of the const that it is."""
    from coremltools.converters.mil.frontend import _utils as frontend

    with block:
        name = f"{op.name}_stored"
        if isinstance(stored, Palette):
            table = stored.table.astype(value.dtype).reshape([1] * value.ndim + [-1, 1])
            places = stored.places.reshape(value.shape)
            made = frontend._construct_constexpr_lut_op(places, table, name=name, before_op=op)
        elif isinstance(stored, Linear) and stored.scales.ndim == 1:
            # Rows come first in torch; a table of positions has a dimension before them.
            axis = value.shape.index(len(stored.codes))
            scales = stored.scales.astype(value.dtype).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
            codes = stored.codes.reshape(value.shape)
            made = frontend._construct_constexpr_dequant_op(codes, None, scales, name=name, before_op=op)
        else:
            raise UnsupportedError(f"{op.name}: Core ML has no form for it")
        block.replace_uses_of_var_after_op(
            anchor_op=op, old_var=op.outputs[0], new_var=made, force_replace=True, no_check_var_types=True
        )
        block.remove_ops([op])
