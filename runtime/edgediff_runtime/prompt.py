"""From a prompt to token ids: emphasis, chunks, padding. Texts in, integers and weights out; no encoder runs here.

Emphasis is written as in AUTOMATIC1111's web UI and what copied it: ``(word)`` multiplies a word's weight by 1.1,
``[word]`` divides it, ``(word:1.3)`` sets the factor, a backslash keeps a bracket. A prompt longer than the text
encoder takes is divided into chunks of as many tokens as it does take.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import Encoder

UP, MAX_WEIGHT = 1.1, 10.0
# A chunk more costs a step's cross-attention so many keys; nobody writes a longer prompt on purpose.
MAX_CHUNKS = 64

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

    >>> parse("a (red:1.5) apple")
    [Piece(text='a ', weight=1.0), Piece(text='red', weight=1.5), Piece(text=' apple', weight=1.0)]
    """
    # Characters with their weights, brackets resolved when they close.
    texts: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []
    i = 0
    while i < len(prompt):
        char = prompt[i]
        if char == "\\" and prompt[i + 1 : i + 2] in ("(", ")", "[", "]", "\\"):
            texts.append(prompt[i + 1])
            weights.append(1.0)
            i += 2
            continue
        if char in "([":
            opened.append((char, len(texts)))
        if char in ")]" and opened and opened[-1][0] == {")": "(", "]": "["}[char]:
            _, start = opened.pop()
            end, factor = len(texts), UP if char == ")" else 1 / UP
            if char == ")":
                written = _factor("".join(texts[start + 1 :]))
                if written is not None:
                    factor, end = written[0], end - written[1]
            texts[start:] = texts[start + 1 : end]
            weights[start:] = [weight * factor for weight in weights[start + 1 : end]]
            i += 1
            continue
        texts.append(char)
        weights.append(1.0)
        i += 1
    pieces: list[Piece] = []
    for text, weight in zip(texts, weights, strict=True):
        if pieces and pieces[-1].weight == weight:
            pieces[-1] = Piece(pieces[-1].text + text, weight)
        else:
            pieces.append(Piece(text, weight))
    for piece in pieces:
        if not 0 <= piece.weight <= MAX_WEIGHT:
            raise RequestError(
                f"prompt: the weight of {piece.text[:40]!r} is {piece.weight:g}; expected 0 to {MAX_WEIGHT:g}"
            )
    return pieces or [Piece("")]


def _factor(text: str) -> tuple[float, int] | None:
    """The number after the last colon in brackets, and the length of both."""
    before, colon, written = text.rpartition(":")
    if not colon or not before:
        return None
    try:
        factor = float(written)
    except ValueError:
        return None
    return (factor, len(written) + 1) if math.isfinite(factor) else None


def tokenized(prompt: str, tokenize: Tokenize, encoder: Encoder, emphasis: bool = True) -> list[Chunk]:
    """The chunks of a prompt, one at least.

    Args:
        tokenize: Token ids of a text, without the marks of beginning and end.
        emphasis: Read brackets as weights; else they are characters like others.
    """
    ids: list[int] = []
    weights: list[float] = []
    for piece in parse(prompt) if emphasis else [Piece(prompt)]:
        found = tokenize(piece.text)
        ids += found
        weights += [piece.weight] * len(found)
    size = encoder.max_length - 2
    starts = range(0, max(len(ids), 1), size)
    if len(starts) > MAX_CHUNKS:
        raise RequestError(f"prompt: {len(ids)} tokens; expected {MAX_CHUNKS * size} at most")
    return [_chunk(ids[i : i + size], weights[i : i + size], encoder) for i in starts]


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

    Args:
        hidden: float32 [S, D].
        weights: float32 [S].
    """
    if (weights == 1).all():
        return hidden
    weighted = hidden * weights[:, None].astype(np.float32)
    mean = weighted.mean()
    return weighted * np.float32(hidden.mean() / mean) if mean else weighted
