"""Built-in models: diffusers directories with a card, some with weights, some only a geometry to count."""

import json
from pathlib import Path

from edgediff.errors import ModelError, UnsupportedError

FOLDER = Path(__file__).parent
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
        choices = ", ".join(ZOO)
        raise ModelError(
            f"no model at {source or repr(source)}: no such directory, and no built-in name (choices: {choices})"
        )


def check_adaptor(adaptor: str, source: str) -> None:
    """Refuses an adaptor that is neither the identity, nor a folder, nor built in, before torch is imported.

    Raises:
        UnsupportedError: With the choices.
    """
    folder = built_in(source)
    records = [] if folder is None else sorted(folder.glob("adaptors/*/adaptor.json"))
    names = [record.parent.name for record in records]
    kinds = [json.loads(record.read_text(encoding="utf-8"))["kind"] for record in records]
    if adaptor not in ("identity", *names, *kinds) and not (adaptor and Path(adaptor).is_dir()):
        choices = ", ".join(["identity", *names, "a folder that train adaptor wrote"])
        raise UnsupportedError(f"no adaptor {adaptor!r} beside {Path(source).name}; choices: {choices}")
