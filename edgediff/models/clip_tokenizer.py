"""CLIP's tokenizer of a text encoder: read from a pipeline's folder, written where other tools look for it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgediff.errors import ModelError
from edgediff.extras import needing
from edgediff.models.model_files import BAD_SETTINGS, read_json
from edgediff.models.single_file import FOLDER as SINGLE_FILES
from edgediff.models.single_file import clip_vocabulary
from edgediff.outputs import write_json
from edgediff_runtime.errors import one_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def tokenizer_folder(home: Path, encoder: str) -> Path:
    """Where the tokenizer of a text encoder lies in a pipeline's folder."""
    return home / encoder.replace("text_encoder", "tokenizer")


def load_tokenizer(folder: Path, tokens: Sequence[str] = ()) -> Any:
    """Transformers' CLIP tokenizer of a folder, from tokenizer.json or from vocab.json and merges.txt.

    Those for single files have their settings alone: the vocabulary is CLIP's.

    Args:
        tokens: What is added to it, in this order.

    Raises:
        ModelError: The folder is missing or holds no tokenizer.
    """
    tokenizer = _load(folder)
    add_tokens(tokenizer, tokens)
    return tokenizer


def _load(folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing; expected a tokenizer beside its text encoder")
    with needing("export", "a tokenizer"):
        from transformers import CLIPTokenizer
    if SINGLE_FILES in folder.parents:
        vocabulary, merges = clip_vocabulary()
        settings = read_json(folder / "tokenizer_config.json")
        return CLIPTokenizer(vocab=vocabulary, merges=merges, **settings)
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{folder} holds no vocabulary; expected tokenizer.json, or vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, *BAD_SETTINGS) as e:
        raise ModelError(f"{folder} holds no CLIP tokenizer: {one_line(e)[:300]}") from e


def normalized(tokenizer: Any, text: str) -> str:
    """A text as its tokenizer looks at it, in small letters."""
    written: str = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    return written


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds entries to a tokenizer, with ids that follow its last one.

    They stand there in small letters, as prompts are looked at: a prompt may write them in any case, and diffusers,
    which looks for the name in the prompt as it is written, finds those in small letters.
    """
    tokenizer.add_tokens([normalized(tokenizer, token) for token in tokens])


def entry_of(tokenizer: Any, token: str) -> int | None:
    """The id of a text that is one entry of a tokenizer, as a word of its own or as it stands; None where it is not."""
    known: int | None = tokenizer.get_vocab().get(normalized(tokenizer, token))
    found = tokenizer(token, add_special_tokens=False)["input_ids"]
    return found[0] if len(found) == 1 else known


def write_tokenizer(source: Path, folder: Path, tokens: Sequence[str] = ()) -> None:
    """Writes the tokenizer of a folder, and tokens that are added to it, into another one: see `save_tokenizer`."""
    save_tokenizer(load_tokenizer(source, tokens), folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer in both forms that readers look for: tokenizer.json, and vocab.json with merges.txt."""
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    library = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = dict(sorted(library["vocab"].items(), key=lambda entry: int(entry[1])))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in library["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    write_json(folder / "special_tokens_map.json", tokens)
    for file in folder.iterdir():
        if file.name not in TOKENIZER_FILES:
            file.unlink()


def place_tokenizer(source: Path, folder: Path, places: Mapping[str, str], tokens: Sequence[str] = ()) -> None:
    """Writes some of a tokenizer's files, by their names, to places in a folder; what is there already stays.

    `tokens` are added to it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as scratch:
        written = Path(scratch) / "tokenizer"
        write_tokenizer(source, written, tokens)
        for name, place in places.items():
            if not (folder / place).exists():
                (folder / place).parent.mkdir(exist_ok=True)
                (written / name).rename(folder / place)
