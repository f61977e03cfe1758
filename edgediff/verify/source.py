"""The source of a bundle, where it is available: its UNet, and its trajectory computed again in torch.

Only this module of verification needs torch, and does without it where it is not installed.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgediff.config.choices import Cut
from edgediff.errors import EdgediffError, MissingExtraError, ModelError
from edgediff_runtime import EdgePipeline, Manifest
from edgediff_runtime.manifest import CONTROLNET, T2I_ADAPTER, injects

if TYPE_CHECKING:
    from edgediff.models.clockwork import SplitUNet
    from edgediff.models.load import Model


def torch_latents(manifest: Manifest, request: dict[str, Any], model: object) -> tuple[np.ndarray | None, str]:
    """Runs the bundle's trajectory in torch from its source; model and errors as of `open_source`.

    Returns:
        Final latents [N, C, H, W] and what they were computed from; None and the reason where the source is not
        available.
    """
    found, reason = open_source(manifest, model)
    if found is None:
        return None, reason
    from edgediff.models.graphs import graph_list
    from edgediff.models.torch_session import TorchSession

    loaded, divided = found
    session = TorchSession(divided.parts, graph_list(divided, loaded))
    return EdgePipeline(manifest, session, warn=False)(**request).latents, "against torch, computed again"


def open_source(manifest: Manifest, model: object = None) -> "tuple[tuple[Model, SplitUNet] | None, str]":
    """Finds the UNet that a bundle was made of, divides it as it was, and puts the bundle's adaptor in.

    Args:
        manifest: The bundle's manifest.
        model: The source: a loaded `Model`, a directory or a built-in name; None looks where the manifest says.

    Returns:
        The model and its UNet divided; None and the reason where they are not available.

    Raises:
        ModelError: `model` was named and is not the bundle's source.
        MissingExtraError: `model` was named and torch is not installed.
    """
    try:
        from edgediff.models.controlnet import control_hashes
        from edgediff.models.graphs import divide
        from edgediff.models.load import Model, load_built_in, load_model, random_weights
        from edgediff.models.trained import choose_adaptor
    except ImportError as e:
        if model is not None:
            raise MissingExtraError("verifying against a named model", "export") from e
        return None, "torch is not installed"
    source = manifest.source
    if isinstance(model, Model):
        loaded = model
    else:
        try:
            named = source.path if model is None else str(model)
            if named is None:
                loaded = load_built_in(source.name)
            else:
                loaded = load_model(
                    named, lora=source.lora, control=source.control, t2i_adapter=source.t2i_adapter,
                    prediction_type=source.prediction_type,
                )  # fmt: skip
        except (EdgediffError, OSError):
            if model is not None:
                raise
            return None, "the source is not available"
        if source.random_weights is not None:
            loaded = random_weights(loaded, int(source.random_weights))
    if loaded.sha256 != source.sha256:
        if model is not None:
            raise ModelError(f"{loaded.name} is not the bundle's source: its hash differs; name the bundle's source")
        return None, "the source has changed"
    known = {name: sha256 for name, sha256 in source.components.items() if name.startswith(CONTROLNET)}
    if control_hashes(loaded.control) != known:
        return None, "the ControlNet has changed, or was not loaded"
    adapter = None if loaded.t2i_adapter is None else loaded.t2i_adapter.sha256
    if adapter != source.components.get(T2I_ADAPTER):
        return None, "the T2I-Adapter has changed, or was not loaded"
    size = (manifest.sample.height, manifest.sample.width)
    loaded = replace(loaded, size=size, injects=injects(manifest.targets[0].unet.graphs))
    cut, said = Cut(manifest.cut.level, manifest.cut.point), manifest.adaptor
    try:
        point = said.trained_for
        adaptor = choose_adaptor(said.path or said.name, loaded, cut, point) if point else None
    except (EdgediffError, OSError):
        return None, "the adaptor is not available"
    if adaptor is not None and adaptor.sha256 != said.sha256:
        return None, "the adaptor has changed"
    rank = None if manifest.lora is None else manifest.lora.rank
    return (loaded, divide(loaded, cut, None if adaptor is None else adaptor.part, rank)), ""
