import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from edgediff.cli.render.tables import placement_table
from edgediff.errors import MissingExtraError, ProgramError
from edgediff.inspect import placement
from edgediff.inspect.placement import (  # fmt: skip
    GRAPH,
    MLPROGRAM,
    NEURALNETWORK,
    NNAPI,
    RULES,
    Note,
    lint,
    lint_bundle,
)
from edgediff.mil.coremltools_quiet import import_coremltools, quiet
from edgediff.targets import TARGETS
from edgediff.targets.coreml.mil_operations import read_mlprogram
from edgediff.targets.onnx.onnx_operations import read_onnx
from edgediff.targets.operations import Op, Value
from edgediff_runtime import open_bundle

X = (2, 8, 32, 32)
Graph = Callable[[Path], tuple[Note, ...]]


# Small graphs


def lint_onnx(path: Path) -> tuple[Note, ...]:
    return lint(read_onnx(path), "onnx", path.stem)


def lint_mlprogram(path: Path, function: str | None = None) -> tuple[Note, ...]:
    return lint(read_mlprogram(path, function), "coreml", function or path.stem)


def onnx_graph(
    op: str,
    *shapes: tuple,
    dtype: int = TensorProto.FLOAT,
    constants: tuple = (),
    external: bool = False,
    **attributes: Any,
) -> Graph:
    """Writes and lints a graph of one operation: inputs of these shapes, then these constants."""

    def made(folder: Path) -> tuple[Note, ...]:
        tensors = [numpy_helper.from_array(value, f"c{i}") for i, value in enumerate(constants)]
        if external:
            tensors[0].ClearField("raw_data")
            tensors[0].data_location = TensorProto.EXTERNAL
            for key, value in (("location", "gone.bin"), ("length", "3000000")):
                tensors[0].external_data.add(key=key, value=value)
        inputs = [helper.make_tensor_value_info(f"x{i}", dtype, shape) for i, shape in enumerate(shapes)]
        node = helper.make_node(op, [t.name for t in (*inputs, *tensors)], ["y"], "it", **attributes)
        output = helper.make_tensor_value_info("y", dtype, None)
        graph = helper.make_graph([node], "g", inputs, [output], tensors)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "g.onnx"
        )
        return lint_onnx(folder / "g.onnx")

    return made


