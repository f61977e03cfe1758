"""Built-in models: diffusers directories with a card, some with weights, some only a geometry to count."""

from pathlib import Path

FOLDER = Path(__file__).parent
ZOO = tuple(sorted(path.name for path in FOLDER.iterdir() if (path / "unet").is_dir()))


def built_in(name: str) -> Path | None:
    """A built-in model's directory, or None where there is none of that name."""
    return FOLDER / name if name in ZOO else None
