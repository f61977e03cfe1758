"""ExecuTorch: one program with a method for each graph, computed by XNNPACK."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import msgspec

from edgediff.config.floors import VerifyConfig
from edgediff.extras import needing
from edgediff.targets.base import Backend, ComponentJob, Job, Layout, Outline, Sizes, Target, batch_check, fixed
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m

if TYPE_CHECKING:
    from edgediff_runtime.sessions import Session

PROGRAM = "executorch/unet.pte"


class ExecuTorchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the ExecuTorch program is written: one file, a method for each graph, weights once, in fp32, for XNNPACK.

    Attributes:
        batch: Rows of each graph, which is fixed throughout; None takes 2 where the operating point is guided (the
            unconditional and the conditional row of an image), 1 where it is not.
    """

    batch: int | None = None
    layout: Layout | None = None


class ExecuTorchTarget(Target):
    """A .pte program, run by ExecuTorch's own runtime through its Python bindings."""

    name, title, files = "executorch", "ExecuTorch", "ExecuTorch programs"
    config = ExecuTorchConfig
    extra = "executorch"
    packages: ClassVar[Mapping[str, str]] = {"executorch": "1.5.1"}
    backends = (
        Backend(
            "executorch", ("executorch",), ("torch", "executorch"), 'pip install "edgediff[executorch]"', is_own=True
        ),
    )
    tools_to_run = ("executorch",)

    def check(self, config: ExecuTorchConfig, layout: Layout) -> None:
        """Checks the batch."""
        batch_check(self, config.batch)

    def require(self) -> None:
        """Imports ExecuTorch's exporter."""
        from edgediff.targets.executorch.import_executorch import import_executorch

        import_executorch("executorch.exir", "exporting to ExecuTorch")

    def describe(self, outline: Outline, config: ExecuTorchConfig) -> m.Target:
        """Methods of one program, fixed throughout, in fp32."""
        from edgediff.targets.layout import pack

        batch = outline.rows if config.batch is None else config.batch
        graphs = tuple(
            msgspec.structs.replace(
                graph,
                file=None if graph.file is None else PROGRAM,
                function=None if graph.file is None else graph.name,
                inputs=fixed(graph.inputs, batch),
                outputs=fixed(graph.outputs, batch),
            )
            for graph in pack(outline.parts, outline.divided, outline.layout)
        )
        return m.ExecuTorchTarget({"unet": outline.sizes.each(outline.unet(graphs, "fp32", batch))})

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: VerifyConfig, config: ExecuTorchConfig, sizes: Sizes
    ) -> m.Component | None:
        """A program of its own with a method for each size, of one row, in fp32."""
        graph = msgspec.structs.replace(
            graph,
            file=f"executorch/{graph.name}.pte",
            function="forward",
            inputs=fixed(graph.inputs, 1),
            outputs=fixed(graph.outputs, 1),
        )
        return sizes.each(m.Component(stage, "fp32", 1, verify.floors("fp32"), (graph,)))

    def write(self, job: Job) -> m.Target:
        """Writes the program."""
        from edgediff.targets.executorch.write_executorch import write_executorch

        write_executorch(job.folder, job.target.unet, job.modules, job.say)
        return job.target

    def write_component(self, job: ComponentJob) -> m.Component:
        """Writes the component's program."""
        from edgediff.targets.executorch.write_executorch import write_executorch

        write_executorch(job.folder, job.component, {job.name: job.part}, job.say)
        return job.component

    def open_session(self, bundle: Bundle, backend: str, threads: int | None, component: str = "unet") -> "Session":
        """Opens the program."""
        with needing(self.extra, "running an ExecuTorch program"):
            from edgediff.targets.executorch.executorch_session import ExecuTorchSession

        return ExecuTorchSession(bundle, threads, component)


TARGET = ExecuTorchTarget()