def program(folder: Path, build: Callable[..., Any], *inputs: tuple[tuple[int, ...], str]) -> Path:
    """Saves an ML Program of inputs of these shapes and dtypes."""
    ct = import_coremltools("a test")
    with quiet():
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import types

        specs = [mb.TensorSpec(shape, dtype=getattr(types, dtype)) for shape, dtype in inputs]
        names = ", ".join(f"x{i}" for i in range(len(inputs)))
        # coremltools names a program's inputs after the function's parameters.
        body = eval(f"lambda {names}: build(mb, {names})", {"build": build, "mb": mb})
        made = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(body)
        converted = ct.convert(
            made,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        converted.save(str(folder / "p.mlpackage"))
    return folder / "p.mlpackage"


def mil_graph(build: Callable[..., Any], *inputs: tuple[tuple[int, ...], str], change: Any = None) -> Graph:
    def made(folder: Path) -> tuple[Note, ...]:
        path = program(folder, build, *inputs)
        if change:
            change(path)
        return lint_mlprogram(path)

    return made


def ranged(path: Path) -> None:
    """Lets the first axis of the first input be 1 to 4."""
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    spec = import_coremltools("a test").proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    sizes = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    for n in X:
        sizes.add(lowerBound=n, upperBound=n)
    file.write_bytes(spec.SerializeToString())


def weighing(size: int) -> Callable[[Path], None]:
    """A sparse file of weights: nothing may read it."""

    def change(path: Path) -> None:
        folder = path / "Data/com.apple.CoreML/weights"
        folder.mkdir(exist_ok=True)
        (folder / "weight.bin").touch()
        os.truncate(folder / "weight.bin", size)

    return change


def attention(length: int) -> Graph:
    def build(mb: Any, x: Any) -> Any:
        return mb.scaled_dot_product_attention(query=x, key=x, value=x)

    return mil_graph(build, ((2, 8, length, 64), "fp16"))


def linear(*leading: int) -> Graph:
    return mil_graph(lambda mb, x: mb.linear(x=x, weight=np.ones((4, 32), np.float16)), ((*leading, 32), "fp16"))


def square(*shape: int, dtype: str = "fp16", change: Any = None) -> Graph:
    return mil_graph(lambda mb, x: mb.square(x=x), (shape, dtype), change=change)


def signature(op: str, shape: tuple[int, ...]) -> Graph:
    """Lints one operation, as it is read from a .tflite file."""
    value = Value("x", "float32", shape)
    return lambda folder: lint([Op(op, "y", {"0": value}, (value,))], "litert", "full")


WEIGHT, PADS = np.ones((8, 8), np.float32), np.array([0, 0, 1, 1, 0, 0, 1, 1])
SIZES, ONES = np.array([2, 8, 32, 32]), np.ones(8, np.float32)
gather = mil_graph(lambda mb, x, i: mb.gather(x=x, indices=i, axis=0), ((5, 32), "fp16"), ((2,), "uint16"))
add32 = mil_graph(lambda mb, x: mb.add(x=x, y=np.int32(1)), ((32,), "int32"))

# rule -> a graph that has the fault, one that has not
CASES: dict[str, tuple[Graph, Graph]] = {
    "ane-flexible-shape": (square(*X, change=ranged), square(*X)),
    "ane-float32": (square(*X, dtype="fp32"), mil_graph(lambda mb, x: mb.cast(x=x, dtype="fp32"), (X, "fp16"))),
    "ane-int32": (add32, mil_graph(lambda mb, x: mb.reduce_mean(x=x, axes=[1]), (X, "fp16"))),
    "ane-gather": (gather, square(*X)),
    "ane-sin-cos": (mil_graph(lambda mb, x: mb.cos(x=x), (X, "fp16")), square(*X)),
    "ane-small-attention": (attention(1024), attention(2048)),
    "ane-4d": (linear(2, 16), linear(2)),
    "ane-padding": (square(2, 8, 16, 16), square(2, 16)),
    "ane-phone-weights": (square(*X, change=weighing(10**9)), square(*X, change=weighing(10**9 - 1))),
    "ane-large-program": (square(*X, change=weighing(667_000_000)), square(*X, change=weighing(1000))),
    "coreml-ep-op": (onnx_graph("Expand", X, constants=(SIZES,)), onnx_graph("Tile", X, constants=(SIZES // SIZES,))),
    "coreml-ep-batch-norm": (
        onnx_graph("BatchNormalization", (2, 8, 16), constants=(ONES, ONES, ONES, ONES)),
        onnx_graph("BatchNormalization", (2, 8, 4, 4), constants=(ONES, ONES, ONES, ONES)),
    ),
    "coreml-ep-format": (onnx_graph("Sin", X), onnx_graph("Sqrt", X)),
    "coreml-ep-pad": (
        onnx_graph("Pad", X, constants=(PADS,), mode="reflect"),
        onnx_graph("Pad", X, constants=(PADS,), mode="constant"),
    ),
    "coreml-ep-external-data": (
        onnx_graph("Gemm", (2, 8), constants=(WEIGHT,), external=True),
        onnx_graph("Gemm", (2, 8), constants=(WEIGHT,)),
    ),
    "nnapi-ep-dynamic": (onnx_graph("Sqrt", ("batch", *X[1:])), onnx_graph("Sqrt", X)),
    "nnapi-ep-op": (onnx_graph("Cos", X), onnx_graph("Sin", X)),
    "xnnpack-ep-gemm-rows": (
        onnx_graph("Gemm", ("batch", 8), constants=(WEIGHT,)),
        onnx_graph("Gemm", (2, 8), constants=(WEIGHT,)),
    ),
    "litert-gpu-op": (signature("BROADCAST_TO", X), signature("MUL", X)),
    "litert-gpu-rank": (signature("ADD", (1, *X)), signature("ADD", X)),
    "litert-qualcomm-op": (signature("RFFT2D", X), signature("SIN", X)),
    "litert-mediatek-op": (signature("SIN", X), signature("GELU", X)),
}


# The table


def test_every_rule_is_tested() -> None:
    assert list(CASES) == [rule.id for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_says_who_says_so(rule: placement.Rule) -> None:
    assert re.fullmatch(r"https://[\w.-]+/\S+", rule.source)
    assert rule.title
    assert rule.rewrite
    assert re.match("documented|observed|answered", rule.says)
    assert rule.id.startswith(f"{rule.where}-")


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_fires_on_its_fault_and_on_nothing_else(rule: str, tmp_path: Path) -> None:
    faulty, sound = CASES[rule]
    (note,) = [note for note in faulty(tmp_path) if note.rule.id == rule]
    assert sum(note.ops.values()) >= 1
    assert len(note.names) >= 1
    assert [note.rule.id for note in sound(tmp_path) if note.rule.id == rule] == []


def test_the_other_ways_to_hit_a_rule(tmp_path: Path) -> None:
    found = {note.rule.id: note for note in square(2, 4, 2, 32, 32)(tmp_path)}
    assert found["ane-4d"].ops == {"input": 1, "output": 1, "square": 1}
    assert found["ane-4d"].details == ("2 x 4 x 2 x 32 x 32 float16",)
    padded = {note.rule.id: note for note in square(2, 8, 16, 16)(tmp_path)}["ane-padding"]
    assert padded.details == ("2 x 8 x 16 x 16 float16: 32 bytes become 64",)


def test_the_lists_are_those_that_onnxruntime_carries() -> None:
    folder = Path(onnxruntime.__file__).parent / "tools/mobile_helpers"
    for file, ours in (
        ("coreml_supported_neuralnetwork_ops.md", NEURALNETWORK),
        ("coreml_supported_mlprogram_ops.md", MLPROGRAM),
        ("nnapi_supported_ops.md", NNAPI - GRAPH),
    ):
        # The lists write ArgMax in two ways, and one name with a dot.
        theirs = set(re.findall(r"^\|(?:ai\.onnx[:.])?([\w.:]+)\|", (folder / file).read_text(), re.MULTILINE))
        assert {name.replace("Argmax", "ArgMax") for name in theirs - {"Operator"}} == ours


def test_onnxruntime_expands_group_normalization_into_what_nnapi_does_not_take(tmp_path: Path) -> None:
    scale = np.ones(8, np.float32)
    onnx_graph("GroupNormalization", X, constants=(scale, scale), num_groups=2)(tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that the saved graph suits this machine only
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "g.onnx", options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx")
    assert {node.op_type for node in model.graph.node} - NNAPI == {"Shape"}


# Notes


def test_notes_count_by_type_and_name_the_first_three(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        for _ in range(4):
            x = mb.cos(x=x)
        return mb.sin(x=x, name="last")

    notes = mil_graph(build, (X, "fp16"))(tmp_path)
    (note,) = [note for note in notes if note.rule.id == "ane-sin-cos"]
    assert (note.target, note.graph) == ("coreml", "p")
    assert list(note.ops.items()) == [("cos", 4), ("sin", 1)]
    assert len(note.names) == 3
    assert "last" not in note.names


def test_notes_are_plain_data_and_a_table(tmp_path: Path) -> None:
    (note,) = [note for note in CASES["nnapi-ep-op"][0](tmp_path) if note.rule.id == "nnapi-ep-op"]
    plain = json.loads(json.dumps(note.to_dict()))
    assert plain["rule"] == "nnapi-ep-op"
    assert plain["where"] == "nnapi-ep"
    assert (plain["target"], plain["graph"]) == ("onnx", "g")
    assert plain["ops"] == {"Cos": 1}
    assert plain["names"] == ["it"]
    assert plain["source"] == note.rule.source
    console = Console(width=400)
    with console.capture() as shown:
        console.print(placement_table([note]))
    assert all(word in shown.get() for word in ("nnapi-ep-op", "g: 1 Cos", note.rule.says, note.rule.source))
    assert placement_table([]).row_count == 0


def test_shapes_are_inferred_where_a_graph_has_none(tmp_path: Path) -> None:
    (note,) = [note for note in CASES["xnnpack-ep-gemm-rows"][0](tmp_path) if note.rule.id == "xnnpack-ep-gemm-rows"]
    assert note.details == ("batch x 8 float32",)


# Files


def test_a_function_of_a_package_is_named(tmp_path: Path) -> None:
    path = program(tmp_path, lambda mb, x: mb.cos(x=x), (X, "fp16"))
    assert {note.graph for note in lint_mlprogram(path, "main")} == {"main"}
    with pytest.raises(ProgramError, match=r"no function 'cached'; it has: main"):
        lint_mlprogram(path, "cached")


def test_a_bundle_is_looked_at_graph_by_graph(class_bundle: Path) -> None:
    manifest = open_bundle(class_bundle).manifest
    notes = lint_bundle(class_bundle)
    assert [note.graph for note in notes if note.rule.id == "nnapi-ep-dynamic"] == [
        graph.name for target in manifest.targets for graph in target.unet.graphs if graph.file is not None
    ]
    assert {note.target for note in notes} == {"onnx"}


def test_a_bundles_packages_are_checked_before_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = program(tmp_path, lambda mb, x: mb.cos(x=x), (X, "fp16"))
    weighing(10**9)(path)
    graphs = [
        SimpleNamespace(name="adaptor", file=None, function=None),
        SimpleNamespace(name="full", file="p.mlpackage", function="main"),
    ]
    checked: list[str] = []
    manifest = SimpleNamespace(targets=[SimpleNamespace(target="coreml", unet=SimpleNamespace(graphs=graphs))])
    bundle = SimpleNamespace(path=tmp_path, manifest=manifest, folder=checked.append)
    monkeypatch.setattr(placement, "open_bundle", lambda path: bundle)
    notes = lint_bundle("somewhere")
    assert {(note.target, note.graph) for note in notes} == {("coreml", "full")}
    assert checked == ["p.mlpackage"]
    (path / "Manifest.json").write_text('{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "x"}}}')
    with pytest.raises(ProgramError, match="the root model x is missing"):
        lint_bundle("somewhere")


@pytest.mark.parametrize(
    ("package", "target", "module"),
    [("onnx", "onnx", "onnx.onnx_operations"), ("coremltools", "coreml", "coreml.mil_operations")],
)
def test_missing_packages_are_named(
    package: str, target: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"edgediff.targets.{module}")
    (tmp_path / "Manifest.json").write_text(
        '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "model.mlmodel"}}}'
    )
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data/model.mlmodel").touch()
    bundle = SimpleNamespace(path=tmp_path, file=lambda name: tmp_path / name, folder=lambda name: set())
    with pytest.raises(MissingExtraError, match="'export' extra"):
        TARGETS[target].operations(bundle, SimpleNamespace(file=".", function=None))


def test_the_table_is_read_without_any_toolchain() -> None:
    program = "import sys, edgediff.inspect.placement; print({'torch', 'onnx', 'coremltools'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "set()", done.stderr
