"""The operations of an exported graph in the one form that placement rules look at, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A tensor: its dtype as numpy calls it; its sizes, strings where they are symbolic or not known."""

    name: str
    dtype: str = ""
    shape: tuple[int | str, ...] = ("?",)
    constant: bool = False

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape)) or 'scalar'} {self.dtype}".rstrip()


@dataclass(frozen=True)
class Op:
    """An operation; inputs by MIL's name of the parameter or ONNX's position, attributes where they are strings.

    A graph's inputs, outputs and weights stand among them as ``input``, ``output`` and ``weights``.
    """

    type: str
    name: str
    inputs: Mapping[str, Value] = field(default_factory=dict)
    outputs: tuple[Value, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0

    def input(self, name: str) -> Value:
        """The input of that name, or one of which nothing is known."""
        return self.inputs.get(name, Value(name))
