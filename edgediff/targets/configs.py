"""What a bundle is written for: how each target's graphs are to be, part of the recipe."""

from typing import Literal

import msgspec

Target = Literal["onnx", "coreml", "executorch", "openvino"]
Layout = Literal["split", "pair"]
DeploymentTarget = Literal["iOS16", "iOS17", "iOS18"]
# The first operator set that has attention, and one that is everywhere.
FUSED_OPSET, PORTABLE_OPSET = 23, 21


class EightBits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a target of eight bits is quantized by.

    Attributes:
        quantize_nbits: 8 has convolutions and matrix products take weights and inputs of eight bits, with ranges
            measured along whole trajectories; what stands between them stays in fp32. None leaves all of it there.
        quantize_attention: Of eight bits are also the products of attention over many keys, which is spelt out then:
            OpenVINO has kernels for them, ONNX Runtime computes its own operator faster.
        calibration_images: How many images those trajectories are of.
    """

    quantize_nbits: Literal[8] | None = None
    quantize_attention: bool = False
    calibration_images: int = 4


class OnnxConfig(EightBits, frozen=True):
    """How the ONNX graphs are written.

    Attributes:
        opset: Version of the default operator set, 18 to 23. In 23 attention is one operator; earlier ones spell it
            out. None takes 23, or 21 where the graphs are to be portable.
        dtype: Precision of weights and features, of what is not quantized.
        simplify: Run onnxsim over every graph; its result is checked numerically before it is taken.
        portable: Keep to operators that accelerators know too (ONNX Runtime's providers for Core ML, NNAPI and WebGPU).
            Else graphs have what is fastest on ONNX Runtime's CPU: attention as one operator, its own
            ``MultiHeadAttention`` where there are many keys, one operator for the scale and shift of norms, and, where
            nothing is quantized, convolutions with fewer multiplications and feed-forwards in slices.
        layout: How the graphs are packed; None takes the recipe's.
    """

    opset: int | None = None
    dtype: Literal["fp32"] = "fp32"
    simplify: bool = True
    portable: bool = False
    layout: Layout | None = None


class CoreMLConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the Core ML packages (ML Programs) are written.

    Attributes:
        dtype: Precision of weights, features and arithmetic. The timestep's path through sine and cosine, the sample
            and the output stay fp32 in either.
        deployment_target: Oldest system that is to run them. The ``pair`` layout needs iOS18's multifunction packages.
        batch: Rows of each graph, which is fixed throughout; None takes 2 where the operating point is guided (the
            unconditional and the conditional row of an image), 1 where it is not.
        layout: How the graphs are packed; None takes the recipe's.
    """

    dtype: Literal["fp16", "fp32"] = "fp16"
    deployment_target: DeploymentTarget = "iOS18"
    batch: int | None = None
    layout: Layout | None = None


class ExecuTorchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the ExecuTorch program is written: one file, a method for each graph, weights once, in fp32, for XNNPACK.

    Attributes:
        batch: Rows of each graph, which is fixed throughout; None takes 2 where the operating point is guided (the
            unconditional and the conditional row of an image), 1 where it is not.
        layout: How the graphs are packed; None takes the recipe's.
    """

    batch: int | None = None
    layout: Layout | None = None


class OpenVinoConfig(EightBits, frozen=True):
    """How OpenVINO's models (IR) are written: what ONNX's default graphs say, in fp32 or eight bits.

    Attributes:
        layout: How the graphs are packed; None takes the recipe's. In a ``pair`` each has its own weights on disk: a
            model in IR knows only those of its own file.
    """

    layout: Layout | None = None


def opset_of(onnx: OnnxConfig) -> int:
    """The operator set of a recipe's ONNX graphs.

    Args:
        onnx: How they are written.

    Returns:
        The one that is asked for, or the one that goes with the operators that are wanted.

    >>> opset_of(OnnxConfig()), opset_of(OnnxConfig(portable=True)), opset_of(OnnxConfig(opset=20))
    (23, 21, 20)
    """
    if onnx.opset is not None:
        return onnx.opset
    return PORTABLE_OPSET if onnx.portable else FUSED_OPSET
