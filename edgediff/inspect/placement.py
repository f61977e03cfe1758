"""Placement: what in a bundle's graphs is known to fall off the accelerator that it was exported for.

Each rule is one line of a table, with the thread or document that says so. Which processor runs an operation is decided
on the device, by code that changes with chip and system: a note is a reason to measure (Xcode's performance report,
ONNX Runtime's verbose log), never the measurement. Files are read without their weights.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgediff.errors import EdgediffError, ProgramError
from edgediff.targets import TARGETS
from edgediff.targets.operations import Op, Value
from edgediff_runtime import EdgeRuntimeError, open_bundle
from edgediff_runtime.errors import one_line


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


GRAPH = _names("input output weights")  # what the graph has, besides operations
# The next three are onnxruntime's own lists (onnxruntime/tools/mobile_helpers); a test compares them.
NEURALNETWORK = _names(
    "Add ArgMax AveragePool BatchNormalization Cast Clip Concat Conv DepthToSpace Div Flatten Gather Gemm "
    "GlobalAveragePool GlobalMaxPool LRN LeakyRelu MatMul MaxPool Mul PRelu Pad Pow Reciprocal ReduceSum Relu Reshape "
    "Resize Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose"
)
MLPROGRAM = _names(
    "Add And ArgMax AveragePool Cast Ceil Clip Concat Conv ConvTranspose Cos DepthToSpace Div Elu Erf Exp GatherND "
    "Gelu Gemm GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity "
    "InstanceNormalization LayerNormalization LeakyRelu MatMul Max MaxPool Mul PRelu Pow Reciprocal ReduceMax "
    "ReduceMean ReduceSum Relu Reshape Resize Round Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze Sub "
    "Tanh Tile Transpose Unsqueeze Where com.microsoft:FusedConv com.microsoft:QuickGelu"
)
# Without GroupNormalization: what ONNX Runtime expands it into computes its shapes, and Shape is not here either.
NNAPI = GRAPH | _names(
    "Abs Add AveragePool BatchNormalization Cast Clip Concat Conv DepthToSpace DequantizeLinear Div Elu Exp Flatten "
    "Floor Gather Gemm GlobalAveragePool GlobalMaxPool Identity LRN LeakyRelu Log MatMul Max MaxPool Min Mul Neg "
    "PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear ReduceMean Relu Reshape Resize Sigmoid Sin Slice Softmax "
    "Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze com.microsoft:QLinearAdd com.microsoft:QLinearAveragePool "
    "com.microsoft:QLinearSigmoid"
)
# The list for ML Programs lags behind what the EP registers (op_builder_factory.cc): the other list's too, and these.
COREML = GRAPH | MLPROGRAM | NEURALNETWORK | _names("Range ReduceMin ReduceProd")
# LiteRT's, of August 2026: what the GPU accelerator's parser knows, and the lists beside the NPU plugins.
LITERT_GPU = _names(
    "ABS ADD ADD_N AVERAGE_POOL_2D BATCH_MATMUL CAST CONCATENATION CONV_2D COS CUMSUM DENSIFY DEPTHWISE_CONV_2D "
    "DEPTH_TO_SPACE DEQUANTIZE DIV ELU EQUAL EXP FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GELU GREATER "
    "GREATER_EQUAL HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOG LOGICAL_AND LOGISTIC LSTM MAXIMUM MAX_POOL_2D MEAN "
    "MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL ONE_HOT PACK PAD PADV2 POW PRELU QUANTIZE REDUCE_MAX REDUCE_MIN REDUCE_PROD "
    "RELU RELU_0_TO_1 RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SELECT_V2 SIGN "
    "SIN SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TILE "
    "TRANSPOSE TRANSPOSE_CONV UNPACK"
)
LITERT_QUALCOMM = _names(
    "ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND BROADCAST_TO CAST CEIL CONCATENATION "
    "CONV_2D CONV_3D COS CUMSUM DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV DYNAMIC_UPDATE_SLICE ELU "
    "EMBEDDING_LOOKUP EQUAL EXP FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GELU GREATER GREATER_EQUAL "
    "HARD_SWISH L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR "
    "LOGISTIC MAXIMUM MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL ONE_HOT PACK PAD PADV2 POW PRELU QUANTIZE "
    "REDUCE_ALL REDUCE_ANY REDUCE_MAX REDUCE_MIN RELU RELU_0_TO_1 RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR "
    "RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT SELECT SELECT_V2 SIGN SIN SLICE SOFTMAX SPACE_TO_BATCH_ND "
    "SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TILE TOPK_V2 TRANSPOSE "
    "TRANSPOSE_CONV UNPACK"
)
LITERT_MEDIATEK = _names(
    "ABS ADD AVERAGE_POOL_2D BATCH_MATMUL CAST CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEQUANTIZE DIV FULLY_CONNECTED "
    "GELU GREATER HARD_SWISH L2_NORMALIZATION LEAKY_RELU LESS LOGISTIC MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL PAD PADV2 "
    "PRELU QUANTIZE REDUCE_MAX RELU RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SLICE SOFTMAX SPLIT SQRT "
    "SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TRANSPOSE TRANSPOSE_CONV"
)


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        where: What an operation falls off: ``ane`` is looked for in ML Programs, those of LiteRT in .tflite files, the
            others in ONNX graphs.
        hits: What is wrong with an operation ("" where its type says all); None where nothing is.
        says: What happens, and whether the source documents it or somebody observed it.
        rewrite: What to do about it.
    """

    id: str
    where: Literal["ane", "coreml-ep", "nnapi-ep", "xnnpack-ep", "litert-gpu", "litert-qualcomm", "litert-mediatek"]
    hits: Callable[[Op], str | None]
    says: str
    rewrite: str
    title: str
    source: str


