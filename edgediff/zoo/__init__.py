"""Built-in models: diffusers directories with a card, some with weights, some only a geometry to count."""

import json
import re
from pathlib import Path

from edgediff.errors import ModelError, UnsupportedError

FOLDER = Path(__file__).parent
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ZOO = tuple(sorted(path.name for path in FOLDER.iterdir() if (path / "unet").is_dir()))


def built_in(name: str) -> Path | None:
    """The directory of a built-in model, or None where there is none of that name."""
    return FOLDER / name if name in ZOO else None


def check_source(source: str) -> None:
    """Refuses a model that is neither a path that exists nor a built-in name, before torch is imported.

    Raises:
        ModelError: With the built-in names.
    """
    if built_in(source) is None and not (source and Path(source).exists()):
        raise no_model(source)


def no_model(source: str) -> ModelError:
    """What is said of a model that is neither on disk nor built in; an id of the Hugging Face hub is recognized."""
    if HUB_ID.fullmatch(source):
        return ModelError(
            f"no model at {source}: no such directory; if it is an id of the Hugging Face hub, download it first "
            f"(huggingface-cli download {source} --local-dir DIRECTORY) and name the directory"
        )
    choices = ", ".join(ZOO)
    return ModelError(
        f"no model at {source or repr(source)}: no such directory, and no built-in name (choices: {choices})"
    )


def check_adaptor(adaptor: str, source: str) -> None:
    """Refuses an adaptor that is neither the identity, nor a folder, nor beside the model, before torch is imported.

    Raises:
        UnsupportedError: With the choices.
    """
    folder = Path(source) if Path(source).exists() else built_in(source) or Path(source)
    records = sorted(folder.glob("adaptors/*/adaptor.json"))
    names = [record.parent.name for record in records]
    if adaptor not in ("identity", *names, *map(_kind_in, records)) and not (adaptor and Path(adaptor).is_dir()):
        choices = ", ".join(["identity", *names, "a folder that train adaptor wrote"])
        raise UnsupportedError(f"no adaptor {adaptor!r} beside {Path(source).name}; choices: {choices}")


def _kind_in(record: Path) -> str:
    """The kind that an adaptor's record names; '' where it is damaged, which is refused when an adaptor is chosen."""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
