"""Ranges of an exported graph's tensors along a calibration's trajectories."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from edgediff.bundle.feed import groups
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import step_inputs
from edgediff.errors import VerificationError
from edgediff.targets.calibration import ROWS, Calibration
from edgediff.targets.onnx.quantize import Range, observed_tensors
from edgediff_runtime.manifest import Graph


def measure_ranges(path: Path, graph: Graph, calibration: Calibration) -> dict[str, Range]:
    """Runs an exported graph over the calibration: lowest and highest value of each tensor that quantization needs.

    Raises:
        VerificationError: The graph itself is not what torch computed.
    """
    model = onnx.load(path, load_external_data=False)
    names = observed_tensors(model)
    watched = path.with_name(f".watched-{path.name}")
    try:
        watched.write_bytes(_watching(model, names).SerializeToString())
        session = open_graph(os.fspath(watched))
    finally:
        watched.unlink(missing_ok=True)
    outputs = [tensor.name for tensor in graph.outputs]
    lows, highs = [f"{name}.lowest" for name in names], [f"{name}.highest" for name in names]
    found: list[np.ndarray] = []
    for step in calibration.steps:
        if graph.runs(step.full):
            wanted = groups({name: step.tensors[name] for name in outputs}, ROWS)
            for given, want in zip(groups(step_inputs(step, graph), ROWS), wanted, strict=True):
                made = session.run([*outputs, *lows, *highs], given)
                _check_graph(graph, dict(zip(outputs, made, strict=False)), want, calibration.floor_db)
                found.append(np.array(made[len(outputs) :]).reshape(2, -1))
    ends = np.array(found)
    return {
        name: (float(low), float(high))
        for name, low, high in zip(names, ends[:, 0].min(axis=0), ends[:, 1].max(axis=0), strict=True)
    }


def _watching(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Adds each tensor's lowest and highest value to a graph's outputs."""
    for name in names:
        for op, end in (("ReduceMin", "lowest"), ("ReduceMax", "highest")):
            model.graph.node.append(helper.make_node(op, [name], [f"{name}.{end}"], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(f"{name}.{end}", TensorProto.FLOAT, []))
    return model


def open_graph(model: str | bytes, optimized: bool = True) -> Any:
    """Opens a graph, by its path or its bytes, in ONNX Runtime, to be run a few times.

    One with thousands of outputs is to be opened unoptimized: for SDXL's UNet optimizing it took more than 3 minutes.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    # Weights in fewer bits are made when the graph is opened: ONNX Runtime would round what they are multiplied with.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _check_graph(graph: Graph, made: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], floor_db: float) -> None:
    for name, value in want.items():
        number = psnr_db(value, made[name])
        if not number >= floor_db:
            raise VerificationError(
                f"{graph.name}: before it is quantized, {name} is {number:.1f} dB of torch's; expected {floor_db} dB"
            )
