"""The survey of a model that is not yet a bundle."""

from typing import Any

import torch

from edgediff.config.choices import Cut
from edgediff.inspect.survey import Survey, check_batch
from edgediff.models.adaptors import make_adaptor
from edgediff.models.clockwork import split
from edgediff.models.components import PipelineComponent, pipeline_components
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model, load_model
from edgediff.models.macs import Tally, count, tally
from edgediff_runtime import clock_mask
from edgediff_runtime.manifest import GUIDANCE


def count_parts(model: Model, cut: Cut, adaptor: str | None = None) -> Tally:
    """Counts a model's parts at a cut, with a learned adaptor of a kind or, if None, the identity."""
    divided = split(model.unet, cut)
    if adaptor is not None:
        with torch.device("meta"):
            divided = split(model.unet, cut, make_adaptor(adaptor, adaptor_shape(divided, model)))
    return tally(divided, model.sample_shape, model.step_tensors)


def survey_model(
    source: str,
    level: int | None,
    point: str | None,
    clock: str | None,
    steps: int | None,
    batch: int | None,
    adaptor: str | None = None,
) -> Survey:
    """Counts a model's parts at a cut; weights are not needed.

    None takes level 1, the paper's point, clock 2, 8 steps, the identity adaptor, and a `batch` of 2 UNet rows where
    the model is guided.

    Raises:
        ModelError, UnsupportedError: The model cannot be read, or cannot be cut there.
        RequestError: Clock, steps or batch are out of range.
    """
    model = load_model(source)
    default = Cut()
    cut = Cut(default.level if level is None else level, default.point if point is None else point)
    counts = count_parts(model, cut, adaptor)
    clock = "2" if clock is None else clock
    guided = model.usual_guidance > 1 and GUIDANCE not in model.conditioning.tensors
    return Survey(
        name=model.name,
        cut=f"level {cut.level}, {cut.point}",
        cost=counts.parts,
        cache_bytes=4 * counts.cache_elements,
        clock=clock,
        mask=clock_mask(clock, 8 if steps is None else steps),
        batch=check_batch((2 if guided else 1) if batch is None else batch),
        components=tuple(_cost_of(component) for component in pipeline_components(model).values()),
    )


def _cost_of(component: PipelineComponent) -> dict[str, Any]:
    """What a component is and costs in one run, of one prompt or one image."""
    part = component.empty()
    with torch.device("meta"):
        inputs = {
            tensor.name: torch.empty([1, *tensor.shape[1:]], dtype=getattr(torch, tensor.dtype))  # type: ignore[list-item]
            for tensor in component.graph.inputs
        }
    _, cost = count(part, inputs)
    return {
        "component": component.name,
        "class": component.kind,
        "stage": component.stage,
        "parameters": cost.parameters,
        "gflops": 2e-9 * cost.macs,
        "gflops_attention": 2e-9 * cost.macs_attention,
    }
