"""What can be compared with a folder of photographs at all, and by which classes."""

from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.load import Model
from edgediff_runtime.manifest import Manifest


def check_model(model: Model) -> int:
    """Refuses a model whose images cannot be compared with photographs.

    Args:
        model: The model.

    Returns:
        Height and width of its images, in pixels.

    Raises:
        ConfigError: It is a geometry without weights.
        ModelError: It has no scheduler.
        UnsupportedError: It makes latents, or images that are not square or not RGB, is conditioned on text, or
            predicts something besides the image.
    """
    if model.conditioning.kind == "text":
        raise UnsupportedError(f"{model.name} is conditioned on text; expected classes, or nothing")
    if model.space != "pixel":
        raise UnsupportedError(f"{model.name} works on latents and has no decoder; expected a model that makes images")
    channels, height, width = model.sample_shape
    if channels != 3 or height != width:
        raise UnsupportedError(f"{model.name} makes {channels}x{height}x{width}; expected square images of 3 channels")
    if model.unet.config.out_channels != channels:
        raise UnsupportedError(f"{model.name} gives {model.unet.config.out_channels} channels; expected the 3 it takes")
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights: it makes no images")
    model.check_schedule()
    return height


def check_manifest(manifest: Manifest) -> int:
    """Refuses a bundle whose images cannot be compared with photographs.

    Args:
        manifest: The bundle's manifest.

    Returns:
        Height and width of its images, in pixels.

    Raises:
        UnsupportedError: It makes latents, or images that are not square or not RGB, is conditioned on text, or draws
            fresh noise on its way.
    """
    sample = manifest.sample
    if sample.space != "pixel":
        raise UnsupportedError("the bundle's model works on latents and has no decoder; expected one that makes images")
    if sample.channels != 3 or sample.height != sample.width:
        shape = f"{sample.channels}x{sample.height}x{sample.width}"
        raise UnsupportedError(f"the bundle's images are {shape}; expected square ones of 3 channels")
    if manifest.conditioning.kind == "text":
        raise UnsupportedError("the bundle's model is conditioned on text; expected classes, or nothing")
    if manifest.scheduler.eta > 0:
        raise UnsupportedError("the bundle's sampler draws fresh noise in every step (eta above 0); expected eta 0")
    return sample.height
