"""A model's licence and description, as its directory states them; what is not stated is not guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
KNOWN_TEXTS = {
    "Apache License": "Apache-2.0",
    "MIT License": "MIT",
    "CreativeML Open RAIL-M": "CreativeML-OpenRAIL-M",
}


@dataclass(frozen=True)
class Card:
    """The licence's name or ``unknown``, its file's text if there is one, and the model card's text or ''."""

    license: str
    license_text: str | None
    text: str


def read_card(path: Path) -> Card:
    """Reads README.md (``license:`` in its front matter) and the licence file of a model directory."""
    readme = path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    files = [path / name for name in LICENSE_FILES if (path / name).is_file()]
    license_text = files[0].read_text(encoding="utf-8", errors="replace") if files else None
    front = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    stated = re.search(r"^license:[ \t]*[\"']?(\w[^\s\"']*)", front.group(1) if front else "", re.MULTILINE)
    if stated:
        return Card(stated.group(1), license_text, text)
    recognised = [name for words, name in KNOWN_TEXTS.items() if words in (license_text or "")[:400]]
    return Card(recognised[0] if recognised else "unknown", license_text, text)
