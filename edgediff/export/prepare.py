"""What an export begins with: a loaded model and a recipe become a divided UNet and the draft of a manifest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgediff.errors import ConfigError
from edgediff.export.component_reference import control_features, control_squares, encode_prompt
from edgediff.export.draft import draft_manifest, operating_point, with_defaults
from edgediff.export.export_config import ExportConfig
from edgediff.export.latent_sizes import latent_sizes, resized
from edgediff.export.reference_conditioning import reference_conditioning
from edgediff.models.clockwork import SplitUNet
from edgediff.models.components import (
    TEXT_ENCODERS,
    PipelineComponent,
    pipeline_components,
    prompt_settings,
    vae_settings,
)
from edgediff.models.graphs import divide
from edgediff.models.load import Model, random_weights
from edgediff.models.lora import read_spec
from edgediff.models.textual_inversion import Embedding
from edgediff.models.textual_inversion import read_spec as read_embedding_spec
from edgediff.models.trained import TrainedAdaptor, choose_adaptor
from edgediff.targets.base import Sizes
from edgediff_runtime import Manifest, noise
from edgediff_runtime.manifest import CONTROL_IMAGE, T2I_ADAPTER, numbered

Progress = Callable[[str], None]


@dataclass
class Prepared:
    """A model as a recipe has it, before anything is written.

    Attributes:
        config: The recipe with the sampler and the steps that it left out.
        components: What goes into the bundle beside the UNet, not yet loaded.
        conditioning: Embeddings of the reference trajectory by tensor names, one row each; empty for classes.
        draft: The manifest without files.
    """

    model: Model
    config: ExportConfig
    components: dict[str, PipelineComponent]
    sizes: Sizes
    conditioning: dict[str, np.ndarray]
    adaptor: TrainedAdaptor
    divided: SplitUNet
    draft: Manifest


def prepare(model: Model, config: ExportConfig, say: Progress) -> Prepared:
    """Loads weights, encodes the reference's prompt, divides the UNet and drafts the manifest.

    Raises:
        ConfigError: The recipe does not fit the model.
        ModelError: The model has no scheduler.
        UnsupportedError: The model cannot be cut or exported so.
    """
    _check_loaded(model, config)
    model = replace(_with_weights(model, config, say), injects=config.injection)
    config = with_defaults(config, model)
    components = _components(model, config)
    sizes = latent_sizes(model, components, config)
    model, components = resized(model, components, sizes.usual)
    _check_adapter(model, components)
    settings = prompt_settings(model, components)
    prompt = None
    if settings is not None and config.conditioning is None:
        say("encoding the reference's prompt in torch")
        prompt = encode_prompt(components, settings, config.prompt, config.negative_prompt)
    conditioning, source = reference_conditioning(
        model.conditioning, config.conditioning, config.seed, drawn_inputs(model, config.seed), prompt,
        _pixels(model, components),
    )  # fmt: skip
    conditioning |= control_features(components, conditioning)
    say("dividing the UNet")
    adaptor = choose_adaptor(config.adaptor, model, config.cut, operating_point(model, config))
    divided = divide(model, config.cut, adaptor.part, config.lora_inputs)
    draft = draft_manifest(model, divided, config, source, components, adaptor.manifest, sizes)
    return Prepared(model, config, components, sizes, conditioning, adaptor, divided, draft)


def drawn_inputs(model: Model, seed: int) -> dict[str, np.ndarray]:
    """What stands for pictures that a UNet, or what steers it, takes beside the latent; empty where none is taken.

    Returns:
        ``concat_latents`` [1, C', H, W], seeded normal numbers; ``control_image``, and ``control_image_2`` and
        so on, uint8 [1, h, w, 3], coloured squares.
    """
    channels, height, width = model.sample_shape
    extra = channels - model.out_channels
    found = {}
    if extra > 0:
        found["concat_latents"] = noise(seed, (extra, height, width), image=0, draw=1_000)[None]
    adapter = () if model.t2i_adapter is None else (model.t2i_adapter.downscale,)
    for i, each in enumerate((*(control.downscale for control in model.control), *adapter)):
        found[numbered(CONTROL_IMAGE, i)] = control_squares(seed, height, width, each, i)
    return found


def _check_loaded(model: Model, config: ExportConfig) -> None:
    """Refuses a recipe that names weights which the model was not loaded with."""
    if config.lora and [read_spec(spec) for spec in config.lora] != [(lora.path, lora.scale) for lora in model.lora]:
        raise ConfigError(f"'lora' names {', '.join(config.lora)}, which {model.name} was not loaded with; pass "
                          "lora= to load_model")  # fmt: skip
    if config.embedding and not _is_loaded(config.embedding, model.embedding):
        raise ConfigError(f"'embedding' names {', '.join(config.embedding)}, which {model.name} was not loaded with; "
                          "pass embedding= to load_model")  # fmt: skip
    if [Path(path) for path in config.control] != [each.path for each in model.control] and config.control:
        raise ConfigError(f"'control' names {', '.join(config.control)}, which {model.name} was not loaded with; pass "
                          "control= to load_model")  # fmt: skip
    adapter = None if model.t2i_adapter is None else model.t2i_adapter.path
    paths = {"vae": (config.vae, model.vae), "preview": (config.preview, model.preview)}
    for name, (asked, given) in (paths | {"t2i_adapter": (config.t2i_adapter, adapter)}).items():
        if asked is not None and Path(asked) != given:
            raise ConfigError(
                f"'{name}' is {asked}, which {model.name} was not loaded with; pass {name}= to load_model"
            )
    said = None if model.single is None else model.single.prediction_type
    if config.prediction_type not in (None, said):
        raise ConfigError(f"'prediction_type' is {config.prediction_type}, {model.name} was loaded with {said}; pass "
                          "prediction_type= to load_model")  # fmt: skip


def _is_loaded(specs: Sequence[str], embeddings: Sequence[Embedding]) -> bool:
    """Whether those textual inversions were loaded; a spec without a token is of any."""
    asked = [read_embedding_spec(spec) for spec in specs]
    pairs = zip(asked, embeddings, strict=False)
    return len(asked) == len(embeddings) and all(
        path == each.path and token in (None, each.token) for (path, token), each in pairs
    )


def _with_weights(model: Model, config: ExportConfig, say: Progress) -> Model:
    """The model with random weights where the recipe asks for them."""
    if config.random_weights is not None:
        if model.has_weights:
            raise ConfigError(f"random weights were asked for, but {model.name} has weights of its own")
        say("drawing random weights")
        model = random_weights(model, config.random_weights)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights; pass --random-weights SEED to export it")
    model.check_schedule()
    return model


def _components(model: Model, config: ExportConfig) -> dict[str, PipelineComponent]:
    """The components that the recipe asks for, of those that the pipeline has."""
    found = pipeline_components(model)
    for name in config.dtypes:
        if name not in ("unet", *found):
            there = ", ".join(("unet", *found))
            raise ConfigError(f"'dtypes' names {name}, which {model.name} does not have; it has: {there}")
    if config.components is None:
        return found
    missing = [name for name in config.components if name not in found]
    if missing:
        there = ", ".join(found) or "none beside the UNet"
        raise ConfigError(f"'components' asks for {missing[0]}, which {model.name} does not have; it has: {there}")
    chosen = {name: component for name, component in found.items() if name in config.components}
    if model.embedding and not chosen.keys() & {*TEXT_ENCODERS}:
        raise ConfigError("'components' has no text encoder, which 'embedding' adds tokens to; name text_encoder too")
    if config.preview is not None and "preview_decoder" not in chosen:
        raise ConfigError(f"'preview' is {config.preview}, but 'components' has no preview_decoder; name it there too")
    for name, needed in (("vae_encoder", ["vae_decoder"]), *((each, TEXT_ENCODERS) for each in TEXT_ENCODERS)):
        without = [each for each in needed if each in found and each not in chosen]
        if name in chosen and without:
            raise ConfigError(f"'components' has {name} without {without[0]}, which it goes with; name both")
    return chosen


def _check_adapter(model: Model, components: Mapping[str, PipelineComponent]) -> None:
    """Refuses a T2I-Adapter that is left out: without it nothing makes what the UNet's graphs take."""
    if model.t2i_adapter is not None and T2I_ADAPTER not in components:
        raise ConfigError(
            f"'t2i_adapter' is {model.t2i_adapter.path}, but 'components' has no t2i_adapter; name it there too"
        )


def _pixels(model: Model, components: Mapping[str, PipelineComponent]) -> tuple[int, int] | None:
    """Height and width of the picture."""
    vae = vae_settings(model, components)
    _, height, width = model.sample_shape
    return None if vae is None else (vae.downscale * height, vae.downscale * width)
