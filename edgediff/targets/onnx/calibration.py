"""Calibration: which values a graph's tensors take along whole trajectories.

The loop itself makes the trajectories, with torch behind it: steps with much and with little noise, full and cached
ones, rows with and without the condition. They begin from other noise than the reference that verification uses.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from edgediff.bundle.feed import groups
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import Recorded, reference_request, step_inputs
from edgediff.errors import VerificationError
from edgediff.targets.base import Int8Config, Job
from edgediff.targets.onnx.quantize import Range, observed_tensors
from edgediff_runtime.manifest import Graph

# Rows that go through a graph at once: what a large attention's memory allows.
ROWS = 2


@dataclass(frozen=True)
class Calibration:
    """What torch computed along the trajectories.

    Attributes:
        steps: Every step, with the tensors that the target's graphs take and give.
        floor_db: Least PSNR of each graph against torch on them before it is quantized.
    """

    steps: tuple[Recorded, ...]
    floor_db: float

    def runs(self, graph: Graph, most: int) -> list[dict[str, np.ndarray]]:
        """Inputs of a graph, some rows of them, from at most so many steps over the trajectories."""
        steps = [step for step in self.steps if graph.runs(step.full)]
        chosen = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(most, len(steps)))})]
        return [given for step in chosen for given in groups(step_inputs(step, graph), ROWS)]


def calibrate_for(job: Job) -> Calibration | None:
    """Runs the trajectories that ranges are measured along; None where the recipe asks for neither int8 nor fp16.

    They run at the bundle's clock, and at clock 1, as users will who compare. Random weights do not denoise: SD v1.5's
    geometry makes samples fourteen times as large in eight steps, and ranges with them, as no trained model does. Of
    such a model only a full and a cached step are run, the first two.
    """
    settings: Int8Config = job.config
    is_half = getattr(settings, "dtype", "fp32") == "fp16"
    if settings.quantize_nbits is None and not is_half:
        return None
    if is_half and job.pipe.manifest.evidence.verified != "full":
        # A very large model, of which no whole trajectory is run.
        return Calibration(job.reference.steps, job.verify.graph_db)
    pipe, graphs = job.pipe, job.target.unet.graphs
    point = pipe.manifest.operating_point
    wanted = {tensor.name for graph in graphs for tensor in (*graph.inputs, *graph.outputs)}
    request = reference_request(pipe.manifest, job.reference.conditioning) | {
        "num_images": settings.calibration_images,
        "seed": (int(point.seed) + 1) % 2**63,
    }
    always = (1,) * len(point.mask)
    clocks = dict.fromkeys((request["clock"], always))
    last = len(point.mask) - 1
    if pipe.manifest.source.random_weights is not None:
        last = min(last, 0 if clocks == {always: None} else 1)
        clocks = dict.fromkeys([(1, *(0 for _ in always[1:]))])
    total = len(clocks) * (last + 1)
    steps: list[Recorded] = []
    for clock in clocks:
        for step in pipe.stream(**{**request, "clock": clock}):
            tensors = {
                name: np.array(pipe.session.get(value)) for name, value in step.tensors[0].items() if name in wanted
            }
            steps.append(Recorded(step.index, step.full, tensors))
            job.say(f"calibrating in torch: step {len(steps)} of {total}")
            if step.index == last:
                break
    return Calibration(tuple(steps), job.verify.graph_db)


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
