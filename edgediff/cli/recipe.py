"""What commands that begin with a model and a recipe have in common; nothing here imports torch before it is needed."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgediff.cli.app import toolchain
from edgediff.errors import ConfigError

if TYPE_CHECKING:
    from edgediff.export.export_config import ExportConfig
    from edgediff.models.load import Model

ConfigOption = Annotated[str | None, typer.Option(help="A YAML recipe, or the name of a built-in one.")]
AdaptorOption = Annotated[
    str | None, typer.Option(help="identity, a built-in one by name or kind, or a folder that train adaptor wrote.")
]


def recipe_with(config: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain data, the usual one where none is named; what is given and not None goes before it."""
    import msgspec

    from edgediff.export.export_config import ExportConfig, load_config

    recipe: dict[str, Any] = msgspec.to_builtins(load_config(config) if config is not None else ExportConfig())
    recipe.update({key: value for key, value in given.items() if value is not None})
    return recipe


def check_recipe(recipe: dict[str, Any]) -> "ExportConfig":
    """Checks a recipe, and that its model and its adaptor are there, before a large model is loaded."""
    from edgediff.export.export_config import config_from
    from edgediff.zoo import check_adaptor, check_source

    checked = config_from(recipe)
    if checked.model is None:
        raise ConfigError("no model: name a diffusers directory, a built-in one, or a recipe with a model")
    check_source(checked.model)
    if checked.adaptor is not None:
        check_adaptor(checked.adaptor, checked.model)
    return checked


def load_recipe_model(checked: "ExportConfig", command: str, allow_pickle: bool = False) -> "Model":
    """Loads a checked recipe's model, with all that the recipe names for it."""
    loaded: Model = toolchain("edgediff.models.load", command).load_model(
        checked.model, lora=checked.lora, embedding=checked.embedding, vae=checked.vae, preview=checked.preview,
        control=checked.control, t2i_adapter=checked.t2i_adapter,
        prediction_type=checked.prediction_type, allow_pickle=allow_pickle,
    )  # fmt: skip
    return loaded
