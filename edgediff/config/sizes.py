"""Sizes of pictures as recipes and the command line spell them: ``512x768``, or ``any``."""

from collections.abc import Iterable
from dataclasses import dataclass

from edgediff.errors import ConfigError
from edgediff_runtime.image import size_in

ANY = "any"
MAX_SIDE = 99_999


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
        if text == ANY:
            continue
        found = size_in(text)
        if found is None or max(found) > MAX_SIDE:
            raise ConfigError(f"'sizes' has {text!r}; expected WIDTHxHEIGHT in pixels, such as 512x768, or {ANY}")
        width, height = found
        named.append((height, width))
    if len(set(texts)) != len(texts):
        raise ConfigError(f"'sizes' has a duplicate: {', '.join(texts)}")
    return PictureSizes(tuple(named), ANY in texts)
