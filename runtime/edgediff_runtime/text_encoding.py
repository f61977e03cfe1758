"""The ``prompt`` stage: texts become the UNet's conditioning, each distinct text once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediff_runtime.components import Components
from edgediff_runtime.errors import BundleError, NotFiniteError, RequestError, one_line
from edgediff_runtime.manifest import Encoder, Graph, Prompt
from edgediff_runtime.prompt import Chunk, emphasize, empty_chunk, tokenized
from edgediff_runtime.sessions import Array, Session


@dataclass(frozen=True)
class Encoded:
    """One row for each text.

    Attributes:
        hidden: float32 [N, S, D], ``encoder_hidden_states``.
        pooled: float32 [N, P], ``text_embeds``; None where no encoder gives it.
    """

    hidden: Array
    pooled: Array | None


class Tokenizer:
    """CLIP's tokenizer, read from a ``tokenizer.json`` by the Rust library that transformers uses too."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes the library's own object."""
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Reads a file; a RequestError where the library is not installed, a BundleError where it is no tokenizer."""
        try:
            import tokenizers
        except ImportError as e:
            raise RequestError("prompt: the package tokenizers is not installed; pip install 'edgediff[text]'") from e
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as e:  # its errors share no base class
            raise BundleError(f"{path.name}: it cannot be read as a tokenizer ({one_line(e)}); export again") from e

    def __call__(self, text: str) -> list[int]:
        """Token ids, without the marks of beginning and end."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class TextStage:
    """The text encoders of a pipeline, which run one after the other."""

    def __init__(self, prompt: Prompt, tokenizers: Sequence[Tokenizer], components: Components) -> None:
        """Takes a tokenizer for each of the encoders of `prompt`."""
        self.prompt = prompt
        self._tokenizers = tokenizers
        self._components = components

    def __call__(self, texts: Sequence[tuple[str, ...]], clip_skip: int, emphasis: bool, any_length: bool) -> Encoded:
        """Encodes texts, all padded to the same number of chunks.

        Args:
            texts: For each row a text for each encoder.
            any_length: Whether the UNet takes more than one chunk.

        Raises:
            RequestError: A text cannot be encoded or is too long, or `clip_skip` leaves no layer.
        """
        columns = []
        for i, encoder in enumerate(self.prompt.encoders):
            whole = isinstance(clip_skip, int) and not isinstance(clip_skip, bool)
            if not whole or not 0 <= clip_skip < len(encoder.hidden):
                raise RequestError(
                    f"clip_skip is {clip_skip!r}; expected a whole number from 0 to {len(encoder.hidden) - 1}"
                )
            columns.append([tokenized(row[i], self._tokenizers[i], encoder, emphasis) for row in texts])
        length = max(len(chunks) for column in columns for chunks in column)
        if length > 1 and not any_length:
            most = min(encoder.max_length for encoder in self.prompt.encoders) - 2
            raise RequestError(
                f"prompt: it is longer than {most} tokens, the most that the graphs of this target take; shorten it, "
                "or use the ONNX target"
            )
        hidden, pooled = [], None
        for encoder, column in zip(self.prompt.encoders, columns, strict=True):
            padded = [[*chunks, *[empty_chunk(encoder)] * (length - len(chunks))] for chunks in column]
            with self._components.use(encoder.component) as session:
                states, own = _encode(session, encoder, padded, clip_skip)
            hidden.append(states)
            pooled = own if own is not None else pooled
        return Encoded(np.concatenate(hidden, axis=-1), pooled)


def _encode(session: Session, encoder: Encoder, texts: list[list[Chunk]], clip_skip: int) -> tuple[Array, Array | None]:
    """States of every text [N, S, D], and the pooled ones of each text's first chunk [N, P]."""
    (graph,) = session.graphs
    name = encoder.hidden[clip_skip]
    made: dict[tuple[int, ...], dict[str, Array]] = {}
    rows, pooled = [], []
    for chunks in texts:
        states = []
        for chunk in chunks:
            if chunk.ids not in made:
                made[chunk.ids] = run_one(session, graph, {"input_ids": np.array([chunk.ids], dtype=np.int64)})
            states.append(emphasize(made[chunk.ids][name][0], np.array(chunk.weights)))
        rows.append(np.concatenate(states))
        if encoder.pooled is not None:
            pooled.append(made[chunks[0].ids][encoder.pooled][0])
    return np.stack(rows), np.stack(pooled) if pooled else None


def run_one(session: Session, graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    """Runs one row through a graph of a component outside of the loop: float32 outputs by name, of one row.

    A graph of a fixed batch is given the row as often as it takes.

    Raises:
        NotFiniteError: An output holds NaN or infinity.
    """
    tensors: dict[str, Any] = {}
    for tensor in graph.inputs:
        row = inputs[tensor.name].astype(tensor.dtype)
        rows = row if session.batch is None else np.repeat(row, session.batch, axis=0)
        tensors[tensor.name] = session.put(np.ascontiguousarray(rows))
    session.run(graph, tensors)
    made = {t.name: np.array(session.get(tensors[t.name])[:1], dtype=np.float32) for t in graph.outputs}
    for name, value in made.items():
        if not np.isfinite(value).all():
            raise NotFiniteError(f"{graph.name}: its {name} holds NaN or infinity; export it in fp32")
    return made
