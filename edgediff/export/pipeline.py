"""Export: a model goes in, a verified bundle comes out, or nothing does.

The manifest is drafted before any graph exists, since it is all that the runtime's loop needs: the reference
trajectory runs through the same pipeline as a device does, with torch behind it.
"""

import gc
import logging
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from edgediff.config import ExportConfig, check_config
from edgediff.errors import ConfigError, ModelError, TargetError, UnsupportedError, VerificationError
from edgediff.export.card import bundle_card
from edgediff.export.conditioning import Source, reference_conditioning
from edgediff.export.graphs import graph_list
from edgediff.export.onnx import write_onnx
from edgediff.export.place import check_place, clear_stale, staged
from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.load import Model, random_weights
from edgediff.models.macs import tally
from edgediff.models.sampling import scheduler_config
from edgediff.models.session import TorchSession
from edgediff.verify.files import check_files
from edgediff.verify.parity import ParityReport, verify_bundle
from edgediff.verify.psnr import psnr_db
from edgediff.verify.reference import REFERENCE, Reference, record, save_reference
from edgediff_runtime import BundleError, EdgePipeline, Manifest, clock_mask, open_bundle
from edgediff_runtime import manifest as m
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, render_sums, sha256_of
from edgediff_runtime.manifest import FORMAT_VERSION, render_manifest

log = logging.getLogger(__name__)

TOOLS = ("edgediff", "torch", "diffusers", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")
DEFAULT_GUIDANCE = {"none": 1.0, "class": 2.0, "text": 7.5}
Progress = Callable[[str], None]


class Exported(msgspec.Struct, frozen=True):
    """What became of an export.

    Attributes:
        path: The bundle.
        report: The verification; None where the bundle was there already.
    """

    path: Path
    report: ParityReport | None


def export_bundle(
    model: Model,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Exports a model as a verified bundle.

    What is already there, made from the same model by the same recipe and tools, and still valid, is left as it is.

    Args:
        model: What `load_model` gave.
        path: Where the bundle is to be.
        config: The recipe.
        force: Replace a bundle that is already there.
        progress: Told what is being done.

    Returns:
        Where the bundle is, and its verification.

    Raises:
        ConfigError: The recipe does not fit the model.
        ModelError: The model has no scheduler.
        UnsupportedError: The model cannot be cut or exported so.
        TargetError: Something is in the way, or the disk is full.
        VerificationError: A number did not hold; nothing was put in place.
    """
    say = progress if progress is not None else log.info
    config = check_config(ExportConfig() if config is None else config)
    path = Path(path)
    if config.random_weights is not None:
        if model.has_weights:
            raise ConfigError(f"random weights were asked for, but {model.name} has weights of its own")
        say("drawing random weights")
        model = random_weights(model, config.random_weights)
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights; pass --random-weights SEED to export it")
    if model.scheduler is None:
        raise ModelError(f"{model.path} has no scheduler/scheduler_config.json; a wrong schedule would give noise")
    say("dividing the UNet")
    divided = split(model.unet, config.cut)
    conditioning, conditioning_source = reference_conditioning(model.conditioning, config.conditioning, config.seed)
    draft = _draft(model, divided, config, conditioning_source)
    clear_stale(path)
    if _is_there(path, draft, say, force):
        return Exported(path, None)
    check_place(path, force)
    with staged(path) as folder:
        pipe = EdgePipeline(draft, TorchSession(divided))
        reference = record(pipe, conditioning, lambda i, n: say(f"reference trajectory in torch: step {i} of {n}"))
        say("holding the parts to the undivided UNet")
        _hold_to_undivided(model, divided, reference)
        manifest = _write_graphs(folder, draft, divided, reference, config, say)
        (folder / "evidence").mkdir()
        save_reference(reference, folder / REFERENCE)
        (folder / "README.md").write_text(bundle_card(manifest, model), encoding="utf-8")
        if model.card.license_text is not None:
            (folder / "LICENSE").write_text(model.card.license_text, encoding="utf-8")
        _seal(folder, manifest)
        source = model if draft.verified == "full" else None
        # What is verified without torch lets go of torch's weights first, also of those that the exporter's own cycles
        # hold: a large model is not in memory twice.
        del model, divided, pipe, reference
        gc.collect()
        report = verify_bundle(folder, source, progress=lambda what: say(f"verifying: {what}"))
        if not report.ok:
            raise VerificationError(_verdict(report), report)
    return Exported(path, report)


@torch.no_grad()
def _hold_to_undivided(model: Model, divided: SplitUNet, reference: Reference) -> None:
    """Runs the undivided UNet on the first step's rows: what the parts gave must be its output, bit for bit."""
    first = reference.steps[0].tensors
    tensors: dict[str, Any] = {name: torch.from_numpy(first[name]) for name in divided.inputs}
    added = {name: tensors.pop(name) for name in ("text_embeds", "time_ids") if name in tensors}
    if isinstance(model.unet, UNet2DConditionModel):
        tensors.setdefault("encoder_hidden_states", None)  # asked for, also where no layer looks at it
    whole = model.unet(**tensors, **({"added_cond_kwargs": added} if added else {}), return_dict=False)[0]
    if not np.array_equal(whole.numpy(), first["out_sample"]):
        number = psnr_db(whole.numpy(), first["out_sample"])
        raise VerificationError(f"the divided UNet is not the undivided one: out_sample is {number:.1f} dB of it")


def _draft(model: Model, divided: SplitUNet, config: ExportConfig, conditioning_source: Source) -> Manifest:
    """The manifest before any file exists."""
    counts = tally(divided, model.sample_shape, model.conditioning.tensors)
    known = model.conditioning
    guidance = DEFAULT_GUIDANCE[known.kind] if config.guidance_scale is None else config.guidance_scale
    if known.kind == "class" and known.null_label is None and config.guidance_scale is None:
        guidance = 1.0
    channels, height, width = model.sample_shape
    if model.unet.config.out_channels != channels:
        raise UnsupportedError(
            f"the UNet takes {channels} channels and gives {model.unet.config.out_channels}; supported: as many "
            "out as in (no inpainting, no learned variance)"
        )
    floors = config.verify
    graphs = graph_list(divided, model)
    # As the manifest's JSON gives it back, so that the two can be compared.
    recipe = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(config, model=None)))
    file_hash = sha256_of(Path(config.conditioning)) if config.conditioning is not None else None
    return Manifest(
        format_version=FORMAT_VERSION,
        generator=f"edgediff {version('edgediff')}",
        source=m.Source(
            name=model.name,
            path=None if model.is_built_in else str(model.path),
            sha256=model.sha256,
            random_weights=config.random_weights,
        ),
        license=model.card.license if config.license is None else config.license,
        cut=m.Cut(level=config.cut.level, point=config.cut.point),
        adaptor=config.adaptor,
        sample=m.Sample(channels=channels, height=height, width=width, space=model.space),
        conditioning=m.Conditioning(
            kind=known.kind,
            labels=known.labels,
            null_label=known.null_label,
            source=conditioning_source,
            sha256=file_hash,
        ),
        scheduler=scheduler_config(model.scheduler, config.scheduler),
        operating_point=m.OperatingPoint(
            num_inference_steps=config.steps,
            clock=config.clock,
            mask=tuple(int(full) for full in clock_mask(config.clock, config.steps)),
            guidance_scale=guidance,
            seed=config.seed,
            num_images=1 if known.kind == "text" else 2,
        ),
        verified=config.verify.mode,
        floors=m.Floors(
            graph=floors.graph_db,
            composed=floors.composed_db,
            trajectory=floors.trajectory_db,
            caching=floors.caching_db,
        ),
        cost=counts.parts,
        cache_bytes=counts.cache_elements * torch.float32.itemsize,
        targets=(
            m.Target(
                target="onnx", layout="split", dtype=config.onnx.dtype, batch=None,
                opset=config.onnx.opset, ir_version=0, graphs=graphs,
            ),
        ),
        config=recipe,
        versions={tool: version(tool) for tool in TOOLS},
        files={},
    )  # fmt: skip


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
    same = _essence(bundle.manifest) == _essence(draft)
    if same:
        say(f"{path} is already there, made from the same model by the same recipe, and valid: nothing to export")
    return same


