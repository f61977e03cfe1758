"""Attention as one operator on rows of features, without the heads taken apart in the graph.

From operator set 23 on the exporter writes attention as one operator on heads in a dimension of their own: it reshapes
and transposes each query, key and value before, and the result after. Given the number of heads, the operator divides
the features itself. ONNX Runtime computes its own ``MultiHeadAttention`` block by block, without storing all scores:
for many keys it is faster and needs little memory.
"""

import logging
import math
from collections import Counter
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnxscript import ir
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet, rewrite

from edgediff.targets.onnx.rewriting import Rewriting, attributes_of, equal_slices, renamed

log = logging.getLogger(__name__)

CONTRIB = "com.microsoft"
# With fewer keys the operator that computes block by block is the slower one.
MANY_KEYS = 1024
# Scores of one image that take more are computed in slices.
SCORE_BYTES = 2**26
_HEADS_FIRST = (0, 2, 1, 3)
# The softmax of a decomposed attention is named after its result, with this suffix.
ATTENTION_WEIGHTS = ".weights"


def fuse_attention(model: ModelProto) -> ModelProto:
    """Lets every attention operator, which there are from operator set 23 on, take the heads apart itself."""
    if not any(node.op_type == "Attention" for node in model.graph.node):
        return model
    rule = _JoinHeads.rule()  # type: ignore[no-untyped-call]
    changed: ModelProto = ir.to_proto(rewrite(ir.from_proto(model), RewriteRuleSet([rule])))
    kinds = Counter(node.op_type for node in changed.graph.node if "num_heads" in str(node.attribute))
    log.info("attention: heads joined in %s", dict(kinds))
    return changed


def slice_attention(model: ModelProto) -> ModelProto:
    """Computes attention whose scores would take much memory for some of the queries after the other.

    Each query has its own softmax, so that the numbers are the same.

    Args:
        model: With attention as two matmuls and a softmax, of known sizes but the batch; changed in place.
    """
    rewriting, graph = Rewriting(model), model.graph
    made = {name: node for node in graph.node for name in node.output}
    mixes = {node.input[0]: node for node in graph.node if node.op_type == "MatMul"}
    sliced: dict[str, list[NodeProto]] = {}
    left_out: set[str] = set()
    for node in graph.node:
        scores = made.get(node.input[0]) if node.op_type == "Softmax" else None
        if scores is None or scores.op_type != "MatMul" or attributes_of(node).get("axis", -1) not in (-1, 3):
            continue
        mixed = mixes.get(node.output[0])
        alone = rewriting.taken[scores.output[0]] == rewriting.taken[node.output[0]] == 1
        shape = rewriting.shape(scores.output[0]) or rewriting.shape(node.output[0])
        if mixed is None or not alone or len(shape) != len(_HEADS_FIRST) or not all(shape[1:]):
            continue
        slices = equal_slices(shape[2], 4 * math.prod(shape[1:]), SCORE_BYTES)
        if slices > 1:
            sliced[mixed.output[0]] = _by_queries(scores, node, mixed, slices)
            left_out |= {scores.output[0], node.output[0]}
    log.info("attention: %d computed in slices", len(sliced))
    nodes = [sliced.get(node.output[0], [node]) for node in graph.node if node.output[0] not in left_out]
    return rewriting.finish([node for group in nodes for node in group])


def _by_queries(scores: NodeProto, softmax: NodeProto, mixed: NodeProto, slices: int) -> list[NodeProto]:
    out = mixed.output[0]
    queries, rows = ([f"{out}.slice{i}.{what}" for i in range(slices)] for what in ("queries", "rows"))
    nodes = [helper.make_node("Split", [scores.input[0]], queries, f"{out}.slices", axis=2, num_outputs=slices)]
    for i, query in enumerate(queries):
        names = {scores.input[0]: query, mixed.output[0]: rows[i]}
        names |= {node.output[0]: f"{node.output[0]}.slice{i}" for node in (scores, softmax)}
        for node in (scores, softmax, mixed):
            nodes.append(renamed(node, names))
            nodes[-1].name = f"{node.name}.slice{i}"  # the module's, by which faults are named
    return [*nodes, helper.make_node("Concat", rows, [out], f"{out}.together", axis=2)]


def decompose_attention(model: ModelProto) -> ModelProto:
    """Decomposes attention over many keys into two matmuls and a softmax, which can be quantized.

    Args:
        model: With ``MultiHeadAttention`` as `fuse_attention` leaves it; changed in place.
    """
    rewriting = Rewriting(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention" and node.domain == CONTRIB:
            said = attributes_of(node)
            nodes += _decomposed(node, said["num_heads"], said["scale"], rewriting)
        else:
            nodes.append(node)
    return rewriting.finish(nodes)


def _decomposed(node: NodeProto, heads: int, scale: float, rewriting: Rewriting) -> list[NodeProto]:
    out = node.output[0]
    heads_apart = rewriting.constant(f"{out}.attention.apart", np.array([0, 0, heads, -1]))
    together = rewriting.constant(f"{out}.attention.together", np.array([0, 0, -1]))
    scaling = rewriting.constant(f"{out}.attention.scale", np.array(scale, np.float32))
    nodes = []

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    taken = {}
    # Keys are transposed as well.
    for what, given, order in zip(("q", "k", "v"), node.input, (_HEADS_FIRST, (0, 2, 3, 1), _HEADS_FIRST), strict=True):
        apart = add("Reshape", [given, heads_apart], f"{out}.{what}.apart")
        taken[what] = add("Transpose", [apart], f"{out}.{what}", perm=list(order))
    scores = add("Mul", [add("MatMul", [taken["q"], taken["k"]], f"{out}.products"), scaling], f"{out}.scores")
    weights = add("Softmax", [scores], f"{out}{ATTENTION_WEIGHTS}", axis=-1)
    mixed = add("MatMul", [weights, taken["v"]], f"{out}.mixed")
    add("Reshape", [add("Transpose", [mixed], f"{out}.rows", perm=list(_HEADS_FIRST)), together], out)
    return nodes


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

    # The matcher passes values by parameter name, which no base class could declare.
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
            known = all(isinstance(size, int) for size in (features, heads, width))
            # A text of any length, and pixels of any number, have a name.
            named = isinstance(tokens, int) or tokens.value is not None
            if not (known and named) or tokens != tokens_apart or features != heads * width:
                return False
        # Its other attributes must have their defaults, which both operators share.
        said = values["attended"].producer().attributes
        return not any(said.get_float(name, 0.0) for name in ("scale", "softcap")) and not said.get_int("is_causal", 0)

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, q_apart: Any, k_apart: Any, **values: Any) -> Any:
        """What takes its place."""
        heads, width, keys = q_apart.shape[2], q_apart.shape[3], k.shape[1]
        # Without a number it is either the pixels, which are many and the queries too, or a text, which is short.
        many = keys >= MANY_KEYS if isinstance(keys, int) else keys == q.shape[1]
        if many and heads == k_apart.shape[2]:
            return op.MultiHeadAttention(q, k, v, num_heads=heads, scale=width**-0.5, _domain=CONTRIB, _version=1)
        return op.Attention(q, k, v, q_num_heads=heads, kv_num_heads=k_apart.shape[2])
