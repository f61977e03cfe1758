"""How are graphs to be packed for ONNX Runtime? Four parts, a pair of whole steps, or one graph that branches.

``single`` is made here from a pair, to be measured: one file, one session, an ``If`` between the nodes of a full and of
a cached step, with the weights outside of both branches or, for ONNX Runtime to see them where it lays out constants
for its kernels, in each branch of its own. All of them run the recorded steps of the bundle and are held to them; each
in a process of its own, in turns.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from measure import machine
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from steps import Measured, Run, in_turns, measured, times

import edgediff
from edgediff.bundle.feed import run_step
from edgediff.bundle.reference import REFERENCE, Recorded, load_reference
from edgediff.config.floors import VerifyConfig
from edgediff_runtime import open_bundle, ort_session
from edgediff_runtime.manifest import SessionSettings
from edgediff_runtime.ort_options import session_options

STEPS = 8
BRANCHES = ("full", "cached")


def main() -> None:
    """Exports both layouts, makes the third, and measures all in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="grocery-32-student")
    parser.add_argument("--random-weights", type=int, help="seed, for a geometry without weights")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("split", "pair")}
        for name, folder in folders.items():
            config = edgediff.ExportConfig(
                adaptor="identity", layout=name, random_weights=given.random_weights, verify=VerifyConfig(mode="graphs")
            )
            edgediff.export_bundle(edgediff.load_model(given.model), folder, config)
        pair = folders["pair"]
        # Beside its weights, and not in the bundle, which takes no file that it does not list.
        single = Path(scratch) / "single"
        single.mkdir()
        weights = Path(shutil.copy(pair / "onnx" / "weights.bin", single))
        for name, inside in (("single", False), ("single, weights in each branch", True)):
            path = single / f"{inside}.onnx"
            path.write_bytes(branching(pair, inside).SerializeToString(deterministic=True))
            folders[name] = path
        sizes = {name: size(folder, weights) for name, folder in folders.items()}
        found = in_turns(folders, given.rounds, partial(measure, folders, pair))
    for name, runs in found.items():
        peak = median(run.peak_mib for run in runs)
        print(f"{name}: {times(runs)}, peak {peak:.0f} MiB, files {sizes[name] / 1e6:.2f} MB")


def size(path: Path, weights: Path) -> int:
    """Bytes of a layout's files."""
    if path.is_dir():
        return sum(file.stat().st_size for file in (path / "onnx").iterdir())
    return path.stat().st_size + weights.stat().st_size


def branching(pair: Path, inside: bool) -> ModelProto:
    """One graph of a pair's two: which branch runs is an input."""
    models = {name: onnx.load(pair / "onnx" / f"{name}.onnx", load_external_data=False) for name in BRANCHES}
    results = list(models["full"].graph.output)
    shared: dict[str, TensorProto] = {}
    graphs = {}
    for name, model in models.items():
        # A weight's place in the file tells what it is; the others are small.
        renamed = {tensor.name: f"{name}.{tensor.name}" for tensor in model.graph.initializer}
        for tensor in model.graph.initializer:
            if not inside and tensor.data_location == TensorProto.EXTERNAL:
                renamed[tensor.name] = ".".join(entry.value for entry in tensor.external_data) + str(list(tensor.dims))
            tensor.name = renamed[tensor.name]
            shared[tensor.name] = tensor
        outer = {value.name for value in model.graph.input}
        wanted = [value.name for value in model.graph.output]
        for node in model.graph.node:
            node.name = f"{name}.{node.name}"
            outside = renamed | {each: each for each in (*outer, "")}
            node.input[:] = [outside.get(each, f"{name}.{each}") for each in node.input]
            node.output[:] = [f"{name}.{each}" for each in node.output]
        if "lowres_feature" not in wanted:  # the identity adaptor's: the cache itself
            model.graph.node.append(helper.make_node("Identity", ["cache"], [f"{name}.lowres_feature"]))
        outputs = [called(f"{name}.{value.name}", value) for value in results]
        own = [tensor for key, tensor in shared.items() if inside and key.startswith(f"{name}.")]
        graphs[name] = helper.make_graph(list(model.graph.node), name, [], outputs, own)
    chosen = helper.make_node(
        "If", ["is_full"], [value.name for value in results], then_branch=graphs["full"], else_branch=graphs["cached"]
    )
    inputs = {value.name: value for name in BRANCHES for value in models[name].graph.input}
    graph = helper.make_graph(
        [chosen], "single", [helper.make_tensor_value_info("is_full", TensorProto.BOOL, []), *inputs.values()], results,
        [] if inside else list(shared.values()),
    )  # fmt: skip
    first = models["full"]
    sets = {entry.domain: entry for model in models.values() for entry in model.opset_import}
    return helper.make_model(graph, opset_imports=list(sets.values()), ir_version=first.ir_version)


def called(name: str, value: ValueInfoProto) -> ValueInfoProto:
    """The same tensor under another name."""
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def measure(folders: dict[str, Path], pair: Path, name: str) -> Measured:
    """A layout, on the steps that the pair has recorded."""
    reference = load_reference(open_bundle(pair).file(REFERENCE))
    return measured(lambda: opened(folders[name]), reference, STEPS)


def opened(path: Path) -> Run:
    """A way to run a step: of a bundle's graphs, or of one that branches. All threads share a graph."""
    if path.is_file():
        single = ort.InferenceSession(path, session_options(SessionSettings()), providers=["CPUExecutionProvider"])
        names = [value.name for value in single.get_inputs()]

        def branch(step: Recorded) -> np.ndarray:
            # Both branches' inputs must be there: a full step has a cache that nobody looks at.
            given = {**step.tensors, "is_full": np.array(step.full)}
            given.setdefault("cache", step.tensors["lowres_feature"])
            return single.run(["out_sample"], {name: given[name] for name in names})[0]

        return branch
    bundle = open_bundle(path)
    ort_session.APART_BYTES = 0  # as the graph of both branches, all threads share it
    session = ort_session.OrtSession(bundle)
    wanted = ("out_sample",)
    return lambda step: run_step(session, step, session.graphs, wanted)["out_sample"]


if __name__ == "__main__":
    main()
