"""From a prompt to token ids: emphasis, chunks, padding. Texts in, integers and weights out; no encoder runs here.

Emphasis is written as in AUTOMATIC1111's web UI: ``(word)`` multiplies a word's weight by 1.1, ``[word]`` divides it,
``(word:1.3)`` sets the factor, a backslash keeps a bracket. A prompt longer than the text encoder takes is divided into
chunks of as many tokens as it does take.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import Encoder

UP, MAX_WEIGHT = 1.1, 10.0
# Each chunk adds keys to every cross-attention; nobody writes a longer prompt on purpose.
MAX_CHUNKS, MAX_CHARACTERS = 64, 100_000

_MARK = re.compile(r"\\[()\[\]\\]|[()\[\]]")
_OPENING = {")": "(", "]": "["}
# The factor of a bracket, up to the place where the bracket closes; no longer than MAX_FACTOR characters.
_FACTOR, MAX_FACTOR = re.compile(r":\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\Z"), 40

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt with one weight; 1 leaves it as it is."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """Token ids as a text encoder takes them, and each token's weight: both of the encoder's length."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def parse(prompt: str) -> list[Piece]:
    """Reads the emphasis out of a prompt; brackets that do not match stand for themselves.

    Raises:
        RequestError: A weight is not 0 to `MAX_WEIGHT`.

    >>> parse("a (red:1.5) apple")
    [Piece(text='a ', weight=1.0), Piece(text='red', weight=1.5), Piece(text=' apple', weight=1.0)]
    """
    pieces: list[Piece] = []
    weights, at = [1.0], 0

    def add(text: str) -> None:
        if pieces and pieces[-1].weight == weights[-1]:
            text = pieces.pop().text + text
        if text:
            pieces.append(Piece(text, weights[-1]))

    for start, stop, what in _marks(prompt):
        add(prompt[at:start])
        at = stop
        if isinstance(what, str):
            add(what)
        elif what is None:
            weights.pop()
        else:
            weights.append(weights[-1] * what)
    add(prompt[at:])
    for piece in pieces:
        if not 0 <= piece.weight <= MAX_WEIGHT:
            raise RequestError(
                f"prompt: the weight of {piece.text[:40]!r} is {piece.weight:g}; expected 0 to {MAX_WEIGHT:g}"
            )
    return pieces or [Piece("")]


def _marks(prompt: str) -> list[tuple[int, int, str | float | None]]:
    """Start and end of every mark, and what it means: a text, the factor of a bracket that opens, None where it closes.

    Until a bracket has closed it is a text.
    """
    marks: list[tuple[int, int, str | float | None]] = []
    opened: list[int] = []
    for found in _MARK.finditer(prompt):
        start, stop, char = found.start(), found.end(), found[0]
        if char in ("(", "["):
            opened.append(len(marks))
            marks.append((start, stop, char))
        elif char not in _OPENING:
            marks.append((start, stop, char[1]))
        elif opened and marks[opened[-1]][2] == _OPENING[char]:
            place = opened.pop()
            first = marks[place][1] + 1  # a factor follows a text
            factor = _FACTOR.search(prompt, max(first, start - MAX_FACTOR), start) if char == ")" else None
            usual = UP if char == ")" else 1 / UP
            marks[place] = (*marks[place][:2], usual if factor is None else float(factor[1]))
            marks.append((start if factor is None else factor.start(), stop, None))
    return marks


def tokenized(prompt: str, tokenize: Tokenize, encoder: Encoder, emphasis: bool = True) -> list[Chunk]:
    """The chunks of a prompt, one at least.

    Args:
        tokenize: Token ids of a text, without the marks of beginning and end.
        emphasis: Read brackets as weights; else they are characters like others.

    Raises:
        RequestError: The prompt is too long, holds a lone surrogate, or a weight is not 0 to `MAX_WEIGHT`.
    """
    _check(prompt)
    ids: list[int] = []
    weights: list[float] = []
    expansions = {run[0]: run for run in encoder.expansions}
    for piece in parse(prompt) if emphasis else [Piece(prompt)]:
        found = [each for id in tokenize(piece.text) for each in expansions.get(id, (id,))]
        ids += found
        weights += [piece.weight] * len(found)
    size = encoder.max_length - 2
    starts = range(0, max(len(ids), 1), size)
    if len(starts) > MAX_CHUNKS:
        raise RequestError(f"prompt: {len(ids)} tokens; expected {MAX_CHUNKS * size} at most; shorten the prompt")
    return [_chunk(ids[i : i + size], weights[i : i + size], encoder) for i in starts]


def _check(prompt: str) -> None:
    if len(prompt) > MAX_CHARACTERS:
        raise RequestError(f"prompt: {len(prompt)} characters; expected {MAX_CHARACTERS} at most")
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"prompt: character {e.start} is U+{ord(prompt[e.start]):04X}, a lone surrogate; expected valid Unicode"
        ) from e


def empty_chunk(encoder: Encoder) -> Chunk:
    """A chunk without words, which lengthens a prompt to another's length."""
    return _chunk([], [], encoder)


def _chunk(ids: list[int], weights: list[float], encoder: Encoder) -> Chunk:
    rest = encoder.max_length - 2 - len(ids)
    return Chunk(
        (encoder.bos, *ids, encoder.eos, *[encoder.pad] * rest),
        (1.0, *weights, 1.0, *[1.0] * rest),
    )


def emphasize(hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiplies each token's state by its weight and restores the mean of the whole, as AUTOMATIC1111 does.

    `hidden` is float32 [S, D], `weights` [S].
    """
    if (weights == 1).all():
        return hidden
    weighted = hidden * weights[:, None].astype(np.float32)
    mean = weighted.mean()
    return weighted * np.float32(hidden.mean() / mean) if mean else weighted
