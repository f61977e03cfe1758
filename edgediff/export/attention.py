"""Attention as one operator on rows of features, without the heads taken apart in the graph.

From operator set 23 on the exporter writes attention as one operator, which it hands the heads as a dimension of their
own: each query, key and value is reshaped and transposed before, and the result after. The operator takes them apart
itself if it is told their number. ONNX Runtime computes its own ``MultiHeadAttention`` block by block, without ever
holding all scores: for many keys that is the faster one, and the one that needs little memory.
"""

import logging
from collections import Counter
from typing import Any

from onnx import ModelProto
from onnxscript import ir
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite

log = logging.getLogger(__name__)

CONTRIB = "com.microsoft"
# From so many keys on the operator that goes block by block is the faster one; for fewer it is the slower one.
MANY_KEYS = 1024
_HEADS_FIRST = (0, 2, 1, 3)


def fuse_attention(model: ModelProto) -> ModelProto:
    """Lets every attention operator take the heads apart itself.

    Args:
        model: Of operator set 23 or later; in earlier ones there is no such operator, and nothing is done.

    Returns:
        The changed model.
    """
    if not any(node.op_type == "Attention" for node in model.graph.node):
        return model
    rule = _JoinHeads.rule()  # type: ignore[no-untyped-call]
    changed: ModelProto = ir.to_proto(rewrite(ir.from_proto(model), RewriteRuleSet([rule])))
    kinds = Counter(node.op_type for node in changed.graph.node if "num_heads" in str(node.attribute))
    log.info("attention: heads joined in %s", dict(kinds))
    return changed


class _JoinHeads(RewriteRuleClassBase):
    """Reshape and Transpose of queries, keys and values, Attention, Transpose and Reshape: one operator."""

    def pattern(self, op: Any, q: Any, k: Any, v: Any, q_heads: Any, k_heads: Any, v_heads: Any, rows: Any) -> Any:
        """What is looked for."""
        attended = op.Attention(
            op.Transpose(op.Reshape(q, q_heads, _outputs=["q_apart"]), perm=list(_HEADS_FIRST)),
            op.Transpose(op.Reshape(k, k_heads, _outputs=["k_apart"]), perm=list(_HEADS_FIRST)),
            op.Transpose(op.Reshape(v, v_heads, _outputs=["v_apart"]), perm=list(_HEADS_FIRST)),
            _outputs=["attended"],
        )
        return op.Reshape(op.Transpose(attended, perm=list(_HEADS_FIRST)), rows, _outputs=["out"])

    # The matcher hands values over by the names of the parameters, which no base class could know.
    def check(  # type: ignore[override]
        self, context: Any, q: Any, k: Any, v: Any, out: Any, **values: Any
    ) -> bool:
        """Whether the reshapes take heads apart and put them together again, and do nothing else."""
        for whole, apart in ((q, "q_apart"), (k, "k_apart"), (v, "v_apart"), (out, "q_apart")):
            if whole.shape is None or values[apart].shape is None:
                return False
            if (len(whole.shape), len(values[apart].shape)) != (3, len(_HEADS_FIRST)):
                return False
            _, tokens, features = whole.shape
            _, tokens_apart, heads, width = values[apart].shape
            known = all(isinstance(size, int) for size in (tokens, features, heads, width))
            if not known or tokens != tokens_apart or features != heads * width:
                return False
        # What else the operator can do is at its default, which is the one of its other form and of the other operator.
        said = values["attended"].producer().attributes
        return not any(said.get_float(name, 0.0) for name in ("scale", "softcap")) and not said.get_int("is_causal", 0)

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, q_apart: Any, k_apart: Any, **values: Any) -> Any:
        """What takes its place."""
        heads, keys = q_apart.shape[2], k.shape[1]
        if keys >= MANY_KEYS and heads == k_apart.shape[2]:
            return op.MultiHeadAttention(q, k, v, num_heads=heads, _domain=CONTRIB, _version=1)
        return op.Attention(q, k, v, q_num_heads=heads, kv_num_heads=k_apart.shape[2])
