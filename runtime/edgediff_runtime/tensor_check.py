"""What a backend says of a graph's tensors against the manifest."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import IMAGES, Graph

# A size that a backend does not tell, unlike one that has another name.
UNTOLD = "?"


@dataclass(frozen=True)
class Found:
    """A tensor as a backend describes it: a shape of None is of unknown rank; a size that is no number is symbolic."""

    names: frozenset[str]
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def fits(self, shape: tuple[int | str, ...]) -> bool:
        """Whether the manifest's shape may be this one."""
        if self.shape is None:
            return True
        # `IMAGES` must be on both sides or on neither: only such a graph can share rows.
        return len(self.shape) == len(shape) and all(
            there in (size, UNTOLD) or (not isinstance(there, int) and IMAGES not in (size, there))
            for size, there in zip(shape, self.shape, strict=True)
        )


def check_tensors(graph: Graph, inputs: Sequence[Found], outputs: Sequence[Found]) -> None:
    """Checks the inputs and outputs that a backend found in a graph, in order; a BundleError where they differ."""
    for kind, said, found in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        if len(said) != len(found) or any(t.name not in f.names for t, f in zip(said, found, strict=True)):
            raise BundleError(
                f"{graph.file} has the {kind} {', '.join('/'.join(sorted(each.names)) for each in found)}; "
                f"the manifest says {', '.join(tensor.name for tensor in said)}; export again"
            )
        for tensor, other in zip(said, found, strict=True):
            if other.dtype != tensor.dtype or not other.fits(tensor.shape):
                shape = "of any shape" if other.shape is None else list(other.shape)
                raise BundleError(
                    f"{graph.file} has {tensor.name} as {other.dtype} {shape}; "
                    f"the manifest says {tensor.dtype} {list(tensor.shape)}; export again"
                )