def _essence(manifest: Manifest) -> Manifest:
    """What two exports must share to be the same: all but what writing fills in, and where the source lies."""
    targets = tuple(
        msgspec.structs.replace(
            target,
            ir_version=0,
            graphs=tuple(msgspec.structs.replace(g, external_data=None, simplified="") for g in target.graphs),
        )
        for target in manifest.targets
    )
    source = msgspec.structs.replace(manifest.source, path=None)
    return msgspec.structs.replace(manifest, source=source, targets=targets, files={})


def _write_graphs(
    folder: Path,
    draft: Manifest,
    divided: SplitUNet,
    reference: Reference,
    config: ExportConfig,
    say: Progress,
) -> Manifest:
    """Writes every graph that has a file, and the manifest's target with it."""
    target = draft.targets[0]
    (folder / "onnx").mkdir()
    graphs = []
    written = []
    for graph in target.graphs:
        if graph.file is not None:
            say(f"exporting {graph.name} to ONNX")
            inputs = _example(reference, graph)
            done = write_onnx(divided.parts[graph.name], graph, inputs, folder / graph.file, config.onnx)
            external = None if done.external_data is None else f"onnx/{done.external_data}"
            graph = msgspec.structs.replace(graph, external_data=external, simplified=done.simplified)
            written.append(done)
        graphs.append(graph)
    made = msgspec.structs.replace(
        target,
        opset=written[0].opset,
        ir_version=written[0].ir_version,
        graphs=tuple(graphs),
    )
    return msgspec.structs.replace(draft, targets=(made,))


def _example(reference: Reference, graph: m.Graph) -> dict[str, np.ndarray]:
    """Real inputs of a graph: from the first recorded step in which it runs."""
    for step in reference.steps:
        if graph.runs(step.full):
            return {tensor.name: step.tensors[tensor.name] for tensor in graph.inputs}
    raise ConfigError(f"the clock never runs {graph.name}")


def _seal(folder: Path, manifest: Manifest) -> None:
    """Lists every file in the manifest and writes SHA256SUMS."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in found]
    files = {
        name: m.File(size=file.stat().st_size, sha256=sha256_of(file))
        for name, file in zip(names, found, strict=True)
        if name not in (MANIFEST, SUMS, PARITY)
    }
    manifest = msgspec.structs.replace(manifest, files=files)
    data = render_manifest(manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SUMS).write_bytes(render_sums(manifest, data))


def _verdict(report: ParityReport) -> str:
    """The worst row that does not hold, in one line."""
    failed = [row for row in report.rows if row.ok is False]
    if not failed:
        return "verification measured too little to judge; nothing was put in place"
    worst = min(failed, key=lambda row: -math.inf if row.psnr_db is None else row.psnr_db)
    number = "not finite" if worst.psnr_db is None else f"{worst.psnr_db} dB"
    return (
        f"{len(failed)} of {len(report.rows)} numbers do not hold, the worst: {worst.check} {worst.part} "
        f"({worst.output}, {worst.backend}) is {number}, asked for {worst.floor_db} dB; nothing was put in place"
    )
