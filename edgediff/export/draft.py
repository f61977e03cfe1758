"""The manifest before any file exists: all that the runtime's loop needs to know of a bundle."""

from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from edgediff.errors import UnsupportedError
from edgediff.export.export_config import ExportConfig, layout_of
from edgediff.export.reference_conditioning import Source
from edgediff.models.clockwork import SplitUNet
from edgediff.models.conditioning import usual_guidance
from edgediff.models.graphs import graph_list
from edgediff.models.load import Model
from edgediff.models.macs import tally
from edgediff.models.sampling import scheduler_config
from edgediff.targets.configs import Target, opset_of
from edgediff.targets.layout import coreml_graphs, executorch_graphs, onnx_graphs, openvino_graphs
from edgediff.targets.onnx.shared_rows import with_shared_rows
from edgediff_runtime import Manifest, clock_mask
from edgediff_runtime import manifest as m
from edgediff_runtime.bundle import sha256_of
from edgediff_runtime.manifest_json import FORMAT_VERSION

TOOLS = ("edgediff", "torch", "diffusers", "numpy")
TOOLS_OF_TARGET: dict[Target, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxsim", "onnxruntime"),
    "coreml": ("coremltools",),
    "executorch": ("executorch",),
    "openvino": ("onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino"),
}


def operating_point(model: Model, config: ExportConfig) -> m.TrainedFor:
    """The operating point of a recipe, as an adaptor would have been trained for it.

    Args:
        model: What is exported.
        config: The recipe.

    Returns:
        Steps, sampler, clock and guidance.
    """
    return m.TrainedFor(
        num_inference_steps=config.steps,
        scheduler=config.scheduler,
        clock=config.clock,
        mask=tuple(map(int, clock_mask(config.clock, config.steps))),
        guidance_scale=usual_guidance(model.conditioning) if config.guidance_scale is None else config.guidance_scale,
    )


def draft_manifest(
    model: Model,
    divided: SplitUNet,
    config: ExportConfig,
    conditioning_source: Source,
    adaptor: m.Adaptor | None = None,
) -> Manifest:
    """Drafts the manifest of a bundle.

    Args:
        model: What is exported.
        divided: Its divided UNet.
        config: The recipe.
        conditioning_source: Where the reference's conditioning comes from.
        adaptor: What stands in for lowres; the identity if None.

    Returns:
        The manifest without files and without what only writing the graphs can tell.

    Raises:
        UnsupportedError: The UNet's output or its cut is not handled.
        ModelError: Its scheduler cannot be carried over.
    """
    counts = tally(divided, model.sample_shape, model.conditioning.tensors)
    known = model.conditioning
    point = operating_point(model, config)
    channels, height, width = model.sample_shape
    if model.unet.config.out_channels != channels:
        raise UnsupportedError(
            f"the UNet takes {channels} channels and gives {model.unet.config.out_channels}; supported: as many "
            "out as in (no inpainting, no learned variance)"
        )
    assert model.scheduler is not None
    # As the manifest's JSON gives it back, so that the two can be compared.
    recipe = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(config, model=None)))
    file_hash = sha256_of(Path(config.conditioning)) if config.conditioning is not None else None
    tools = dict.fromkeys((*TOOLS, *(tool for target in config.targets for tool in TOOLS_OF_TARGET[target])))
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
        adaptor=m.Adaptor(kind="identity") if adaptor is None else adaptor,
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
            mask=point.mask,
            guidance_scale=point.guidance_scale,
            seed=config.seed,
            num_images=1 if known.kind == "text" else 2,
        ),
        verified=config.verify.mode,
        cost=counts.parts,
        cache_bytes=counts.cache_elements * torch.float32.itemsize,
        targets=_targets(model, divided, config, guided=point.guidance_scale > 1),
        config=recipe,
        versions={tool: version(tool) for tool in tools},
        files={},
    )


def _targets(model: Model, divided: SplitUNet, config: ExportConfig, guided: bool) -> tuple[m.Target, ...]:
    parts = graph_list(divided, model)
    usual = 2 if guided else 1  # the rows of one image
    targets = []
    for name in config.targets:
        if name == "onnx":
            dtype = config.onnx.dtype if config.onnx.quantize_nbits is None else "int8"
            target = m.Target(
                target="onnx", layout=layout_of(config, "onnx"), dtype=dtype, batch=None,
                floors=_floors(config, dtype), graphs=onnx_graphs(parts, divided, layout_of(config, "onnx")),
                opset=opset_of(config.onnx), ir_version=0,
            )  # fmt: skip
        elif name == "coreml":
            batch = usual if config.coreml.batch is None else config.coreml.batch
            target = m.Target(
                target="coreml", layout=layout_of(config, "coreml"), dtype=config.coreml.dtype, batch=batch,
                floors=_floors(config, config.coreml.dtype), graphs=coreml_graphs(parts, divided, layout_of(config, "coreml"), batch, config.coreml.dtype),  # noqa: E501
                deployment_target=config.coreml.deployment_target, specification_version=0,
            )  # fmt: skip
        elif name == "openvino":
            dtype = "fp32" if config.openvino.quantize_nbits is None else "int8"
            target = m.Target(
                target="openvino", layout=layout_of(config, "openvino"), dtype=dtype, batch=None,
                floors=_floors(config, dtype), graphs=openvino_graphs(parts, divided, layout_of(config, "openvino")),
            )  # fmt: skip
        else:
            batch = usual if config.executorch.batch is None else config.executorch.batch
            target = m.Target(
                target="executorch", layout=layout_of(config, "executorch"), dtype="fp32", batch=batch,
                floors=_floors(config, "fp32"), graphs=executorch_graphs(parts, divided, layout_of(config, "executorch"), batch),  # noqa: E501
            )  # fmt: skip
        targets.append(target)
    return tuple(targets)


def _floors(config: ExportConfig, dtype: str) -> m.Floors:
    floors, half, int8 = config.verify, config.verify.fp16, config.verify.int8
    if dtype == "int8":
        return m.Floors(
            graph=int8.graph_db, composed=int8.composed_db, trajectory=int8.trajectory_db, caching=floors.caching_db
        )
    if dtype == "fp16":
        return m.Floors(
            graph=half.graph_db, composed=half.composed_db, trajectory=half.trajectory_db, caching=floors.caching_db,
            program=half.program_db,
        )  # fmt: skip
    return m.Floors(
        graph=floors.graph_db, composed=floors.composed_db, trajectory=floors.trajectory_db, caching=floors.caching_db
    )


def essence(manifest: Manifest) -> Manifest:
    """Leaves what two exports must share to be the same.

    Args:
        manifest: A draft, or what a finished bundle has.

    Returns:
        The manifest without what writing fills in, and without where the source lies.
    """
    targets = tuple(
        msgspec.structs.replace(
            target,
            ir_version=None,
            session=None,
            specification_version=None,
            graphs=tuple(
                msgspec.structs.replace(with_shared_rows(g), external_data=None, simplified="") for g in target.graphs
            ),
        )
        for target in manifest.targets
    )
    source = msgspec.structs.replace(manifest.source, path=None)
    adaptor = msgspec.structs.replace(manifest.adaptor, path=None)
    return msgspec.structs.replace(manifest, source=source, adaptor=adaptor, targets=targets, files={})
