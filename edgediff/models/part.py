"""A part of a divided UNet: a module whose inputs and outputs have names.

Graph exporters take positional tensors, wiring takes names. A part has both, so that one list of names serves torch,
the exporter, the manifest and every runtime.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from edgediff.models.lora_inputs import Factors, given


class Part(nn.Module, ABC):
    """A module with named inputs and outputs: one of the four parts, or a chain of them.

    Attributes:
        inputs: Names of the tensors that `forward` takes, in order.
        outputs: Names of the tensors that it returns, in order.
        factors: The low-rank factors that its layers take from among the inputs; of a chain, its parts have them.
    """

    factors: tuple[Factors, ...] = ()

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the part on positional tensors, in the order of `inputs`."""
        named = dict(zip(self.inputs, tensors, strict=True))
        with given(self.factors, named):
            outputs = self.compute(named)
        return tuple(outputs[name] for name in self.outputs)

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the part on tensors among which are its inputs; its outputs by name."""
        return dict(zip(self.outputs, self(*(tensors[name] for name in self.inputs)), strict=True))

    @abstractmethod
    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the part on named tensors."""


class Chain(Part):
    """Parts that run one after the other as one: a whole full or cached step."""

    def __init__(self, parts: Iterable[Part], outputs: tuple[str, ...]) -> None:
        """Joins parts, shared and not copied, in the order in which they run; `outputs` are the whole's."""
        parts = list(parts)
        made: set[str] = set()
        needed: dict[str, None] = {}
        for part in parts:
            needed |= dict.fromkeys(name for name in part.inputs if name not in made)
            made |= set(part.outputs)
        super().__init__(tuple(needed), outputs)
        self.links = nn.ModuleList(parts)

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the parts; each adds its outputs to the tensors."""
        for part in self.links:
            assert isinstance(part, Part)
            tensors = {**tensors, **part.run(tensors)}
        return tensors
