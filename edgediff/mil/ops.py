"""Every op that the evaluator knows.

An op is a public function of an ``ops_`` file, with MIL's own name, parameter names and defaults. Its annotations say
how it takes a parameter: as a ``Tensor``, a list of them, or else a plain number, string or list. Tensors of float16
come as float32 (see `dtypes`), and the caller rounds results.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from edgediff.mil import ops_constexpr, ops_elementwise, ops_fill, ops_layer, ops_move, ops_resize


def _ops_of(module: ModuleType) -> dict[str, Callable[..., Any]]:
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in own.items() if callable(value) and not name.startswith("_")}


OPS = {
    **_ops_of(ops_constexpr),
    **_ops_of(ops_elementwise),
    **ops_elementwise.TABLE,
    **_ops_of(ops_fill),
    **_ops_of(ops_layer),
    **_ops_of(ops_move),
    **_ops_of(ops_resize),
}
# Their results are only numbers of their operands.
MOVES = frozenset({*_ops_of(ops_move), "resize_nearest_neighbor", "upsample_nearest_neighbor"})
