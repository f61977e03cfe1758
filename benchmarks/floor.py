"""How near is a step to what its own operations take, each alone? A graph of a bundle in ONNX Runtime.

Every operation that computes something is run by itself, on inputs of its own shapes and in the same settings; their
times, added up, are what the graph would take if nothing had to be moved in between and no operation met a cache that
the one before it filled. What only moves (reshapes, splits, transposes) counts as nothing. The bar: a cached step is
within 5 % of that.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx
import onnxruntime as ort
from cores import APART_NS, WORDS, recorded, two_cores
from measure import machine, spread
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgediff.bench.wording import number
from edgediff_runtime import open_bundle
from edgediff_runtime.manifest import SessionSettings
from edgediff_runtime.ort_options import session_options

BAR = 1.05
MOVES = ("Reshape", "Transpose", "Split", "Concat", "Slice", "Unsqueeze", "Squeeze", "Expand", "Shape", "Gather",
         "Cast", "Identity", "DepthToSpace", "Resize", "Tile")  # fmt: skip
# Constants of more numbers than this are weights: their values do not matter to the time, and need not be read.
VALUES = 64


def main() -> None:
    """Times the graph and its operations in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graph", default="cached")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--guided", action="store_true", help="two rows for each image that was recorded with one")
    parser.add_argument("--apart-ns", type=float, default=APART_NS, help="see cores.py")
    given = parser.parse_args()
    print(machine())
    bundle = open_bundle(given.bundle)
    graph = next(graph for graph in bundle.manifest.target("onnx").graphs if graph.name == given.graph)
    feeds = recorded(bundle, graph, given.guided)
    path = given.bundle / str(graph.file)
    alone = operations(path, {name: array.shape for name, array in feeds.items()})
    whole = session(path)
    ways = {key: (session(model.SerializeToString()), inputs_of(model)) for key, (model, _) in alone.items()}
    taken: dict[bool, dict[str, list[float]]] = {kind: {key: [] for key in ["", *ways]} for kind in WORDS}
    with two_cores(given.apart_ns) as cores:
        for _ in range(given.rounds):
            for key, (runner, inputs) in [("", (whole, feeds)), *ways.items()]:
                before = cores.share()
                runner.run(None, inputs)  # what is timed finds the memory as it left it itself
                start = perf_counter()
                runner.run(None, inputs)
                ms = 1e3 * (perf_counter() - start)
                if cores.share() == before:
                    taken[before][key].append(ms)
    for kind, times in taken.items():
        print(f"{WORDS[kind]}:")
        if missed := sum(not ms for ms in times.values()):
            print(f"  {missed} of {len(times)} were never timed so")
        else:
            steps_ms = times.pop("")
            report(graph.name, steps_ms, {key: (median(ms), alone[key][1]) for key, ms in times.items()})


def report(name: str, steps_ms: list[float], alone: dict[str, tuple[float, int]]) -> None:
    """Prints the operations by kind, and the graph beside their sum."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for key, (ms, count) in alone.items():
        kind = kinds[key.split()[0]]
        kind[0] += count
        kind[1] += count * ms
    for kind, (count, ms) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        print(f"  {kind:24} {count:4.0f} x, {ms:9.2f} ms")
    floor = sum(ms for _, ms in kinds.values())
    ratio = median(steps_ms) / floor
    print(f"{name}: {spread(steps_ms)} ms, its operations alone {number(floor)} ms: {ratio:.3f} "
          f"(bar: {BAR}) {'ok' if ratio <= BAR else 'MISSED'}")  # fmt: skip


def operations(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[ModelProto, int]]:
    """A model for each distinct operation of a graph, and how often the graph has it."""
    model = with_shapes(path, shapes)
    values = {value.name: value for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    fixed = set(constants)
    for node in model.graph.node:  # what is made of constants alone is made once
        if node.op_type != "Shape" and all(name in fixed for name in node.input if name):
            fixed |= set(node.output)
    counts: Counter[str] = Counter()
    made: dict[str, ModelProto] = {}
    for nodes in fused(model):
        if nodes[-1].op_type in MOVES or nodes[-1].output[0] in fixed:
            continue
        key, single = by_itself(nodes, model, values, constants, fixed)
        counts[key] += 1
        made.setdefault(key, single)
    return {key: (single, counts[key]) for key, single in made.items()}


def with_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> ModelProto:
    """The graph without its weights' values, for inputs of these shapes."""
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    del model.graph.value_info[:]
    count(model, shapes)
    while True:  # shapes behind ONNX Runtime's own operators, which make what they are asked, are told one by one
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        known = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
        untold = next((node for node in model.graph.node
                       if node.domain and node.output[0] not in known and node.input[0] in known), None)  # fmt: skip
        if untold is None:
            return model
        value = model.graph.value_info.add()
        value.CopyFrom(known[untold.input[0]])
        value.name = untold.output[0]


