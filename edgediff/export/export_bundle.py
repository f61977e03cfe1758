"""Export: a model goes in, a verified bundle comes out, or nothing does.

Read from top to bottom: load, split, record, write each target, seal, verify. The manifest is drafted before any graph
exists, since it is all that the runtime's loop needs: the reference trajectory runs through the same pipeline as a
device does, with torch behind it.
"""

import dataclasses
import gc
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgediff.bundle.files import check_files, component_files, list_files
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, Reference, at_size, record, save_reference
from edgediff.bundle.rows import ParityReport
from edgediff.bundle.staging import check_place, clear_stale, staged
from edgediff.errors import TargetError, VerificationError
from edgediff.export.bundle_card import bundle_card
from edgediff.export.component_memory import with_peaks
from edgediff.export.component_reference import component_inputs, control_features, record_component
from edgediff.export.component_weights import stored_weights, unet_weights
from edgediff.export.diffusers_check import can_compare, check_against_diffusers
from edgediff.export.draft import essence
from edgediff.export.export_config import ExportConfig, check_config, layout_of
from edgediff.export.half_reference import half_component, half_outputs
from edgediff.export.latent_sizes import resized
from edgediff.export.prepare import Progress, drawn_inputs, prepare
from edgediff.models.clip_tokenizer import place_tokenizer, tokenizer_folder
from edgediff.models.clockwork import SplitUNet
from edgediff.models.components import (
    TEXT_ENCODERS,
    PipelineComponent,
    write_pipeline_files,
)
from edgediff.models.graphs import graph_list
from edgediff.models.injection import ROW_TENSORS
from edgediff.models.load import Model, unet_config
from edgediff.models.part import Part
from edgediff.models.sampling import diffusers_scheduler
from edgediff.models.stored_weights import StoredWeights, taken_weights
from edgediff.models.textual_inversion import all_tokens
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.models.torch_session import TorchSession
from edgediff.models.undivided import undivided_part
from edgediff.targets import TARGETS
from edgediff.targets.base import ComponentJob, Job
from edgediff.targets.layout import modules
from edgediff.verify.parity import verify_bundle
from edgediff_runtime import BundleError, EdgePipeline, Manifest, OperatingPointWarning, clock_mask, open_bundle
from edgediff_runtime import manifest as m
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, render_sums
from edgediff_runtime.manifest import CONTROL_IMAGE
from edgediff_runtime.manifest_json import render_manifest
from edgediff_runtime.operating_point import departure
from edgediff_runtime.text_encoding import Tokenizer

log = logging.getLogger(__name__)


class Exported(msgspec.Struct, frozen=True):
    """What became of an export: where the bundle is, and its verification, None where it was there already."""

    path: Path
    report: ParityReport | None


