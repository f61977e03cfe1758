"""A target as an exercise: torch.export's own files. All of a fifth target is this folder and its name in the table."""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from edgediff.targets.base import Backend, Job, Layout, Outline, Target, batch_check, fixed
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m


class ToyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the programs are written."""

    batch: int | None = None
    layout: Layout | None = None


@m.register
class ToyEntry(m.Target, frozen=True, tag="toy"):
    """What the manifest says of these programs."""

    flavour: str = "plain"


class ToyTarget(Target):
    """A .pt2 file for each graph."""

    name, title, files = "toy", "Toy", "toy programs"
    config = ToyConfig
    packages: ClassVar[Mapping[str, str]] = {"torch": "2.13.0"}
    backends = (Backend("toy-torch", ("toy",), ("torch",), "pip install torch", is_own=True),)

    def check(self, config: ToyConfig, layout: Layout) -> None:
        """Checks the batch."""
        batch_check(self, config.batch)

    def require(self) -> None:
        """Needs torch, which the toolchain has."""

    def describe(self, outline: Outline, config: ToyConfig) -> m.Target:
        """Programs of a fixed batch."""
        from edgediff.targets.layout import pack

        batch = config.batch or outline.rows
        graphs = tuple(
            msgspec.structs.replace(
                graph,
                file=graph.file and f"toy/{graph.name}.pt2",
                inputs=fixed(graph.inputs, batch),
                outputs=fixed(graph.outputs, batch),
            )
            for graph in pack(outline.parts, outline.divided, outline.layout)
        )
        return ToyEntry({"unet": outline.unet(graphs, "fp32", batch)}, flavour="sour")

    def write(self, job: Job) -> m.Target:
        """Writes every graph that has a file."""
        import torch

        from edgediff.bundle.feed import groups

        examples = job.examples()
        (job.folder / "toy").mkdir()
        for graph in job.target.unet.graphs:
            if graph.file is not None:
                job.say(f"writing {graph.name} for Toy")
                first = next(groups(examples[graph.name], job.target.unet.batch))
                part = job.modules[graph.name]
                program = torch.export.export(part, tuple(torch.from_numpy(first[name]) for name in part.inputs))
                torch.export.save(program, job.folder / graph.file)
        return job.target

    def open_session(self, bundle: Bundle, backend: str, threads: int | None, component: str = "unet") -> Any:
        """Opens the programs."""
        from edgediff.targets.toy.toy_session import ToySession

        return ToySession(bundle)


TARGET = ToyTarget()
