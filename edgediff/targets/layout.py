"""Layouts: how the four parts are packed into the graphs of a target, and which modules make them.

``split`` keeps the parts apart: a device holds the cache and the skip connections between them. ``pair`` joins them to
a whole full and a whole cached step, whose shared weights are stored once.
"""

from typing import Literal

import msgspec

from edgediff.models.adaptors import IdentityAdaptor
from edgediff.models.clockwork import SplitUNet
from edgediff.models.part import Chain, Part
from edgediff.targets.configs import Layout
from edgediff_runtime.loop import LOWRES_FEATURE
from edgediff_runtime.manifest import Graph, Tensor

# What stays fp32 in fp16 graphs: the sample, and whatever comes from outside of the model. Sizes and times in the
# thousands lose their fractions in fp16, and a cast in the graph costs less than one by every caller.
OUTSIDE = (
    "sample", "out_sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "class_labels",
)  # fmt: skip
ONNX_WEIGHTS = "onnx/weights.bin"
COREML_PAIR = "coreml/unet.mlpackage"
EXECUTORCH_PROGRAM = "executorch/unet.pte"


def modules(divided: SplitUNet, layout: Layout) -> dict[str, Part]:
    """The modules of a layout's graphs.

    Args:
        divided: The divided UNet.
        layout: How the graphs are packed.

    Returns:
        Modules by the names of their graphs, in the order of a step; they share the UNet's weights.
    """
    if layout == "split":
        return divided.parts
    outputs = ("out_sample", LOWRES_FEATURE)
    # The identity adaptor leaves the feature what it was: the step need not give it back.
    kept = isinstance(divided.adaptor, IdentityAdaptor)
    return {
        "full": Chain([divided.highres_in, divided.lowres, divided.highres_out], outputs),
        "cached": Chain([divided.highres_in, divided.adaptor, divided.highres_out], outputs[:1] if kept else outputs),
    }


def onnx_graphs(parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout) -> tuple[Graph, ...]:
    """The graphs of the ONNX target: symbolic batch, tensors in fp32.

    Args:
        parts: The four parts as graphs.
        divided: The divided UNet.
        layout: How the graphs are packed.

    Returns:
        The graphs in the order of a step.
    """
    return _in_files(_pack(parts, divided, layout), "onnx/{}.onnx", ONNX_WEIGHTS if layout == "pair" else None)


def openvino_graphs(parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout) -> tuple[Graph, ...]:
    """The graphs of the OpenVINO target: symbolic batch, tensors in fp32, each with weights of its own.

    Args:
        parts: The four parts as graphs.
        divided: The divided UNet.
        layout: How the graphs are packed.

    Returns:
        The graphs in the order of a step.
    """
    return _in_files(_pack(parts, divided, layout), "openvino/{}.xml", "openvino/{}.bin")


def _in_files(graphs: tuple[Graph, ...], file: str, weights: str | None) -> tuple[Graph, ...]:
    """Gives each graph that is written its file and its weights' file; the graph's name stands in the place of {}."""
    return tuple(
        graph if graph.file is None
        else msgspec.structs.replace(
            graph, file=file.format(graph.name), external_data=None if weights is None else weights.format(graph.name)
        )
        for graph in graphs
    )  # fmt: skip


def coreml_graphs(
    parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout, batch: int, dtype: str
) -> tuple[Graph, ...]:
    """The graphs of the Core ML target: fixed throughout, features in the graph's dtype, integers of 32 bits.

    Args:
        parts: The four parts as graphs.
        divided: The divided UNet.
        layout: How the graphs are packed.
        batch: Rows of each graph.
        dtype: Precision of what crosses between graphs.

    Returns:
        The graphs in the order of a step.
    """

    def fixed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_fixed(tensor, dtype, batch) for tensor in tensors)

    graphs = []
    for graph in _pack(parts, divided, layout):
        file, function = None, None
        if graph.file is not None:
            file = f"coreml/{graph.name}.mlpackage"
            if layout == "pair":
                file, function = COREML_PAIR, graph.name
        graphs.append(
            msgspec.structs.replace(
                graph, file=file, function=function, inputs=fixed(graph.inputs), outputs=fixed(graph.outputs)
            )
        )
    return tuple(graphs)


def executorch_graphs(parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout, batch: int) -> tuple[Graph, ...]:
    """The graphs of the ExecuTorch target: methods of one program, fixed throughout, in fp32.

    Args:
        parts: The four parts as graphs.
        divided: The divided UNet.
        layout: How the graphs are packed.
        batch: Rows of each graph.

    Returns:
        The graphs in the order of a step.
    """

    def fixed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(msgspec.structs.replace(tensor, shape=_rows(tensor, batch)) for tensor in tensors)

    return tuple(
        msgspec.structs.replace(
            graph,
            file=None if graph.file is None else EXECUTORCH_PROGRAM,
            function=None if graph.file is None else graph.name,
            inputs=fixed(graph.inputs),
            outputs=fixed(graph.outputs),
        )
        for graph in _pack(parts, divided, layout)
    )


def _rows(tensor: Tensor, batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)


def _fixed(tensor: Tensor, dtype: str, batch: int) -> Tensor:
    element: Literal["float32", "float16", "int64", "int32"] = tensor.dtype
    if element == "int64":
        element = "int32"
    elif dtype == "fp16" and tensor.name not in OUTSIDE:
        element = "float16"
    return Tensor(name=tensor.name, dtype=element, shape=_rows(tensor, batch))


def _pack(parts: tuple[Graph, ...], divided: SplitUNet, layout: Layout) -> tuple[Graph, ...]:
    if layout == "split":
        return parts
    tensors = {tensor.name: tensor for graph in parts for tensor in (*graph.inputs, *graph.outputs)}
    return tuple(
        Graph(
            name=name,
            file=name,
            frequency="full_step" if name == "full" else "cached_step",
            inputs=tuple(tensors[key] for key in module.inputs),
            outputs=tuple(tensors[key] for key in module.outputs),
        )
        for name, module in modules(divided, layout).items()
    )
