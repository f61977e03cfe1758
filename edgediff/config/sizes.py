"""Sizes of pictures as recipes and the command line spell them: ``512x768``, or ``any``."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from edgediff.errors import ConfigError

ANY = "any"
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


@dataclass(frozen=True)
class PictureSizes:
    """What sizes a bundle is to take.

    Attributes:
        named: Height and width of each, in pixels; the first is the usual one.
        takes_any: Whether any other will do as well.
    """

    named: tuple[tuple[int, int], ...]
    takes_any: bool


def read_sizes(texts: Iterable[str]) -> PictureSizes:
    """Reads sizes; a ConfigError where one is none, or is named twice.

    >>> read_sizes(["512x768", "any"])
    PictureSizes(named=((768, 512),), takes_any=True)
    """
    texts = list(texts)
    named = []
    for text in texts:
        found = _SIZE.fullmatch(text)
        if found is None and text != ANY:
            raise ConfigError(f"'sizes' has {text!r}; expected WIDTHxHEIGHT in pixels, such as 512x768, or {ANY}")
        if found is not None:
            named.append((int(found[2]), int(found[1])))
    if len(set(texts)) != len(texts):
        raise ConfigError(f"'sizes' has a duplicate: {', '.join(texts)}")
    return PictureSizes(tuple(named), ANY in texts)
