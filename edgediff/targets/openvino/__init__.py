"""OpenVINO's IR, made from the default ONNX graphs."""

import msgspec

from edgediff.extras import import_extra
from edgediff.targets.base import Int8Config, Job, Layout, Outline, Target, int8_check
from edgediff.targets.onnx import TARGET as ONNX
from edgediff.targets.onnx import essential_graphs
from edgediff_runtime import manifest as m


class OpenVinoConfig(Int8Config, frozen=True):
    """How OpenVINO's models (IR) are written: what ONNX's default graphs say, in fp32 or int8.

    Attributes:
        layout: How the graphs are packed; None takes the recipe's. In a ``pair`` each has its own weights on disk: a
            model in IR knows only those of its own file.
    """

    layout: Layout | None = None


class OpenVinoTarget(Target):
    """OpenVINO's models with a symbolic batch."""

    name, title, files = "openvino", "OpenVINO", "OpenVINO's models"
    config = OpenVinoConfig
    extra = "openvino"
    packages = (*ONNX.packages, "openvino")
    backends = ("openvino",)
    tools_to_run = ("openvino",)

    def check(self, config: OpenVinoConfig, layout: Layout) -> None:
        """Checks the int8 settings."""
        int8_check(self, config)

    def require(self) -> None:
        """Imports OpenVINO, and what the ONNX graphs need."""
        ONNX.require()
        import_extra("openvino", "exporting to OpenVINO", self.extra)

    def describe(self, outline: Outline, config: OpenVinoConfig) -> m.Target:
        """Graphs of symbolic batch with fp32 tensors, each with weights of its own."""
        from edgediff.targets.layout import pack

        dtype = "fp32" if config.quantize_nbits is None else "int8"
        graphs = tuple(
            graph
            if graph.file is None
            else msgspec.structs.replace(
                graph, file=f"openvino/{graph.name}.xml", external_data=f"openvino/{graph.name}.bin"
            )
            for graph in pack(outline.parts, outline.divided, outline.layout)
        )
        return m.Target(
            target="openvino",
            layout=outline.layout,
            dtype=dtype,  # type: ignore[arg-type]
            batch=None,
            floors=outline.verify.floors(dtype),
            graphs=graphs,
        )

    def essence(self, entry: m.Target) -> m.Target:
        """Without what the exporter of ONNX graphs decides."""
        return msgspec.structs.replace(entry, graphs=essential_graphs(entry.graphs))

    def write(self, job: Job) -> m.Target:
        """Exports ONNX graphs and writes what OpenVINO reads of them."""
        from edgediff.targets.onnx.calibration import calibrate_for
        from edgediff.targets.openvino.write_openvino import write_openvino

        return write_openvino(
            job.folder, job.target, job.modules, job.examples(), job.config, job.say, calibrate_for(job)
        )


TARGET = OpenVinoTarget()
