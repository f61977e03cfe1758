"""What becomes of the weights of each component in each target, as a recipe asks for it."""

from collections.abc import Mapping

from torch import nn

from edgediff.config.weight_plan import planned
from edgediff.errors import ConfigError
from edgediff.export.export_config import ExportConfig
from edgediff.models.load import Model
from edgediff.models.stored_weights import StoredWeights, fits, uniform, weights_of
from edgediff.targets import TARGETS


def unet_weights(model: Model, adaptor: nn.Module | None, config: ExportConfig) -> dict[str, StoredWeights]:
    """What the UNet's and the adaptor's weights are stored as, by target; those are left out where they stay."""
    weights = weights_of(model.unet, *([] if adaptor is None else [adaptor]))
    made = {name: stored_weights(config, name, "unet", weights) for name in config.targets}
    return {name: found for name, found in made.items() if found is not None}


def stored_weights(
    config: ExportConfig, target: str, component: str, weights: Mapping[str, nn.Parameter]
) -> StoredWeights | None:
    """What a component's weights are stored as in a target; None where all stay as they are.

    Raises:
        ConfigError: A plan names a weight that the component does not have, or that does not fit its format.
    """
    asked = config.weights_of(target, component)
    if asked is None:
        return None
    scales, found = TARGETS[target].int4_scales, planned(asked, component)
    if isinstance(found, str):
        return StoredWeights(weights, uniform(weights, found, scales), scales)
    for name, form in found.items():
        if name not in weights:
            raise ConfigError(f"{asked}: {component} has no weight {name}; make a plan for this model")
        if not fits(weights[name], form, scales):
            raise ConfigError(
                f"{asked}: {name} has {weights[name][0].numel()} inputs for each output, which {TARGETS[target].title} "
                f"does not take in {form}; take int8 for it"
            )
    return StoredWeights(weights, found, scales) if found else None
