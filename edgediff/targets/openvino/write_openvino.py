"""OpenVINO's models (IR): the default ONNX graphs, read by OpenVINO and written in its own format.

Constraints that shaped this file:

- What makes ONNX Runtime's graphs faster makes OpenVINO's faster too, so they are the same (benchmarks/README.md).
- ``convert_model`` tells OpenVINO's makers that it was used; reading a graph and writing it does not.
- Names that OpenVINO makes up count what the process has made so far: two exports would differ.
- In eight bits, its kernels for processors without VNNI overflow unless weights have half the levels: a step of a small
  model comes to 31.5 dB of fp32 with 127 of them and to 43.3 with 63 (127 in float arithmetic: 43.5).
- A model in IR reads the weights of its own file alone: two of them cannot share what they have in common.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgediff.errors import UnsupportedError
from edgediff.extras import import_extra
from edgediff.models.part import Part
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.calibration import Calibration
from edgediff.targets.onnx.quantize import HALVED_WEIGHT_LEVELS
from edgediff.targets.onnx.write_onnx import write_onnx
from edgediff.targets.openvino import OpenVinoConfig
from edgediff_runtime.manifest import Graph, Target


def write_openvino(
    folder: Path,
    target: Target,
    modules: Mapping[str, Part],
    examples: Mapping[str, Mapping[str, np.ndarray]],
    config: OpenVinoConfig,
    say: Callable[[str], None],
    calibration: Calibration | None = None,
) -> Target:
    """Writes every model of a target.

    Args:
        folder: The bundle that is being written.
        target: What the manifest's draft says of the target.
        modules: The modules by the names of their graphs.
        examples: Real inputs of each graph by name, for tracing and for the check of the simplified graph.
        config: How to write.
        say: Told what is being done.
        calibration: What graphs of eight bits are made by; None leaves them in fp32.

    Returns:
        The target with what is known now: what onnxsim did.

    Raises:
        UnsupportedError: The exporter, a pass or OpenVINO failed.
        VerificationError: A graph that is to be quantized is not what torch computed.
        MissingExtraError: OpenVINO is not installed.
    """
    openvino = import_extra("openvino", "exporting to OpenVINO", "openvino")
    settings = OnnxConfig(quantize_nbits=config.quantize_nbits, quantize_attention=config.quantize_attention)
    graphs = []
    for graph in target.graphs:
        if graph.file is not None:
            path = folder / graph.file
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as scratch:
                alone = msgspec.structs.replace(graph, file=f"onnx/{graph.name}.onnx", external_data=None)
                as_onnx = msgspec.structs.replace(target, layout="split", graphs=(alone,))
                done = write_onnx(
                    Path(scratch), as_onnx, modules, examples, settings, say, calibration, HALVED_WEIGHT_LEVELS
                )
                say(f"writing {graph.name} for OpenVINO")
                _write(openvino, Path(scratch) / str(alone.file), path, graph)
            graph = msgspec.structs.replace(graph, inputs=done.graphs[0].inputs, simplified=done.graphs[0].simplified)
        graphs.append(graph)
    return msgspec.structs.replace(target, graphs=tuple(graphs))


def _write(openvino: Any, source: Path, path: Path, graph: Graph) -> None:
    """Reads an ONNX graph and writes it as IR, the same bytes for the same graph."""
    try:
        model = openvino.Core().read_model(source)
        model.set_friendly_name(graph.name)
        for i, op in enumerate(model.get_ordered_ops()):
            if op.get_friendly_name() == op.get_name():  # it has none from the graph
                op.set_friendly_name(f"{op.get_type_name()}.{i}")
        notes = model.get_rt_info()
        for key in list(notes.keys()):  # onnxsim's account of what it did
            del notes[key]
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as e:  # what all of OpenVINO's errors are
        raise UnsupportedError(f"{graph.name}: OpenVINO cannot write it: {' '.join(str(e).split())[:400]}") from e
