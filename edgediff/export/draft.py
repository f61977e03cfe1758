"""The manifest before any file exists: all that the runtime's loop needs to know of a bundle."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgediff.config.weight_plan import coarsest, named_by_content
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.export.export_config import ExportConfig, check_config, layout_of
from edgediff.export.reference_conditioning import Source
from edgediff.models.clockwork import SplitUNet
from edgediff.models.components import (
    PipelineComponent,
    component_hashes,
    preview_settings,
    prompt_settings,
    vae_settings,
)
from edgediff.models.controlnet import control_hashes
from edgediff.models.graphs import conditioning_tensors, graph_list
from edgediff.models.load import Model
from edgediff.models.lora_inputs import lora_inputs
from edgediff.models.macs import count, tally
from edgediff.models.sampling import scheduler_config
from edgediff.models.trained import trained_for
from edgediff.targets import TARGETS
from edgediff.targets.base import Outline, Sizes
from edgediff_runtime import Manifest, clock_mask
from edgediff_runtime import manifest as m
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.manifest_json import FORMAT_VERSION

TOOLS = ("edgediff", "torch", "diffusers", "numpy")


def with_defaults(config: ExportConfig, model: Model) -> ExportConfig:
    """The recipe with the sampler and the steps that it leaves out.

    They are those that the adaptor's folder was trained for where the recipe names one, else the model's own.

    Raises:
        ModelError: The folder is not an adaptor's.
        UnsupportedError: The model's own sampler cannot be followed.
    """
    trained = trained_for(config.adaptor, model)
    changes: dict[str, Any] = {}
    if config.scheduler is None:
        if trained is not None:
            changes["scheduler"] = trained.scheduler
        else:
            changes["scheduler"] = model.usual_sampler
    if config.steps is None:
        changes["steps"] = model.usual_steps if trained is None else trained.num_inference_steps
    if config.guidance_scale is None and trained is not None:
        changes["guidance_scale"] = trained.guidance_scale
    return check_config(msgspec.structs.replace(config, **changes))


def operating_point(model: Model, config: ExportConfig) -> m.TrainedFor:
    """The operating point of a recipe that `with_defaults` completed, as an adaptor would have been trained for it."""
    assert config.steps is not None
    assert config.scheduler is not None
    return m.TrainedFor(
        num_inference_steps=config.steps,
        scheduler=config.scheduler,
        clock=config.clock,
        mask=tuple(map(int, clock_mask(config.clock, config.steps, config.scheduler))),
        guidance_scale=model.usual_guidance if config.guidance_scale is None else config.guidance_scale,
    )


def draft_manifest(
    model: Model,
    divided: SplitUNet,
    config: ExportConfig,
    conditioning_source: Source,
    components: Mapping[str, PipelineComponent],
    adaptor: m.Adaptor | None = None,
    sizes: Sizes | None = None,
) -> Manifest:
    """Drafts the manifest of a bundle.

    Args:
        config: A recipe that `with_defaults` completed.
        sizes: Of latents; the model's own alone where there are none.

    Returns:
        The manifest without files and without what only writing the graphs can tell.

    Raises:
        UnsupportedError: The UNet's output or its cut is not handled.
        ModelError: Its scheduler cannot be carried over.
    """
    counts = tally(divided, model.sample_shape, model.step_tensors)
    known = model.conditioning
    point = operating_point(model, config)
    sizes = Sizes(model.sample_shape[1:]) if sizes is None else sizes
    in_channels, height, width = model.sample_shape
    channels = model.out_channels
    if channels > in_channels:
        raise UnsupportedError(
            f"the UNet takes {in_channels} channels and gives {channels}: it also predicts a variance, which no "
            "sampler here uses; supported: as many channels out as the latent has"
        )
    prompt = (config.prompt, config.negative_prompt) if conditioning_source == "prompt" else None
    file_hash = sha256_of(Path(config.conditioning)) if config.conditioning is not None else None
    tools = dict.fromkeys((*TOOLS, *(tool for name in config.targets for tool in TARGETS[name].packages)))
    return Manifest(
        format_version=FORMAT_VERSION,
        generator=f"edgediff {version('edgediff')}",
        source=m.Source(
            name=model.name,
            path=None if model.is_built_in else str(model.path),
            sha256=model.sha256,
            random_weights=_text(config.random_weights),
            components=component_hashes(components) | control_hashes(model.control),
            lora=tuple(lora.spec for lora in model.lora),
            embedding=tuple(embedding.spec for embedding in model.embedding),
            vae=None if model.vae is None else str(model.vae),
            preview=None if model.preview is None else str(model.preview),
            control=tuple(str(each.path) for each in model.control),
            t2i_adapter=None if model.t2i_adapter is None else str(model.t2i_adapter.path),
            prediction_type=None if model.single is None else model.single.prediction_type,
        ),
        license=model.card.license if config.license is None else config.license,
        cut=m.Cut(level=config.cut.level, point=config.cut.point),
        adaptor=m.Adaptor(kind="identity") if adaptor is None else adaptor,
        sample=m.Sample(channels, in_channels, height, width, model.space, divided.factor, model.concat),
        conditioning=m.Conditioning(
            kind=known.kind,
            tensors=conditioning_tensors(model),
            labels=known.labels,
            null_label=known.null_label,
        ),
        scheduler=scheduler_config(model.scheduler, point.scheduler),
        operating_point=m.OperatingPoint(
            **msgspec.structs.asdict(point), seed=str(config.seed), num_images=1 if known.kind == "text" else 2
        ),
        evidence=m.Evidence(config.verify.mode, conditioning_source, file_hash, prompt, sizes.further),
        cost=counts.parts | _adapter_cost(components),
        cache_bytes=counts.cache_elements * torch.float32.itemsize,
        targets=_targets(
            model,
            divided,
            config,
            components,
            sizes,
            guided=point.guidance_scale > 1 and m.GUIDANCE not in known.tensors,
        ),
        config=_recipe(config),
        versions={tool: version(tool) for tool in tools},
        files={},
        prompt=prompt_settings(model, components),
        vae=vae_settings(model, components),
        preview=preview_settings(model, components),
        lora=lora_inputs(divided.factors),
    )


def _adapter_cost(components: Mapping[str, PipelineComponent]) -> dict[str, m.Cost]:
    """What a T2I-Adapter costs for one picture."""
    if m.T2I_ADAPTER not in components:
        return {}
    adapter = components[m.T2I_ADAPTER]
    (picture,) = adapter.graph.inputs
    given = torch.empty(1, *map(int, picture.shape[1:]), device="meta")
    return {m.T2I_ADAPTER: count(adapter.empty(), {picture.name: given})[1]}


def _recipe(config: ExportConfig) -> dict[str, Any]:
    """The recipe as the manifest's JSON gives it back; files that the source or the evidence names are left out.

    A plan of weights is named by its content: the same plan elsewhere makes the same bundle, another plan in the same
    file does not.
    """
    without = msgspec.structs.replace(
        config, model=None, lora=(), embedding=(), vae=None, preview=None, control=(), t2i_adapter=None
    )
    for name in config.targets:
        section = getattr(config, name)
        if getattr(section, "weights", None) is not None:
            named = msgspec.structs.replace(section, weights=named_by_content(section.weights))
            without = msgspec.structs.replace(without, **{name: named})
    weights = {component: named_by_content(asked) for component, asked in config.weights.items()}
    recipe = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(without, weights=weights)))
    return dict(recipe, seed=str(config.seed), random_weights=_text(config.random_weights))


def _targets(
    model: Model,
    divided: SplitUNet,
    config: ExportConfig,
    components: Mapping[str, PipelineComponent],
    sizes: Sizes,
    guided: bool,
) -> tuple[m.Target, ...]:
    parts = graph_list(divided, model)
    rows = (2 if guided else 1) + model.injects
    entries = []
    for name in config.targets:
        target, section = TARGETS[name], config.section(name)
        outline = Outline(parts, divided, layout_of(config, name), rows, config.verify, sizes)
        entry = target.describe(outline, section)
        if model.injects and entry.unet.batch is not None and entry.unet.batch % rows:
            raise ConfigError(
                f"'{name}.batch' is {entry.unet.batch}; with 'injection' an image has {rows} rows, one of them the "
                "inverted picture's: leave the batch out"
            )
        entry = entry.with_unet(floors=_floors(config, name, "unet", entry.unet))
        for component in components.values():
            own = config.section(name, component.name)
            described = target.describe_component(component.stage, component.graph, config.verify, own, sizes)
            if described is not None:
                floors = _floors(config, name, component.name, described)
                entry = entry.with_component(component.name, msgspec.structs.replace(described, floors=floors))
        entries.append(entry)
    return tuple(entries)


def _floors(config: ExportConfig, target: str, name: str, component: m.Component) -> m.Floors:
    return config.verify.floors(component.dtype, coarsest(config.weights_of(target, name), name))


def _text(seed: int | None) -> str | None:
    return None if seed is None else str(seed)


def essence(manifest: Manifest) -> Manifest:
    """Leaves what two exports must share to be the same.

    Returns:
        The manifest without what writing fills in, and without where the source lies.
    """
    targets = tuple(TARGETS[entry.target].essence(entry) for entry in manifest.targets)
    source = msgspec.structs.replace(
        manifest.source, path=None, lora=(), embedding=(), vae=None, preview=None, control=(), t2i_adapter=None
    )
    adaptor = msgspec.structs.replace(manifest.adaptor, path=None)
    return msgspec.structs.replace(manifest, source=source, adaptor=adaptor, targets=targets, files={})
