"""OpenVINO's models (IR): the default ONNX graphs, read by OpenVINO and written in its own format.

Constraints that shaped this file:

- What makes ONNX Runtime's graphs faster makes OpenVINO's faster too, so they are the same (benchmarks/README.md).
- ``convert_model`` sends telemetry to OpenVINO's authors; reading a graph and writing it does not.
- Names that OpenVINO generates contain a counter of the process: two exports would differ.
- Its int8 kernels for processors without VNNI overflow unless weights have half the levels: a step of a small model is
  31.5 dB from fp32 with 127 levels and 43.3 dB with 63 (127 in float arithmetic: 43.5).
- A model in IR refers to its weights by their offset in a file that the reader is given: several models share one.
"""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import msgspec
import onnx

from edgediff.errors import UnsupportedError
from edgediff.extras import import_extra
from edgediff.models.clip_tokenizer import load_tokenizer
from edgediff.targets.base import ComponentJob, Job, Say, converter_errors, others_can_call
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.pool_weights import WeightFile
from edgediff.targets.onnx.quantize import HALVED_WEIGHT_LEVELS
from edgediff.targets.onnx.undivided_model import join_full_step, undivided_graph
from edgediff.targets.onnx.write_onnx import write_component as write_onnx_component
from edgediff.targets.onnx.write_onnx import write_onnx
from edgediff.targets.openvino import MODEL, WEIGHTS, OpenVinoConfig
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest import TIMESTEP, Graph, Tensor

# An operation with this note stays fp32 on a device that computes in fp16.
KEEPS_FP32 = "precise_0"


def write_openvino(job: Job) -> tuple[tuple[Graph, ...], Graph | None]:
    """Writes OpenVINO's models, the undivided step beside them, and the weights of all in one file.

    Returns:
        The graphs with what is known now, and the undivided step's entry; None with a ControlNet or low-rank factors,
        which no other tool hands to a UNet.

    Raises:
        UnsupportedError: The exporter, a pass or OpenVINO failed.
        VerificationError: A graph that is to be quantized is not what torch computed.
        MissingExtraError: OpenVINO is not installed.
    """
    openvino = import_extra("openvino", "exporting to OpenVINO", "openvino")
    config: OpenVinoConfig = job.config
    settings = OnnxConfig(
        dtype=config.dtype, quantize_nbits=config.quantize_nbits, quantize_attention=config.quantize_attention
    )
    folder, graphs = job.folder, job.target.unet.graphs
    with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as name:
        scratch = Path(name)
        as_onnx = [
            msgspec.structs.replace(graph, file=graph.file and f"{graph.name}.onnx", external_data=())
            for graph in graphs
        ]
        made, _ = write_onnx(job, scratch, as_onnx, settings, HALVED_WEIGHT_LEVELS)
        finished = tuple(
            msgspec.structs.replace(graph, inputs=done.inputs, simplified=done.simplified, kept_fp32=done.kept_fp32)
            for graph, done in zip(graphs, made, strict=True)
        )
        job.say("writing OpenVINO's models")
        files = {graph.name: str(graph.file) for graph in finished if graph.file is not None}
        shared = others_can_call(made)
        if shared:
            full = [onnx.load(scratch / str(g.file), load_external_data=False) for g in made if g.runs(full=True)]
            whole = join_full_step(full, "int64")
            (scratch / "undivided.onnx").write_bytes(whole.SerializeToString(deterministic=True))
            files["undivided"] = MODEL
        for graph_name, file in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _write(openvino, scratch / f"{graph_name}.onnx", folder / file, graph_name)
        pool_ir_weights([folder / file for file in files.values()], folder / WEIGHTS)
    if not shared:
        return finished, None
    steps = [graph for graph in finished if graph.runs(full=True)]
    return finished, undivided_graph(steps, MODEL, Tensor(TIMESTEP, "int64", (1,)))