@dataclass(frozen=True)
class Note:
    """What a rule found in a graph: `ops` counts operations by type, `names` and `details` are of the first three."""

    rule: Rule
    target: str
    graph: str
    ops: dict[str, int]
    names: tuple[str, ...]
    details: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The note as plain data."""
        words = {name: getattr(self.rule, name) for name in ("where", "says", "rewrite", "title", "source")}
        found = {name: getattr(self, name) for name in ("target", "graph", "ops", "names", "details")}
        return {"rule": self.rule.id, **words, **found}


def _typed(op: Op, dtype: str) -> str | None:
    values = (*op.outputs, *(value for value in op.inputs.values() if not value.constant))
    return next((str(value) for value in values if value.dtype == dtype and op.type not in GRAPH), None)


def _small_attention(op: Op) -> str | None:
    query = op.inputs.get("query")  # no other operation has one
    return str(query) if query and math.prod(n for n in query.shape if isinstance(n, int)) <= 2**20 else None


def _not_4d_norm(op: Op) -> str | None:
    x = op.input("0")
    return str(x) if op.type == "BatchNormalization" and x.shape != ("?",) and len(x.shape) != 4 else None


def _not_4d(op: Op) -> str | None:
    rank, value = (3, op.input("x")) if op.type == "linear" else (5, (*op.outputs, Value(""))[0])
    return str(value) if len(value.shape) == rank else None


def _over_4d(op: Op) -> str | None:
    return next((str(v) for v in (*op.inputs.values(), *op.outputs) if len(v.shape) > 4), None)


def _padded(op: Op) -> str | None:
    if op.type not in ("input", "output") or len(op.outputs[0].shape) < 3:
        return None  # tensors of fewer axes than a feature are too small to matter
    value, last = op.outputs[0], op.outputs[0].shape[-1]
    line = last * (2 if value.dtype == "float16" else 4) if isinstance(last, int) else 0
    return f"{value}: {line} bytes become {-(-line // 64) * 64}" if line % 64 else None


def _weights(op: Op, least: int) -> str | None:
    return f"{op.bytes / 1e6:,.1f} MB" if op.bytes >= least else None


def _symbolic_input(op: Op) -> str | None:
    return str(op.outputs[0]) if op.type == "input" and any(isinstance(n, str) for n in op.outputs[0].shape) else None


def _symbolic_rows(op: Op) -> str | None:
    return str(op.input("0")) if op.type == "Gemm" and isinstance((*op.input("0").shape, 0)[0], str) else None


ORT = "https://github.com/microsoft/onnxruntime/"
LITERT = "https://github.com/google-ai-edge/LiteRT/blob/main/"
APPLE = (
    "Deploying Transformers on the Apple Neural Engine",
    "https://machinelearning.apple.com/research/neural-engine-transformers",
)
# fmt: off
RULES = (
    Rule("ane-flexible-shape", "ane", lambda op: str(op.outputs[0]) if "flexible" in op.attributes else None,
         "answered in Apple's forum: with a range of shapes, only the default shape runs on the ANE",
         "fix the shape: one package, or one function, for each resolution",
         "Dynamic coreml model inference is significantly slower than static model",
         "https://developer.apple.com/forums/thread/724930"),
    Rule("ane-float32", "ane", lambda op: None if op.type == "cast" else _typed(op, "float32"),
         "documented: a program typed float16 is eligible for the ANE, float32 executes on GPU and CPU",
         "convert to float16; what needs fp32, as the sine and cosine of the timestep do, costs a change of processor",
         "Typed Execution Workflow Example (Core ML Tools guide)",
         "https://apple.github.io/coremltools/docs-guides/source/typed-execution-example.html"),
    Rule("ane-int32", "ane", lambda op: _typed(op, "int32"),
         "observed, by programs handed to the ANE without Core ML: int32 is rejected, as tensor and as input",
         "look class embeddings up before the program and hand them in as float16",
         "Capabilities (ANEForge)", "https://aneforge.readthedocs.io/en/latest/capabilities/"),
    Rule("ane-gather", "ane", lambda op: "" if op.type in ("gather", "gather_along_axis", "gather_nd") else None,
         "observed in a compute plan: gather has the CPU as its one supported device, amid operations on the ANE",
         "look class embeddings up before the program and hand them in as float16",
         "TextDecoder.mlcomputeplan.json (distil-whisper-small-cantonese-coreml)",
         "https://huggingface.co/hyperkit/distil-whisper-small-cantonese-coreml/blob/main/"
         "TextDecoder.mlcomputeplan.json"),
    Rule("ane-sin-cos", "ane", lambda op: "" if op.type in ("sin", "cos") else None,
         "observed: the ANE has sine and cosine from M3 on (its A15 family); M1 and M2 (A13, A14) reject them",
         "compute the timestep's embedding before the program; it is the same for every row",
         "ANE op catalog: every native MIL op x device (ANEForge)",
         "https://aneforge.readthedocs.io/en/latest/op-catalog/"),
    Rule("ane-small-attention", "ane", _small_attention,
         "observed in compute plans of single ops: fused attention stays on the CPU up to 2^20 elements in the query",
         "ask MLComputePlan on the device; a deployment target below iOS18 writes matmul, softmax, matmul instead",
         "Disaggregated flash attention with the Neural Engine as the device",
         "https://github.com/vx-lang/Vx/issues/437"),
    Rule("ane-4d", "ane", _not_4d,
         "documented: 4D, channels first, suits the ANE best, reshapes and transposes around it are likely to copy; "
         "linear layers on 3D are to be convolutions. What 5D (coremltools' group norm) costs is not said",
         "swap linear layers for 1 x 1 convolutions on (B, C, 1, S); normalise groups as (B, G, C/G, H*W)",
         *APPLE),
    Rule("ane-padding", "ane", _padded,
         "documented: the last axis of an ANE buffer is aligned to 64 bytes, a shorter one is padded in memory",
         "hand features over as (B, C, 1, H*W), or with a last axis of 32 float16 or a multiple of it",
         *APPLE),
    Rule("ane-phone-weights", "ane", lambda op: _weights(op, 1_000_000_000),
         "documented for Stable Diffusion: chunks below 1 GB of weights are required for the ANE on iOS and iPadOS",
         "compress the weights, or divide lowres into several programs",
         "Core ML Stable Diffusion: --chunk-unet", "https://github.com/apple/ml-stable-diffusion/blob/main/README.md"),
    Rule("ane-large-program", "ane", lambda op: _weights(op, 667_000_000),
         "observed with 667 MB of weights: the ANE's compiler failed, loading hid it, predict killed the process",
         "predict once with CPU_AND_NE in a process of its own; compress the weights, or divide the program",
         "predict() with CPU_AND_NE silently SIGKILLs the process on a large fully-ANE-eligible mlprogram",
         "https://github.com/apple/coremltools/issues/2758"),
    Rule("coreml-ep-op", "coreml-ep", lambda op: None if op.type in COREML else "",
         "documented: not among the operations that the EP takes; runs on the CPU and divides the graph there",
         "export with onnx.portable, or write it in operations of the list: Expand as Tile, say",
         "coreml_supported_mlprogram_ops.md",
         ORT + "blob/main/tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md"),
    Rule("coreml-ep-batch-norm", "coreml-ep", _not_4d_norm,
         "documented: the EP takes batch normalization of four dimensions alone; runs on the CPU and divides the graph",
         "export with onnx.portable, which scales and shifts by Mul and Add",
         "batch_norm_op_builder.cc",
         ORT + "blob/main/onnxruntime/core/providers/coreml/builders/impl/batch_norm_op_builder.cc"),
    Rule("coreml-ep-format", "coreml-ep", lambda op: "" if op.type in MLPROGRAM - NEURALNETWORK else None,
         "documented: not in the list of the EP's model format NeuralNetwork, its default, only in MLProgram's",
         "open the session with the provider option ModelFormat=MLProgram",
         "coreml_supported_neuralnetwork_ops.md",
         ORT + "blob/main/tools/ci_build/github/apple/coreml_supported_neuralnetwork_ops.md"),
    Rule("coreml-ep-pad", "coreml-ep", lambda op: "" if op.attributes.get("mode") == "reflect" else None,
         "observed with 1.24: reflecting pads fall to the CPU, one more partition and round trip for each",
         "onnxruntime 1.26 or newer, with ModelFormat=MLProgram; for older ones, write it as Slice and Concat",
         "CoreML EP: Pad(mode=reflect) falls back to CPU, causing 14 partition round-trips on Apple Silicon",
         ORT + "issues/28022"),
    Rule("coreml-ep-external-data", "coreml-ep", lambda op: _weights(op, 1),
         "observed with 1.24: a model whose weights lie in a file of their own fails to load, or crashes",
         "keep the weights in the .onnx file where it stays below 2 GB",
         "CoreML EP: SIGBUS crash when loading model with external data file via CreateSession",
         ORT + "issues/28005"),
    Rule("nnapi-ep-dynamic", "nnapi-ep", _symbolic_input,
         "documented: NNAPI takes no symbolic sizes; what depends on them runs on the CPU",
         "python -m onnxruntime.tools.make_dynamic_shape_fixed --dim_param batch --dim_value 2",
         "Making dynamic input shapes fixed",
         "https://www.onnxruntime.ai/docs/tutorials/mobile/helpers/make-dynamic-shape-fixed.html"),
    Rule("nnapi-ep-op", "nnapi-ep", lambda op: None if op.type in NNAPI else "",
         "documented: not among the operations that the EP takes; runs on the CPU and divides the graph there",
         "fix the batch; write group norm as Reshape, ReduceMean, Sub, Mul with constant shapes, Expand as a Mul",
         "nnapi_supported_ops.md", ORT + "blob/main/tools/ci_build/github/android/nnapi_supported_ops.md"),
    Rule("xnnpack-ep-gemm-rows", "xnnpack-ep", _symbolic_rows,
         "observed, fixed in July 2026 (#31189): with a symbolic number of rows only the first row is computed",
         "fix the batch, or take an onnxruntime that has the fix",
         "[XNNPACK EP] Gemm treats a dynamic M dimension as 1 and uses the wrong output shape at runtime",
         ORT + "issues/31153"),
    Rule("litert-gpu-op", "litert-gpu", lambda op: None if op.type in LITERT_GPU else "",
         "documented in its source: its parser has no such operation; runs on the CPU and divides the graph",
         "write it in operations of the list: BROADCAST_TO as a MUL, say", "model_builder.cc",
         LITERT + "tflite/delegates/gpu/common/model_builder.cc"),
    Rule("litert-gpu-rank", "litert-gpu", _over_4d,
         "documented in its source: tensors have four dimensions at most; runs on the CPU and divides the graph",
         "reshape it to four dimensions", "model_builder_helper.cc",
         LITERT + "tflite/delegates/gpu/common/model_builder_helper.cc"),
    Rule("litert-qualcomm-op", "litert-qualcomm", lambda op: None if op.type in LITERT_QUALCOMM else "",
         "documented: not among the operations that the plugin compiles; runs on the CPU and divides the graph there",
         "write it in operations of the list", "LiteRT to Qualcomm QNN Compiler Support",
         LITERT + "litert/vendors/qualcomm/compiler/Qualcomm_QNN_Compiler.md"),
    Rule("litert-mediatek-op", "litert-mediatek", lambda op: None if op.type in LITERT_MEDIATEK else "",
         "documented: not among the operations that the plugin compiles; runs on the CPU and divides the graph there",
         "write it in operations of the list; compute the timestep's sine and cosine before the graph",
         "MediaTek_Neuro_Compiler.md", LITERT + "litert/vendors/mediatek/compiler/MediaTek_Neuro_Compiler.md"),
)
# fmt: on


def lint_bundle(path: str | Path) -> tuple[Note, ...]:
    """Looks at every graph of every target of a bundle, in the manifest's order and then in the table's.

    Raises:
        BundleError: The bundle is damaged.
        ProgramError: A package of it is no ML Program.
        MissingExtraError: onnx or coremltools is not installed.
    """
    bundle = open_bundle(path)
    notes: list[Note] = []
    for entry in bundle.manifest.targets:
        for graph in entry.unet.graphs:
            if graph.file is None:
                continue
            try:
                found = TARGETS[entry.target].operations(bundle, graph)
            except (EdgediffError, EdgeRuntimeError):
                raise
            except Exception as e:  # the errors of a damaged protobuf share no base class
                raise ProgramError(f"{graph.file} cannot be read: {type(e).__name__} {one_line(e)}") from e
            notes += lint(found, entry.target, graph.name)
    return tuple(notes)


def lint(ops: list[Op], target: str, graph: str) -> tuple[Note, ...]:
    """One note for each rule that finds something for the accelerators of a target's graphs, in the table's order."""
    notes = []
    for rule in RULES:
        hit = [(op, words) for op in ops if (words := rule.hits(op)) is not None]
        if hit and rule.where in TARGETS[target].accelerators:
            counts = sorted(Counter(op.type for op, _ in hit).items(), key=lambda item: (-item[1], item[0]))
            details = tuple(dict.fromkeys(words for _, words in hit if words))
            notes.append(Note(rule, target, graph, dict(counts), tuple(op.name for op, _ in hit[:3]), details[:3]))
    return tuple(notes)
