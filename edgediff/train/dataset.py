"""What a UNet learns from: images, those held out of them, and what the model is conditioned on for each."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.data.batches import Batches, as_channels_first
from edgediff.data.captions import PLAIN, read_captioned
from edgediff.data.image_folder import ImageSet, class_indices, divide, read_images
from edgediff.errors import ConfigError, DataError
from edgediff.models.load import Model
from edgediff.train.latents import Autoencoder, encode
from edgediff.train.loop import Say
from edgediff.train.settings import ImageTraining, UNetTraining
from edgediff.train.text import Text

# Share of each class that is held out of a training.
HELD_OUT_SHARE = 0.1


def read_data(settings: ImageTraining, size: int, say: Say, *, captioned: bool = False) -> tuple[ImageSet, ImageSet]:
    """Reads the images to learn from and those held out, of the same classes, `size` pixels high and wide.

    Raises:
        ConfigError: No folder is named, or a setting is for `captioned` images and these are not.
        DataError: A folder cannot be read, or the held-out images have other classes.
    """
    if settings.data is None:
        raise ConfigError("no images: name a folder, --data DIR or 'data' in the settings")
    if captioned:
        return _read_captioned(settings, settings.data, size, say)
    for name in ("captions", "only"):
        if getattr(settings, name, None) is not None:
            raise ConfigError(f"'{name}' was given, but the model learns no captions; leave it out")
    data = read_images(settings.data, size, minimum=2, progress=say)
    if settings.held_out is None:
        kept, held_out = divide(data, HELD_OUT_SHARE, seed=0)
        if not len(held_out):
            raise DataError(
                f"{settings.data} has one image of each class; expected more, or held-out images of their own"
            )
        return replace(kept, skipped=data.skipped), held_out
    held_out = read_images(settings.held_out, size, progress=say)
    strange = sorted(set(held_out.names) - set(data.names))
    if strange or bool(held_out.names) != bool(data.names):
        what = ", ".join(strange[:5]) or "none"
        raise DataError(f"{settings.held_out} has classes that {settings.data} lacks: {what}")
    return data, held_out


def _read_captioned(settings: ImageTraining, folder: str, size: int, say: Say) -> tuple[ImageSet, ImageSet]:
    """Those held out are the folder of its own, else those of another split, else a share of all."""
    given = getattr(settings, "captions", None)
    forms = PLAIN if given is None else given
    data, held_out = read_captioned(folder, size, forms, settings.only, progress=say)
    if settings.held_out is not None:
        own = read_captioned(settings.held_out, size, forms, settings.only, strict=False, progress=say)
        held_out = own[1] if len(own[1]) else own[0]
    if not len(held_out):
        kept, held_out = divide(data, HELD_OUT_SHARE, seed=0)
        data = replace(kept, skipped=data.skipped)
    return data, held_out


def classes_of(model: Model, data: ImageSet) -> NDArray[np.int64] | None:
    """The model's class of each image, int64 [N]; None where the model has no classes.

    Raises:
        DataError: A class of the folder is none of the model's.
    """
    known = model.conditioning
    return class_indices(known.labels if known.kind == "class" else None, data, "model")


def batches_of(
    data: ImageSet, model: Model, vae: Autoencoder | None, text: Text | None, settings: UNetTraining, say: Say
) -> Batches:
    """Images, or their latents by an autoencoder, with their conditioning; raises what `encode` and `classes_of` do."""
    labels, null_label = classes_of(model, data), model.conditioning.null_label
    cond = {} if labels is None else {"class_labels": torch.from_numpy(labels)}
    null = {} if labels is None or null_label is None else {"class_labels": torch.tensor(null_label)}
    mirrored = None
    if vae is None:
        x_0 = as_channels_first(data.images)
    else:
        if settings.flip:
            mirrored = encode(vae, np.ascontiguousarray(data.images[:, :, ::-1]), progress=say)
        x_0 = encode(vae, data.images, progress=say)
    wordings = None if text is None else text.wordings(data)
    return Batches(x_0, cond, settings.seed, mirrored=mirrored, null=null, wordings=wordings)