def count(model: ModelProto, shapes: dict[str, tuple[int, ...]]) -> None:
    """Makes constants of what the graph computes of its inputs' sizes, how often rows are repeated among it."""
    graph = model.graph
    known = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT64 and tensor.data_location != TensorProto.EXTERNAL
    }
    for node in list(graph.node):
        taken = shapes if node.op_type == "Shape" else known
        if node.op_type in ("Shape", "Div", "Concat") and all(name in taken for name in node.input):
            given = {name: known.get(name, np.empty(shapes.get(name, 0), np.float32)) for name in node.input}
            known[node.output[0]] = ReferenceEvaluator(node).run(None, given)[0]
            graph.initializer.append(numpy_helper.from_array(known[node.output[0]], node.output[0]))
            graph.node.remove(node)


def fused(model: ModelProto) -> Iterator[list[NodeProto]]:
    """The nodes, those together that ONNX Runtime computes as one: a sigmoid and the product with what it is of."""
    gates = {node.output[0]: node for node in model.graph.node if node.op_type == "Sigmoid"}
    silu = {
        node.output[0]: gates[name]
        for node in model.graph.node
        if node.op_type == "Mul"
        for name in node.input
        if name in gates and gates[name].input[0] in node.input
    }
    within = {gate.output[0] for gate in silu.values()}
    for node in model.graph.node:
        if node.output[0] not in within:
            yield [silu[node.output[0]], node] if node.output[0] in silu else [node]


def by_itself(
    nodes: list[NodeProto],
    model: ModelProto,
    values: dict[str, onnx.ValueInfoProto],
    constants: dict[str, TensorProto],
    fixed: set[str],
) -> tuple[str, ModelProto]:
    """A model of one operation, and what it has in common with others of its kind and shapes."""
    rng = np.random.default_rng(0)
    inside = {name for node in nodes for name in node.output}
    names = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in inside))
    inputs, weights, said = [], [], []
    for name in names:
        known = constants.get(name)
        if known is not None and int(np.prod(known.dims)) <= VALUES and known.data_location != TensorProto.EXTERNAL:
            weights.append(known)
            said.append(str(numpy_helper.to_array(known).tolist()) if known.data_type == TensorProto.INT64 else "")
            continue
        sizes = list(known.dims) if known is not None else [
            dim.dim_value for dim in values[name].type.tensor_type.shape.dim
        ]  # fmt: skip
        said.append("x".join(map(str, sizes)))
        if name in fixed:
            weights.append(numpy_helper.from_array(0.1 * rng.random(sizes, np.float32) + 0.01, name))
        else:
            inputs.append(values[name])
    attributes = sorted(str(attribute) for node in nodes for attribute in node.attribute)
    key = " ".join([nodes[-1].op_type if len(nodes) == 1 else "SiLU", *said, *attributes])
    outputs = [values[name] for name in nodes[-1].output]
    graph = helper.make_graph(nodes, "alone", inputs, outputs, weights)
    return key, helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def inputs_of(model: ModelProto) -> dict[str, np.ndarray]:
    """Random inputs of a model."""
    rng = np.random.default_rng(1)
    made = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        made[value.name] = rng.standard_normal(sizes).astype(dtype)
    return made


def session(model: Path | bytes) -> ort.InferenceSession:
    """As the runtime opens a graph that all threads share."""
    return ort.InferenceSession(model, session_options(SessionSettings()), providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
