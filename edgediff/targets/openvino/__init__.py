"""OpenVINO's IR, made from the default ONNX graphs."""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from edgediff.extras import import_extra
from edgediff.targets.base import Backend, Int8Config, Job, Layout, Outline, Target, int8_check, write_unet_config
from edgediff.targets.onnx import TARGET as ONNX
from edgediff.targets.onnx import essential
from edgediff_runtime import manifest as m

FOLDER = "openvino/unet"
MODEL = f"{FOLDER}/openvino_model.xml"
WEIGHTS = f"{FOLDER}/openvino_model.bin"
# What it runs, and what installs it: less than the extra, which writes graphs too.
READS = ("openvino", ONNX.name)
INSTALL = "pip install openvino"
# The bundle's own floor is for fp32; bf16 has a lower one.
BF16_DB = 35.0


class OpenVinoConfig(Int8Config, frozen=True):
    """How OpenVINO's models (IR) are written: what ONNX's default graphs say, in fp32 or int8.

    Attributes:
        layout: How the graphs are packed; None takes the recipe's. All of them have their weights in one file.
    """

    layout: Layout | None = None


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
    tools_to_run = ("openvino",)
    takes_traces = True

    def check(self, config: OpenVinoConfig, layout: Layout) -> None:
        """Checks the int8 settings."""
        int8_check(self, config)

    def require(self) -> None:
        """Imports OpenVINO, and what the ONNX graphs need."""
        ONNX.require()
        import_extra("openvino", "exporting to OpenVINO", self.extra)

    def describe(self, outline: Outline, config: OpenVinoConfig) -> m.Target:
        """Graphs of symbolic batch with fp32 tensors over one file of weights."""
        from edgediff.targets.layout import pack

        graphs = tuple(
            graph
            if graph.file is None
            else msgspec.structs.replace(graph, file=f"{FOLDER}/{graph.name}.xml", external_data=WEIGHTS)
            for graph in pack(outline.parts, outline.divided, outline.layout)
        )
        dtype = "fp32" if config.quantize_nbits is None else "int8"
        return m.OpenVinoTarget({"unet": outline.unet(graphs, dtype, None)})

    def essence(self, entry: Any) -> m.Target:
        """Without what the exporter of ONNX graphs decides."""
        return essential(entry)

    def write(self, job: Job) -> m.Target:
        """Exports ONNX graphs and writes what OpenVINO reads of them."""
        from edgediff.targets.openvino.write_openvino import write_openvino

        graphs, model = write_openvino(job)
        write_unet_config(job, job.folder / FOLDER)
        return job.target.with_unet(graphs=graphs, model=model)


TARGET = OpenVinoTarget()
