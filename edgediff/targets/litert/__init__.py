"""LiteRT, once TensorFlow Lite: a .tflite file for each component, with a signature for each graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from edgediff.config.floors import VerifyConfig
from edgediff.errors import ConfigError
from edgediff.targets.base import (
    Backend,
    CalibratedConfig,
    ComponentJob,
    Job,
    Layout,
    Outline,
    Sizes,
    Target,
    batch_check,
    fixed,
    int8_check,
)
from edgediff.targets.operations import Op
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m
from edgediff_runtime.litert_session import INSTALL

if TYPE_CHECKING:
    from edgediff.models.stored_weights import StoredWeights

FOLDER = "litert"


class LiteRtConfig(CalibratedConfig, frozen=True):
    """How .tflite files are written: fixed shapes, in fp32, weights once for all signatures of a file.

    Attributes:
        quantize_nbits: 8 gives the UNet's convolutions and matmuls int8 weights, by ai-edge-quantizer, and inputs as
            `activations` says.
        activations: What goes into those is rounded by the range that it has in each run (``dynamic``, for CPUs), or to
            int8 or int16 by a range that was measured along whole trajectories (for NPUs).
        batch: Rows of the UNet's graphs; None takes 2 where the operating point is guided (the unconditional and the
            conditional row of an image), 1 where it is not.
        layout: How the graphs are packed; None takes the recipe's.
        weights: What the weights of every component are stored in: ``fp16``, ``int8``, ``int4`` (one scale for each
            output channel; the smallest 40 % in int8), or a plan of weights, a file. They are multiplied in fp32.
    """

    activations: Literal["dynamic", "int8", "int16"] = "dynamic"
    batch: int | None = None
    layout: Layout | None = None
    weights: str | None = None


class LiteRtTarget(Target):
    """.tflite files, which Android's own runtime opens, and the accelerators' plugins behind it."""

    name, title, files = "litert", "LiteRT", ".tflite files"
    config = LiteRtConfig
    extra = "litert"
    packages: ClassVar[Mapping[str, str]] = {"litert-torch": "0.10.0", "ai-edge-litert": "2.3.0"}
    backends = (Backend("litert", ("litert",), ("ai_edge_litert",), INSTALL, "run and verify LiteRT bundles"),)
    tools_to_run = ("ai-edge-litert",)
    weight_formats = ("fp16", "int8", "int4")
    int4_scales = "channels"
    accelerators = ("litert-gpu", "litert-qualcomm", "litert-mediatek")

    def check(self, config: LiteRtConfig, layout: Layout) -> None:
        """Checks the batch and the int8 settings."""
        batch_check(self, config.batch)
        int8_check(self, config)
        if config.activations != "dynamic" and config.quantize_nbits is None:
            raise ConfigError(
                f"'litert.activations' is {config.activations}, and nothing is int8; add litert.quantize_nbits: 8"
            )

    def require(self) -> None:
        """Imports the converter."""
        from edgediff.targets.litert.write_litert import import_litert

        import_litert()

    def describe(self, outline: Outline, config: LiteRtConfig) -> m.Target:
        """Signatures of one file, fixed throughout, with fp32 inputs and outputs."""
        from edgediff.targets.layout import pack

        batch = outline.rows if config.batch is None else config.batch
        graphs = tuple(
            _placed(graph, graph.name, batch, "unet") for graph in pack(outline.parts, outline.divided, outline.layout)
        )
        dtype = "fp32" if config.quantize_nbits is None else "int8"
        return m.LiteRtTarget({"unet": outline.sizes.each(outline.unet(graphs, dtype, batch))})

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: VerifyConfig, config: LiteRtConfig, sizes: Sizes
    ) -> m.Component | None:
        """A file of its own with a signature for each size, of one row, in fp32."""
        placed = _placed(graph, graph.name, 1, graph.name)
        return sizes.each(m.Component(stage, "fp32", 1, verify.floors("fp32"), (placed,)))

    def write(self, job: Job) -> m.Target:
        """Writes the UNet's file."""
        from edgediff.targets.litert.write_litert import write_litert

        path = write_litert(job.folder, job.target.unet, job.modules, job.say)
        if job.config.quantize_nbits is not None:
            from edgediff.targets.litert.quantize_litert import quantize_litert

            quantize_litert(path, job)
        _finish(path, "unet", job.weights)
        return job.target

    def write_component(self, job: ComponentJob) -> m.Component:
        """Writes the component's file."""
        from edgediff.targets.litert.write_litert import write_litert

        path = write_litert(job.folder, job.component, {job.name: job.part}, job.say)
        _finish(path, job.name, job.weights)
        return job.component

    def operations(self, bundle: Bundle, graph: m.Graph) -> list[Op]:
        """Those of a signature."""
        from edgediff.targets.litert.litert_operations import read_signature

        return read_signature(bundle.file(str(graph.file)), str(graph.function))


def _finish(path: Path, component: str, weights: "StoredWeights | None") -> None:
    """Stores weights in their formats, and leaves what is not needed of names."""
    from edgediff.targets.litert.dequantized_weights import store_weights_in_tflite
    from edgediff.targets.litert.tflite_file import shorten_names

    if weights is not None:
        weights.check_found(component, store_weights_in_tflite(path, weights), ".tflite file")
    shorten_names(path)


def _placed(graph: m.Graph, signature: str, rows: int, component: str) -> m.Graph:
    """A graph's entry as a signature of a component's file, where it has one: of fixed rows, ids in int32."""
    inputs, outputs = (
        tuple(
            msgspec.structs.replace(tensor, dtype="int32") if tensor.dtype == "int64" else tensor
            for tensor in fixed(side, rows)
        )
        for side in (graph.inputs, graph.outputs)
    )
    place = (None, None) if graph.file is None else (f"{FOLDER}/{component}.tflite", signature)
    return msgspec.structs.replace(graph, file=place[0], function=place[1], inputs=inputs, outputs=outputs)


TARGET = LiteRtTarget()
