"""The sizes of a bundle: those of a recipe, in pixels, become the latents' that graphs are written for."""

from collections.abc import Mapping
from dataclasses import replace

from edgediff.config.sizes import read_sizes
from edgediff.errors import ConfigError
from edgediff.export.export_config import ExportConfig
from edgediff.models.clockwork import level_factor
from edgediff.models.components import PipelineComponent, vae_settings
from edgediff.models.load import Model
from edgediff.targets.base import Sizes


def latent_sizes(model: Model, components: Mapping[str, PipelineComponent], config: ExportConfig) -> Sizes:
    """The latents that a recipe's sizes stand for; of a model without an autoencoder they are the sample's own sizes.

    Where any size is asked for, the graphs are checked with one that is not square, beside the usual one.

    Raises:
        ConfigError: The levels of the UNet or of the autoencoder do not divide one.
    """
    wanted = read_sizes(config.sizes)
    vae = vae_settings(model, components)
    each = 1 if vae is None else vae.downscale
    factor = level_factor(model.unet)
    for height, width in wanted.named:
        if height % (each * factor) or width % (each * factor):
            raise ConfigError(
                f"'sizes' has {width}x{height}, which the levels of {model.name} do not divide; expected multiples of "
                f"{each * factor}"
            )
    usual, *further = [(height // each, width // each) for height, width in wanted.named] or [model.sample_shape[1:]]
    if wanted.takes_any and not further:
        further = [(usual[0] + factor, usual[1] + 2 * factor)]
    return Sizes(usual, tuple(further), each)


def resized(
    model: Model, components: Mapping[str, PipelineComponent], size: tuple[int, int]
) -> tuple[Model, dict[str, PipelineComponent]]:
    """A model and its components with another usual size of the latent."""
    before = model.sample_shape[1:]
    if size == before:
        return model, dict(components)
    return replace(model, size=size), {
        name: replace(component, graph=component.graph.of_any_size(*before).at(*size))
        for name, component in components.items()
    }
