"""A small pipeline's component, written by a target for several sizes, and what torch computes in each."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from artefacts import saved_once
from pipelines import saved_tiny_vae
from tiny_pipelines import SAVE

import edgediff
from edgediff.models.components import pipeline_components
from edgediff.models.part import Part
from edgediff.targets import TARGETS
from edgediff.targets.base import ComponentJob, Sizes
from edgediff_runtime.manifest import Component, Graph


def written(target: str, name: str, further: tuple[tuple[int, int], ...], folder: Path) -> tuple[Component, Part]:
    """The component's entry, whose files lie in the folder, and its module."""
    model = edgediff.load_model(saved_once("sd1", SAVE["sd1"]), preview=saved_tiny_vae())
    component = pipeline_components(model)[name]
    form, config = TARGETS[target], edgediff.ExportConfig()
    entry = form.describe_component(
        component.stage, component.graph, config.verify, config.section(target), Sizes((16, 16), further, 2)
    )
    assert entry is not None
    part = component.load()
    job = ComponentJob(folder, name, entry, part, {}, component.config, None, lambda what: None)
    assert form.write_component(job) == entry
    return entry, part


def cases(entry: Component, part: Part) -> Iterator[tuple[Graph, np.ndarray, list[np.ndarray]]]:
    """Each graph of every size, an input of it, and torch's outputs."""
    rng = np.random.default_rng(0)
    for graph in entry.every_graph:
        (given,) = graph.inputs
        shape = tuple(map(int, given.shape))
        value = rng.integers(0, 500, shape) if "int" in given.dtype else rng.standard_normal(shape)
        value = value.astype(given.dtype)
        with torch.no_grad():
            wanted = part(torch.from_numpy(value))
        yield graph, value, [each.numpy() for each in wanted]