def write_component(job: ComponentJob, graph: Graph) -> Graph:
    """Writes the model of a component beside the UNet, with its weights in a .bin of the same name.

    Raises:
        UnsupportedError: The exporter, a pass or OpenVINO failed.
        MissingExtraError: OpenVINO is not installed.
    """
    openvino = import_extra("openvino", "exporting to OpenVINO", "openvino")
    path = job.folder / str(graph.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".exporting-") as name:
        onnx_job = replace(job, folder=Path(name), config=OnnxConfig(dtype=job.config.dtype))
        made = write_onnx_component(onnx_job, msgspec.structs.replace(graph, file="model.onnx"))
        _write(openvino, Path(name) / "model.onnx", path, job.name)
    weights = str(PurePosixPath(str(graph.file)).with_suffix(".bin"))
    return msgspec.structs.replace(
        graph, external_data=(weights,), simplified=made.simplified, kept_fp32=made.kept_fp32
    )


def write_tokenizers(folder: Path, say: Say) -> None:
    """Writes each tokenizer of a pipeline's tree as a model of OpenVINO's, where openvino-tokenizers is installed."""
    tokenizers = sorted(folder.glob("tokenizer*/"))
    if tokenizers and find_spec("openvino_tokenizers") is None:
        say("openvino-tokenizers is not installed: the tokenizers that OpenVINO GenAI reads are left out")
        return
    for each in tokenizers:
        openvino = import_extra("openvino", "exporting to OpenVINO", "openvino")
        convert = import_extra("openvino_tokenizers", "exporting a tokenizer to OpenVINO", "openvino")
        with converter_errors(f"{each.name}: openvino_tokenizers"):
            model = convert.convert_tokenizer(load_tokenizer(each), with_detokenizer=False)
            _settle_names(model, each.name, every=True)
            model.inputs[0].get_tensor().set_names({"text"})
            openvino.save_model(model, each / "openvino_tokenizer.xml", compress_to_fp16=False)


def pool_ir_weights(models: Iterable[Path], weights: Path) -> None:
    """Moves the weights of .xml models, each in a .bin beside it, into one file; equal ones share a place."""
    pooled = weights.with_name(f"{weights.name}.pooled")
    with WeightFile(pooled, math.inf) as pool:
        for path in models:
            tree = ElementTree.parse(path)
            with path.with_suffix(".bin").open("rb") as own:
                for data in tree.iterfind(".//layer[@type='Const']/data"):
                    own.seek(int(data.attrib["offset"]))
                    _, offset, _ = pool.place(own.read(int(data.attrib["size"])))
                    data.set("offset", str(offset))
            path.with_suffix(".bin").unlink()
            tree.write(path, encoding="utf-8", xml_declaration=True)
    pooled.rename(weights)


def _settle_names(model: Any, name: str, every: bool = False) -> None:
    """Names the operations that have no name from the graph, or every one: generated names contain a counter."""
    model.set_friendly_name(name)
    for i, op in enumerate(model.get_ordered_ops()):
        if every or op.get_friendly_name() == op.get_name():
            op.set_friendly_name(f"{op.get_type_name()}.{i}")


def _keep_fp32(openvino: Any, model: Any) -> None:
    """Tells devices that compute in fp16 what of an fp16 model is fp32 on purpose."""
    ops = [op for op in model.get_ordered_ops() if op.get_type_name() not in ("Parameter", "Constant", "Result")]
    if any(port.get_element_type() == openvino.Type.f16 for op in ops for port in op.outputs()):
        for op in ops:
            if any(port.get_element_type() == openvino.Type.f32 for port in op.outputs()):
                op.get_rt_info()[KEEPS_FP32] = True


def _write(openvino: Any, source: Path, path: Path, name: str) -> None:
    """Reads an ONNX graph and writes it as IR, the same bytes for the same graph."""
    try:
        model = openvino.Core().read_model(source)
        _settle_names(model, name)
        _keep_fp32(openvino, model)
        notes = model.get_rt_info()
        for key in list(notes.keys()):  # onnxsim's statistics
            del notes[key]
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as e:  # all of OpenVINO's errors
        raise UnsupportedError(f"{name}: OpenVINO cannot write it: {one_line(e)}") from e
