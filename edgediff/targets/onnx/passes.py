"""Changes to an exported ONNX graph, in order; each says what it did and is checked where it can be.

A pass takes and returns a model. One that fails names itself and those that ran before it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edgediff.errors import UnsupportedError
from edgediff.targets.onnx.attention import decompose_attention, fuse_attention
from edgediff.targets.onnx.feed_forward import slice_feed_forwards
from edgediff.targets.onnx.group_norm import expand_group_norm
from edgediff.targets.onnx.separate_gates import separate_gates
from edgediff.targets.onnx.shared_rows import share_rows
from edgediff.targets.onnx.upsampling import merge_upsampling
from edgediff.targets.onnx.winograd import filter_rows

log = logging.getLogger(__name__)

# onnxsim needs small constants (shapes, axes) to fold with; what is larger than this is a weight.
SKELETON_BYTES = 4096
MERGES = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched", "fuse_qkv")


@dataclass(frozen=True)
class Pass:
    """A named change.

    Attributes:
        name: What messages call it.
        apply: Takes a model, returns the changed one.
    """

    name: str
    apply: Callable[[ModelProto], ModelProto]


def strip_metadata(model: ModelProto) -> ModelProto:
    """Removes the exporter's stack traces and module paths: they name files of the exporting machine.

    Args:
        model: Changed in place.

    Returns:
        The model.
    """
    graph = model.graph
    for holder in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    for function in model.functions:
        for holder in (function, *function.node):
            del holder.metadata_props[:]
            holder.ClearField("doc_string")
    return model


def simplify(model: ModelProto, skipped: tuple[str, ...] = ()) -> ModelProto:
    """Runs onnxsim; a model whose weights lie outside is simplified without them.

    Those are the models that would not fit into one protobuf, nor twice into memory.

    Args:
        model: The model, weights inside or as references to external data.
        skipped: Which of onnxsim's optimizers to leave out.

    Returns:
        The simplified model.

    Raises:
        UnsupportedError: onnxsim failed.
    """
    import onnxsim

    outside = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    weights = _take_weights(model) if outside else {}
    try:
        simplified: ModelProto = onnxsim.simplify(model, skipped_optimizers=list(skipped))[0]
    except Exception as e:  # its errors share no base class
        raise UnsupportedError(f"onnxsim failed: {' '.join(str(e).split())[:300]}") from e
    if weights:
        _put_weights(simplified, weights)
    log.info("onnxsim: %d nodes before, %d after", len(model.graph.node), len(simplified.graph.node))
    return simplified


def weight_bytes(model: ModelProto) -> int:
    """Counts the bytes of a model's weights, wherever they lie.

    Args:
        model: The model.

    Returns:
        Bytes.
    """
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def tensor_bytes(tensor: TensorProto) -> int:
    """Counts the bytes of one tensor, wherever they lie.

    Args:
        tensor: The tensor.

    Returns:
        Bytes.
    """
    count = 1
    for size in tensor.dims:
        count *= size
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


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
    """Runs passes in order.

    Args:
        model: The exported model.
        passes: What to run.

    Returns:
        The changed model.

    Raises:
        UnsupportedError: One failed; the message names it and those that ran before it.
    """
    done: list[str] = []
    for step in passes:
        try:
            model = step.apply(model)
        except UnsupportedError as e:
            before = ", ".join(done) or "none"
            raise UnsupportedError(f"pass {step.name}: {e} (passes before it: {before})") from e
        done.append(step.name)
    return model


STRIP_METADATA = Pass("strip-metadata", strip_metadata)
GROUP_NORM = Pass("group-norm", expand_group_norm)
PORTABLE_GROUP_NORM = Pass("group-norm", partial(expand_group_norm, portable=True))
ATTENTION = Pass("attention", fuse_attention)
SEPARATE_GATES = Pass("gates", separate_gates)
DECOMPOSE_ATTENTION = Pass("attention-decomposed", decompose_attention)
SIMPLIFY = Pass("onnxsim", simplify)
# Matmuls keep their biases separate, since no int8 Gemm kernel has a float result; and they are not merged, since
# splitting a merged result in three costs more than three int8 matmuls.
SIMPLIFY_UNMERGED = Pass("onnxsim", partial(simplify, skipped=MERGES))
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
    """Runs onnx.checker over a model or a file, which large models need.

    Args:
        model: The model, or the path of its file.

    Raises:
        UnsupportedError: The checker found a fault.
    """
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as e:
        raise UnsupportedError(f"onnx.checker: {' '.join(str(e).split())[:300]}") from e
