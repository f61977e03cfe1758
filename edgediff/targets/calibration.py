"""Calibration: which values a graph's tensors take along whole trajectories.

The loop itself makes the trajectories, with torch behind it: steps with much and with little noise, full and cached
ones, rows with and without the condition. They begin from other noise than the reference that verification uses.
"""

from dataclasses import dataclass

import numpy as np

from edgediff.bundle.feed import groups
from edgediff.bundle.reference import Recorded, reference_request, step_inputs
from edgediff.targets.base import CalibratedConfig, Job
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

    def runs(self, graph: Graph, most: int | None = None, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
        """Inputs of a graph, so many rows of them, from at most so many steps over the trajectories; None: all."""
        steps = [step for step in self.steps if graph.runs(step.full)]
        count = len(steps) if most is None else min(most, len(steps))
        chosen = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, count)})]
        return [given for step in chosen for given in groups(step_inputs(step, graph), rows)]


def calibrate_for(job: Job) -> Calibration | None:
    """Runs the trajectories that ranges are measured along; None where the recipe asks for neither int8 nor fp16.

    They run at the bundle's clock, and at clock 1, as users will who compare. Random weights do not denoise: SD v1.5's
    geometry makes samples fourteen times as large in eight steps, and ranges with them, as no trained model does. Of
    such a model only a full and a cached step are run, the first two.
    """
    settings: CalibratedConfig = job.config
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