def export_bundle(
    model: Model,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    force: bool = False,
    measure_memory: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Exports a model as a verified bundle.

    What is already there, made from the same model by the same recipe and tools, and still valid, is left as it is.

    Args:
        force: Replace a bundle that is already there.
        measure_memory: Run the pipeline once more in a process of its own, and write what each component took into the
            manifest; two exports then differ in that.

    Raises:
        ConfigError: The recipe does not fit the model.
        ModelError: The model has no scheduler.
        UnsupportedError: The model cannot be cut or exported so.
        TargetError: Something is in the way, or the disk is full.
        VerificationError: A number is below its floor; nothing was written.
        MissingExtraError: What a target needs is not installed.
    """
    say = progress if progress is not None else log.info
    config = check_config(ExportConfig() if config is None else config)
    path = Path(path)
    for name in config.targets:
        TARGETS[name].require()

    # Load and split.
    prepared = prepare(model, config, say)
    model, config, components, divided = prepared.model, prepared.config, prepared.components, prepared.divided
    draft, conditioning = prepared.draft, prepared.conditioning
    clear_stale(path)
    if _is_there(path, draft, say, force):
        return Exported(path, None)
    check_place(path, force)
    _warn_of_adaptor(draft)

    with staged(path) as folder:
        # Record the reference trajectory in torch, and compare the parts with the undivided UNet.
        pipe = EdgePipeline(draft, TorchSession(divided.parts, graph_list(divided, model)), warn=False)
        reference = record(pipe, conditioning, lambda i, n: say(f"reference trajectory in torch: step {i} of {n}"))
        for size in prepared.sizes.further:
            say(f"first steps in torch for latents of {size[1]} x {size[0]}")
            reference.sizes[size] = _first_steps(model, divided, at_size(draft, size), conditioning, components)
        say("comparing the parts with the undivided UNet")
        _check_split(model, divided, reference)
        if draft.evidence.verified == "full" and can_compare(model, components, draft):
            say("drawing a picture with diffusers' own pipeline")
            texts = {"prompt": config.prompt, "negative_prompt": config.negative_prompt}
            check_against_diffusers(model, components, draft, draft.operating_point.scheduler, texts)
        stored = unet_weights(model, prepared.adaptor.part, config)
        reference = half_outputs(draft, divided, reference, stored, say)
        for size, first in reference.sizes.items():
            reference.sizes[size] = half_outputs(at_size(draft, size), divided, first, stored, say)

        # Write each target.
        entries = []
        shares = sum(TARGETS[name].takes_traces for name in config.targets) > 1
        with tempfile.TemporaryDirectory(dir=folder, prefix=".traced-") as scratch:
            traces = Path(scratch) if shares else None
            for entry in draft.targets:
                section = config.section(entry.target)
                parts = modules(divided, layout_of(config, entry.target))
                weights = stored.get(entry.target)
                job = Job(
                    folder, entry, unet_config(model), parts, reference, pipe, section, config.verify, say, traces,
                    weights,
                )  # fmt: skip
                written = TARGETS[entry.target].write(job)
                entries.append(written.with_unet(weights={} if weights is None else weights.elements))

            # Write the components around it, one after the other.
            entries = _write_components(folder, model, components, draft, entries, reference, config, say, traces)
        manifest = msgspec.structs.replace(draft, targets=tuple(entries))

        # Seal: evidence, card, licence, then every file's hash.
        (folder / "evidence").mkdir()
        save_reference(reference, folder / REFERENCE)
        (folder / "README.md").write_text(bundle_card(manifest, model), encoding="utf-8")
        if model.card.license_text is not None:
            (folder / "LICENSE").write_text(model.card.license_text, encoding="utf-8")
        manifest = _seal(folder, manifest)

        # Verify. What needs no torch lets go of torch's weights first, also of those that the exporter's own cycles
        # hold: a large model is not in memory twice.
        source = model if draft.evidence.verified == "full" else None
        del model, divided, prepared, pipe, reference, job, parts
        gc.collect()
        if measure_memory:
            say("measuring what each component takes in memory")
            _write_manifest(folder, with_peaks(folder, manifest))
        report = verify_bundle(folder, source, progress=lambda what: say(f"verifying: {what}"))
        if not report.ok:
            raise VerificationError(f"{report.failure}; nothing was written", report)
    return Exported(path, report)


def _write_components(
    folder: Path,
    model: Model,
    components: Mapping[str, PipelineComponent],
    draft: Manifest,
    entries: list[m.Target],
    reference: Reference,
    config: ExportConfig,
    say: Progress,
    traces: Path | None,
) -> list[m.Target]:
    """Writes the components beside the UNet for each target, and records what torch computes in them."""
    tokenizers: dict[str, Tokenizer] = {}
    if draft.prompt is not None:
        names = [encoder.component for encoder in draft.prompt.encoders]
        tokenizers = dict(zip(names, source_tokenizers(components, draft.prompt), strict=True))
    for name, component in components.items():
        say(f"loading {name}")
        part = component.load()
        inputs = component_inputs(component, draft, tokenizers, reference)
        own = taken_weights(part, inputs) if any(config.weights_of(entry.target, name) for entry in entries) else {}
        stored = {
            entry.target: stored_weights(config, entry.target, name, own)
            for entry in entries
            if name in entry.components
        }
        _record_component(component, part, draft, inputs, reference, stored)
        if component.graph.maps:
            for size, sized in reference.sizes.items():
                resized_draft = at_size(draft, size)
                given = component_inputs(component, resized_draft, tokenizers, sized)
                _record_component(component, part, resized_draft, given, sized, stored)
        for i, entry in enumerate(entries):
            if name in entry.components:
                weights = stored[entry.target]
                job = ComponentJob(
                    folder, name, entry.components[name], part, inputs, component.config,
                    config.section(entry.target, name), say, traces, weights,
                )  # fmt: skip
                written = TARGETS[entry.target].write_component(job)
                elements = {} if weights is None else weights.elements
                entries[i] = entry.with_component(name, msgspec.structs.replace(written, weights=elements))
                del job
        del part
    scheduler = diffusers_scheduler(model.scheduler, draft.operating_point.scheduler)
    return [_write_pipeline(folder, model, components, entry, scheduler, say) for entry in entries]


def _record_component(
    component: PipelineComponent,
    part: Part,
    draft: Manifest,
    inputs: dict[str, np.ndarray],
    reference: Reference,
    stored: Mapping[str, StoredWeights | None],
) -> None:
    """Adds to a reference what torch computes in a component of its inputs, rounded too where a target rounds."""
    reference.components[component.name] = record_component(part, inputs)
    for entry in draft.targets:
        if component.name in entry.components:
            weights = stored[entry.target]
            if weights is not None or entry.components[component.name].dtype == "fp16":
                rounded = half_component(entry, component.name, part, inputs, weights)
                reference.half[entry.target, 0, component.name] = rounded


def _first_steps(
    model: Model,
    divided: SplitUNet,
    draft: Manifest,
    conditioning: dict[str, np.ndarray],
    components: Mapping[str, PipelineComponent],
) -> Reference:
    """The first full and the first cached step in torch, for a draft whose usual size is a further one."""
    sized = dataclasses.replace(model, size=(draft.sample.height, draft.sample.width))
    session = TorchSession(divided.parts, graph_list(divided, sized))
    drawn = drawn_inputs(sized, int(draft.operating_point.seed))
    _, there = resized(model, components, (draft.sample.height, draft.sample.width))
    given = conditioning | drawn | control_features(there, drawn)
    found = record(EdgePipeline(draft, session, warn=False), given)
    # Of what it was conditioned on, the picture alone is another one.
    return dataclasses.replace(found, conditioning={name: drawn[name] for name in (CONTROL_IMAGE,) if name in drawn})


def _write_pipeline(
    folder: Path,
    model: Model,
    components: Mapping[str, PipelineComponent],
    entry: m.Target,
    scheduler: Any,
    say: Progress,
) -> m.Target:
    """Writes model_index.json and the tokenizers where a target's ecosystem looks for them."""
    target = TARGETS[entry.target]
    where = target.pipeline_folder(entry) if components else None
    if where is not None:
        write_pipeline_files(model, scheduler, folder / where)
        target.finish_pipeline(folder / where, say)
    for name in TEXT_ENCODERS:
        if name in entry.components:
            source = tokenizer_folder(model.home, name)
            if where is None:
                places = target.tokenizer_files(source.name)
                place_tokenizer(source, folder / entry.target, places, all_tokens(model.embedding))
            tokenizer = f"{where or entry.target}/{source.name}/tokenizer.json"
            entry = entry.with_component(name, msgspec.structs.replace(entry.components[name], tokenizer=tokenizer))
    return entry


@torch.no_grad()
def _check_split(model: Model, divided: SplitUNet, reference: Reference) -> None:
    """Runs the undivided UNet on the first step's rows: what the parts gave must be its output, bit for bit."""
    first = {name: torch.from_numpy(value) for name, value in reference.steps[0].tensors.items()}
    undivided = undivided_part(model, divided.inputs, divided.factors)
    (whole,) = undivided(*(first[name] for name in divided.inputs))
    out = first["out_sample"]
    if model.injects:  # the undivided one does not: every row takes its own
        own = dict.fromkeys(ROW_TENSORS, torch.arange(len(whole)))
        out, _ = divided.full(**{name: first[name] for name in divided.inputs} | own)
    if not torch.equal(whole, out):
        number = psnr_db(whole.numpy(), out.numpy())
        raise VerificationError(
            f"the divided UNet differs from the undivided one: its out_sample is {number:.1f} dB of it"
        )


def _is_there(path: Path, draft: Manifest, say: Progress, force: bool) -> bool:
    """Whether the same bundle is already in place and valid."""
    if not (path / MANIFEST).is_file():
        return False
    try:
        bundle = open_bundle(path)
        check_files(bundle)
    except BundleError as e:
        if force:
            return False
        check_place(path, force=True)
        raise TargetError(f"{path} holds a bundle that is not valid ({e}); pass --force to replace it") from e
    same = essence(bundle.manifest) == essence(draft)
    if same:
        say(f"{path} is already there, made from the same model by the same recipe, and valid: nothing to export")
    return same


def _warn_of_adaptor(draft: Manifest) -> None:
    """Warns where the bundle's operating point is not what its adaptor was trained for; it is exported all the same."""
    point = draft.operating_point
    clock = clock_mask(point.clock, point.num_inference_steps, point.scheduler)
    differs = departure(draft, clock, (point.guidance_scale,) * len(clock), point.clock)
    if differs is not None:
        warnings.warn(differs, OperatingPointWarning, stacklevel=3)


def _seal(folder: Path, manifest: Manifest) -> Manifest:
    """Lists every file in the manifest, and in the component that it belongs to, and writes SHA256SUMS."""
    files = {name: file for name, file in list_files(folder).items() if name not in (MANIFEST, SUMS, PARITY)}
    targets = []
    for entry in manifest.targets:
        for name, component in entry.components.items():
            component = msgspec.structs.replace(component, files=component_files(component, files))
            entry = entry.with_component(name, component)
        targets.append(entry)
    return _write_manifest(folder, msgspec.structs.replace(manifest, files=files, targets=tuple(targets)))


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest, whose files are listed, and SHA256SUMS."""
    data = render_manifest(manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SUMS).write_bytes(render_sums(manifest, data))
    return manifest
