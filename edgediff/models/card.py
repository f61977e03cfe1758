"""A model's licence and description, as its directory states them; what is not stated is not guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from edgediff_runtime.clock import MAX_STEPS
from edgediff_runtime.manifest_json import MAX_GUIDANCE

LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
KNOWN_TEXTS = {
    "Apache License": "Apache-2.0",
    "MIT License": "MIT",
    "CreativeML Open RAIL-M": "CreativeML-OpenRAIL-M",
}


@dataclass(frozen=True)
class Card:
    """The licence's name or ``unknown``, its file's text if there is one, and the model card's text or ''.

    Attributes:
        steps, guidance_scale: What the card says the model is sampled with, as Hugging Face's cards say it; or None.
    """

    license: str
    license_text: str | None
    text: str
    steps: int | None = None
    guidance_scale: float | None = None


def read_card(path: Path) -> Card:
    """Reads README.md (``license`` and ``inference: parameters`` of its front matter) and the licence file."""
    readme = path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    files = [path / name for name in LICENSE_FILES if (path / name).is_file()]
    license_text = files[0].read_text(encoding="utf-8", errors="replace") if files else None
    front = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    stated = re.search(r"^license:[ \t]*[\"']?(\w[^\s\"']*)", front.group(1) if front else "", re.MULTILINE)
    recognised = [name for words, name in KNOWN_TEXTS.items() if words in (license_text or "")[:400]]
    name = stated.group(1) if stated else next(iter(recognised), "unknown")
    return Card(name, license_text, text, *_parameters(front.group(1) if front else ""))


def _parameters(front: str) -> tuple[int | None, float | None]:
    """Steps and guidance of ``inference: parameters``, where they are numbers that a model can be sampled with."""
    try:
        said = yaml.safe_load(front)
        given = said["inference"]["parameters"]
        steps, guidance = given.get("num_inference_steps"), given.get("guidance_scale")
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return None, None  # a card is written for people; most say none
    is_steps = type(steps) is int and 1 <= steps <= MAX_STEPS
    is_guidance = type(guidance) in (int, float) and 0 < guidance <= MAX_GUIDANCE
    return steps if is_steps else None, float(guidance) if is_guidance else None
