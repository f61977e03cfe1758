"""The undivided step as one ONNX model, made of the graphs of a full step: what other ONNX tools open."""

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from edgediff_runtime.manifest import TIMESTEP, Graph, Tensor

OUTPUT = "out_sample"
_ROWS = f"{TIMESTEP}.rows"


def join_full_step(models: Sequence[ModelProto], timestep: Literal["float", "int64"] = "float") -> ModelProto:
    """Joins the graphs of a full step to one that takes what diffusers' UNet takes and gives `out_sample` alone.

    Args:
        models: In the order in which a step runs them; equal names of inputs and outputs are the same tensor. Weights
            may lie outside; they stay where they are.
        timestep: ``float`` takes a float32 scalar, as optimum hands it over; ``int64`` an int64 [1], as GenAI does.
    """
    joined = copy.deepcopy(models[0])
    graph = joined.graph
    del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:], graph.value_info[:]
    if timestep == "float":
        given = make_tensor_value_info(TIMESTEP, TensorProto.FLOAT, [])
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{_ROWS}.shape"))
        graph.node.append(make_node("Reshape", [TIMESTEP, f"{_ROWS}.shape"], [_ROWS], f"{_ROWS}.reshape"))
    else:
        given = make_tensor_value_info(TIMESTEP, TensorProto.INT64, [1])
        graph.node.append(make_node("Cast", [TIMESTEP], [_ROWS], f"{_ROWS}.cast", to=TensorProto.FLOAT))
    made: set[str] = set()
    for i, model in enumerate(models):
        part = _renamed(model, f"part{i}." if len(models) > 1 else "")
        for value in part.graph.input:
            known = {other.name for other in graph.input}
            if value.name == _ROWS:
                value = given
            if value.name not in made | known:
                graph.input.append(value)
        for field in ("node", "initializer", "value_info"):
            getattr(graph, field).extend(getattr(part.graph, field))
        made |= {value.name for value in part.graph.output}
        graph.output.extend(value for value in part.graph.output if value.name == OUTPUT)
    return joined


def undivided_graph(full: Sequence[Graph], file: str, timestep: Tensor) -> Graph:
    """The manifest's entry of that model, over the weights of its graphs."""
    made = {tensor.name for graph in full for tensor in graph.outputs}
    inputs = {tensor.name: tensor for graph in full for tensor in graph.inputs if tensor.name not in made}
    outputs = tuple(tensor for graph in full for tensor in graph.outputs if tensor.name == OUTPUT)
    weights = tuple(sorted({name for graph in full for name in graph.external_data}))
    return Graph("undivided", file, "step", tuple((inputs | {TIMESTEP: timestep}).values()), outputs, weights)


def _renamed(model: ModelProto, prefix: str) -> ModelProto:
    """A copy whose inner names have a prefix, and which takes its timestep from the joined model's."""
    model = copy.deepcopy(model)
    outer = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}

    def new(name: str) -> str:
        return _ROWS if name == TIMESTEP else name if name in outer else f"{prefix}{name}"

    for node in model.graph.node:
        node.name = f"{prefix}{node.name}"
        node.input[:], node.output[:] = [new(name) for name in node.input], [new(name) for name in node.output]
    for value in (*model.graph.initializer, *model.graph.value_info, *model.graph.input):
        value.name = new(value.name)
    # Sizes that have a name of their own mean something else in each graph; those of inputs are the manifest's.
    shared = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    for value in model.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param not in shared:
                dim.dim_param = f"{prefix}{dim.dim_param}"
    return model
