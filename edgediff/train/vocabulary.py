"""A vocabulary of byte pairs learnt from captions, in CLIP's layout: a tokenizer of transformers' `CLIPTokenizer`.

The library's own trainer numbers what it finds in an order that differs from run to run; this one does not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

Pair = tuple[str, str]


def learn_tokenizer(captions: Iterable[str], size: int, length: int) -> Any:
    """A tokenizer of up to `size` entries, learnt from captions, that pads and cuts to `length` tokens.

    Fewer entries are learnt where no pair is left that occurs twice.
    """
    empty = _tokenizer([], length)
    normal, words = empty.backend_tokenizer.normalizer, empty.backend_tokenizer.pre_tokenizer
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word for word, _ in words.pre_tokenize_str(normal.normalize_str(caption)))
    return _tokenizer(learn_merges(counts, size - len(empty)), length)


def _tokenizer(merges: list[Pair], length: int) -> Any:
    characters = list(bytes_to_unicode().values())
    entries = [*characters, *(f"{each}{_WORD_END}" for each in characters), *("".join(pair) for pair in merges)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys([*entries, BEGIN, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def learn_merges(counts: Mapping[str, int], most: int) -> list[Pair]:
    """The pairs to join, the most frequent first, of words with their counts; of equal ones the last by alphabet.

    >>> learn_merges({"red": 3, "read": 2}, 2)
    [('r', 'e'), ('re', 'd</w>')]
    """
    pieces = {word: [*word[:-1], f"{word[-1]}{_WORD_END}"] for word in counts}
    total: Counter[Pair] = Counter()
    words_with: dict[Pair, set[str]] = {}
    for word, parts in pieces.items():
        for pair in pairwise(parts):
            total[pair] += counts[word]
            words_with.setdefault(pair, set()).add(word)
    merges: list[Pair] = []
    while len(merges) < most and total:
        most_often = max(total.values())
        if most_often < 2:
            break
        best = max(pair for pair, count in total.items() if count == most_often)
        merges.append(best)
        for word in words_with[best].copy():
            old = pieces[word]
            new = pieces[word] = _joined(old, best)
            for pair in pairwise(old):
                total[pair] -= counts[word]
                words_with[pair].discard(word)
            for pair in pairwise(new):
                total[pair] += counts[word]
                words_with.setdefault(pair, set()).add(word)
        del total[best]
    return merges


def _joined(parts: list[str], pair: Pair) -> list[str]:
    """A word's parts with a pair joined wherever it occurs, from the left."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
