"""Recipes by path or by the name of a built-in one."""

from pathlib import Path

from edgediff.errors import ConfigError


def find_recipe(name: str | Path, kind: str = "") -> Path:
    """Finds a recipe by its path or by the name of a built-in one; `kind` ``train`` is for those of trainings.

    ConfigError: there is neither; the built-in ones are named.
    """
    if Path(name).is_file():
        return Path(name)
    # An installed wheel carries the recipes in the package; a checkout has them beside it.
    here = Path(__file__).parents[1]
    folder = next(f for f in (here / "export_configs", here.parent / "export_configs") if f.is_dir())
    built_in = {file.stem: file for file in sorted((folder / kind).glob("*.yaml"))}
    if str(name) not in built_in:
        raise ConfigError(f"no recipe {name}: no such file, and no built-in one (choices: {', '.join(built_in)})")
    return built_in[str(name)]
