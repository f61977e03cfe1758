"""OpenVINO's IR, made from the default ONNX graphs, or from those in fp16."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from edgediff.extras import import_extra
from edgediff.outputs import write_json
from edgediff.targets.base import (
    PRECISIONS,
    Backend,
    ComponentJob,
    HalfConstants,
    Int8Config,
    Job,
    Layout,
    Outline,
    Precision,
    Say,
    Sizes,
    Target,
    int8_check,
)
from edgediff.targets.onnx import TARGET as ONNX
from edgediff.targets.onnx import essential, in_half
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m

if TYPE_CHECKING:
    from edgediff_runtime.sessions import Session

log = logging.getLogger(__name__)

FOLDER = "openvino/unet"
MODEL = f"{FOLDER}/openvino_model.xml"
WEIGHTS = f"{FOLDER}/openvino_model.bin"
# What it runs, and what installs it: less than the extra, which writes graphs too.
READS = ("openvino", ONNX.name)
INSTALL = "pip install openvino"
SCHEDULER = "scheduler/scheduler_config.json"
# What GenAI 2026.4 knows of those that a bundle may name.
GENAI_SCHEDULERS = (
    "DDIMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "PNDMScheduler",
)  # fmt: skip
# The bundle's own floor is for fp32; bf16 has a lower one.
BF16_DB = 35.0


class OpenVinoConfig(Int8Config, frozen=True):
    """How OpenVINO's models (IR) are written: what ONNX's default graphs say, in fp32 or int8, or its fp16 graphs.

    Attributes:
        dtype: Precision of weights, features and arithmetic. In fp16, for Intel's GPUs and NPUs, what is out of fp16's
            range stays fp32, and a device that computes in fp16 is told so; the CPU computes in fp32.
        layout: How the graphs are packed; None takes the recipe's. All of them have their weights in one file.
        weights: What the weights are stored in, as in ONNX's section.
    """

    dtype: Precision = "fp32"
    layout: Layout | None = None
    weights: str | None = None


class OpenVinoTarget(Target):
    """OpenVINO's models with a symbolic batch."""

    name, title, files = "openvino", "OpenVINO", "OpenVINO's models"
    config = OpenVinoConfig
    extra = "openvino"
    packages: ClassVar[Mapping[str, str]] = {**ONNX.packages, "openvino": "2026.4.0"}
    backends = (
        Backend("openvino", READS, ("openvino",), INSTALL, "run ONNX and OpenVINO bundles in OpenVINO"),
        Backend("openvino-bf16", READS, ("openvino",), INSTALL, verifies=False, floor_db=BF16_DB),
    )
    precisions = PRECISIONS
    tools_to_run = ("openvino",)
    weight_formats = ("fp16", "int8", "int4")
    int4_scales = "whole_blocks"
    takes_any_size = True
    takes_traces = True

    def check(self, config: OpenVinoConfig, layout: Layout) -> None:
        """Checks the int8 settings."""
        int8_check(self, config)

    def require(self) -> None:
        """Imports OpenVINO, and what the ONNX graphs need."""
        ONNX.require()
        import_extra("openvino", "exporting to OpenVINO", self.extra)

    def describe(self, outline: Outline, config: OpenVinoConfig) -> m.Target:
        """Graphs of symbolic batch over one file of weights."""
        from edgediff.targets.layout import pack

        graphs = tuple(
            graph
            if graph.file is None
            else msgspec.structs.replace(
                graph.with_any_text(), file=f"{FOLDER}/{graph.name}.xml", external_data=(WEIGHTS,)
            )
            for graph in outline.sizes.any_size(pack(outline.parts, outline.divided, outline.layout))
        )
        dtype = config.dtype if config.quantize_nbits is None else "int8"
        if dtype == "fp16":
            graphs = tuple(map(in_half, graphs))
        return m.OpenVinoTarget({"unet": outline.unet(graphs, dtype, None)})

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: Any, config: OpenVinoConfig, sizes: Sizes
    ) -> m.Component | None:
        """One model of symbolic batch with fp32 inputs and outputs, named as OpenVINO GenAI looks for it."""
        graph = msgspec.structs.replace(graph, file=f"openvino/{graph.name}/openvino_model.xml")
        return m.Component(stage, config.dtype, None, verify.floors(config.dtype), sizes.any_size([graph]))

    def pipeline_folder(self, entry: Any) -> str:
        """OpenVINO GenAI's."""
        return "openvino"

    def finish_pipeline(self, folder: Path, say: Say) -> None:
        """Writes tokenizers as OpenVINO's models, which GenAI looks for, and says if it lacks the sampler."""
        from edgediff.targets.openvino.write_openvino import write_tokenizers

        lacks = genai_lacks(json.loads((folder / SCHEDULER).read_text("utf-8")))
        if lacks is not None:
            log.warning(
                "%s: OpenVINO GenAI has no %s and will not open it; edgediff's runtimes do. For GenAI, export it with "
                "another --scheduler, such as euler", folder.name, lacks,
            )  # fmt: skip
        write_tokenizers(folder, say)

    def essence(self, entry: Any) -> m.Target:
        """Without what the exporter of ONNX graphs decides."""
        return essential(entry)

    def write(self, job: Job) -> m.Target:
        """Exports ONNX graphs and writes what OpenVINO reads of them."""
        from edgediff.targets.openvino.write_openvino import write_openvino

        graphs, model = write_openvino(job)
        write_json(job.folder / FOLDER / "config.json", job.unet_config)
        return job.target.with_unet(graphs=graphs, model=model)

    def write_component(self, job: ComponentJob) -> m.Component:
        """Writes the model with its configuration beside it."""
        from edgediff.targets.openvino.write_openvino import write_component

        (graph,) = job.component.graphs
        write_json((job.folder / str(graph.file)).parent / "config.json", job.settings)
        return msgspec.structs.replace(job.component, graphs=(write_component(job, graph),))

    def half_constants(self, entry: Any) -> HalfConstants:
        """Those of the ONNX graphs that it reads, but that it multiplies by a divisor's inverse."""
        return dataclasses.replace(ONNX.half_constants(entry), divides=False)

    def unrounded(
        self, bundle: Bundle, backend: str, session: Any, component: str = "unet"
    ) -> "contextlib.AbstractContextManager[Session] | None":
        """The same models on the CPU, which computes in fp32, with fp32 outputs.

        None where weights are codes, which the CPU multiplies by features that it rounds.
        """
        entry = bundle.manifest.target(self.name).component(component)
        if entry.weights.keys() & {"int8", "int4"}:
            return None
        from edgediff.targets.openvino.fp32_outputs import Fp32Outputs

        return contextlib.nullcontext(Fp32Outputs(bundle, component=component))


def genai_lacks(scheduler: Mapping[str, Any]) -> str | None:
    """What OpenVINO GenAI does not have of a scheduler's configuration, or None."""
    kind = scheduler["_class_name"]
    if kind not in GENAI_SCHEDULERS:
        return str(kind)
    return "DDIM that clips samples" if kind == "DDIMScheduler" and scheduler.get("clip_sample", True) else None


TARGET = OpenVinoTarget()
