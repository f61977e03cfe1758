"""Every op that the evaluator knows.

An op is a function with MIL's own parameter names and defaults. How it is given a parameter its annotation says: a
``Tensor``, a list of them, or else a plain number, string or list. Tensors of float16 come as float32 (see `dtypes`),
and results are rounded by the caller.
"""

from collections.abc import Callable
from typing import Any

from edgediff.mil.ops_activation import ACTIVATIONS
from edgediff.mil.ops_constexpr import CONSTEXPRS
from edgediff.mil.ops_conv import CONVOLUTIONS
from edgediff.mil.ops_elementwise import ELEMENTWISE
from edgediff.mil.ops_fill import FILLS
from edgediff.mil.ops_gather import GATHERS
from edgediff.mil.ops_linear import PRODUCTS
from edgediff.mil.ops_norm import NORMS
from edgediff.mil.ops_reduction import REDUCTIONS
from edgediff.mil.ops_resize import RESIZES
from edgediff.mil.ops_shape import SHAPES
from edgediff.mil.ops_slice import SLICES

OPS: dict[str, Callable[..., Any]] = {
    **ACTIVATIONS,
    **CONSTEXPRS,
    **CONVOLUTIONS,
    **ELEMENTWISE,
    **FILLS,
    **GATHERS,
    **NORMS,
    **PRODUCTS,
    **REDUCTIONS,
    **RESIZES,
    **SHAPES,
    **SLICES,
}
# Their results hold numbers of their operands and no others.
MOVES = frozenset(
    {
        *SHAPES,
        *GATHERS,
        "crop",
        "slice_by_index",
        "slice_by_size",
        "resize_nearest_neighbor",
        "upsample_nearest_neighbor",
    }
)
