"""Changes to an exported ONNX graph, in order; each says what it did and is checked where it can be.

A pass takes and returns a model. One that fails names itself and those that ran before it.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edgediff.errors import UnsupportedError
from edgediff.targets.base import converter_errors
from edgediff.targets.onnx.attention import decompose_attention, fuse_attention, slice_attention
from edgediff.targets.onnx.feed_forward import slice_feed_forwards
from edgediff.targets.onnx.group_norm import expand_group_norm
from edgediff.targets.onnx.separate_gates import separate_gates
from edgediff.targets.onnx.shared_rows import share_rows
from edgediff.targets.onnx.upsampling import merge_upsampling
from edgediff.targets.onnx.winograd import filter_rows
from edgediff_runtime.errors import one_line

log = logging.getLogger(__name__)

# onnxsim needs small constants (shapes, axes) to fold with; anything larger is a weight.
SKELETON_BYTES = 4096
MERGES = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched", "fuse_qkv")
# What changes a weight's numbers.
SCALES = ("fuse_bn_into_conv", "fuse_matmul_into_conv", "fuse_mul_into_conv", "fuse_preceding_mul_into_conv")


@dataclass(frozen=True)
class Pass:
    """A named change of a model."""

    name: str
    apply: Callable[[ModelProto], ModelProto]


def name_by_module(model: ModelProto) -> ModelProto:
    """Names nodes after the modules of torch that they come of, where the exporter's notes say: faults are named so."""
    count: dict[str, int] = {}
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = notes.get("pkg.torch.onnx.name_scopes", "").strip("[]").replace("'", "").split(", ")
        path = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        if path:
            name = f"{path}/{node.op_type}"
            count[name] = count.get(name, 0) + 1
            node.name = name if count[name] == 1 else f"{name}.{count[name]}"
    return model


def strip_metadata(model: ModelProto) -> ModelProto:
    """Removes the exporter's stack traces and module paths: they name files of the exporting machine."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    inner = (each for function in model.functions for each in (function, *function.node))
    for holder in (model, graph, *graph.node, *values, *inner):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    return model


def simplify(model: ModelProto, skipped: tuple[str, ...] = ()) -> ModelProto:
    """Runs onnxsim without the optimizers in `skipped`; a model whose weights lie outside is simplified without them.

    Those are the models that would not fit into one protobuf, nor twice into memory.
    """
    import onnxsim

    outside = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    weights = _take_weights(model) if outside else {}
    with converter_errors("onnxsim"):
        simplified: ModelProto = onnxsim.simplify(model, skipped_optimizers=list(skipped))[0]
    if weights:
        _put_weights(simplified, weights)
    log.info("onnxsim: %d nodes before, %d after", len(model.graph.node), len(simplified.graph.node))
    return simplified


def weight_bytes(model: ModelProto) -> int:
    """Counts the bytes of a model's weights, wherever they lie."""
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def tensor_bytes(tensor: TensorProto) -> int:
    """Counts the bytes of one tensor, wherever they lie."""
    count: int = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.INT4:
        return (count + 1) // 2
    size: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return count * size


def _take_weights(model: ModelProto) -> dict[str, TensorProto]:
    """Turns every weight into an input of the graph, so that only the skeleton is simplified."""
    taken: dict[str, TensorProto] = {}
    kept = []
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) > SKELETON_BYTES or tensor.data_location == TensorProto.EXTERNAL:
            taken[tensor.name] = tensor
            model.graph.input.append(_as_input(tensor))
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return taken


def _put_weights(model: ModelProto, weights: dict[str, TensorProto]) -> None:
    used = {name for node in model.graph.node for name in node.input}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)


def _as_input(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def run_passes(model: ModelProto, passes: tuple[Pass, ...]) -> ModelProto:
    """Runs passes in order; an UnsupportedError names the one that failed and those that ran before it."""
    done: list[str] = []
    for step in passes:
        try:
            model = step.apply(model)
        except UnsupportedError as e:
            before = ", ".join(done) or "none"
            raise UnsupportedError(f"pass {step.name}: {e} (passes before it: {before})") from e
        done.append(step.name)
    return model


NAME_BY_MODULE = Pass("names", name_by_module)
STRIP_METADATA = Pass("strip-metadata", strip_metadata)
GROUP_NORM = Pass("group-norm", expand_group_norm)
PORTABLE_GROUP_NORM = Pass("group-norm", partial(expand_group_norm, portable=True))
ATTENTION = Pass("attention", fuse_attention)
SEPARATE_GATES = Pass("gates", separate_gates)
SLICE_ATTENTION = Pass("attention-sliced", slice_attention)
DECOMPOSE_ATTENTION = Pass("attention-decomposed", decompose_attention)
SIMPLIFY = Pass("onnxsim", simplify)
# Matmuls keep their biases separate, since no int8 Gemm kernel has a float result; and they are not merged, since
# splitting a merged result in three costs more than three int8 matmuls.
SIMPLIFY_UNMERGED = Pass("onnxsim", partial(simplify, skipped=MERGES))
# Weights that are to be rounded are those of torch.
SIMPLIFY_UNSCALED = Pass("onnxsim", partial(simplify, skipped=(*MERGES, *SCALES)))
# Same result with fewer operations or less memory traffic. After onnxsim, which would store the new kernels instead of
# the weights that they are sums of.
FASTER = (
    Pass("feed-forward", slice_feed_forwards),
    Pass("upsampling", merge_upsampling),
    Pass("winograd", filter_rows),
)

# Last: it changes the patterns that other passes look for.
SHARED_ROWS = Pass("shared-rows", share_rows)


def check(model: ModelProto | str) -> None:
    """Runs onnx.checker over a model or a file, which large models need; a fault is an UnsupportedError."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise UnsupportedError(f"onnx.checker: {one_line(e)}") from e
