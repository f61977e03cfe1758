"""int8 graphs: what is quantized, what stays, and how near the numbers are."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import Command, assert_error
from conftest import Export
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from seals import manifest_of, rows_of

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, step_inputs
from edgediff.errors import ConfigError, VerificationError
from edgediff.export.export_config import check_config, config_from
from edgediff.targets.calibration import Calibration
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.attention import decompose_attention
from edgediff.targets.onnx.measured_ranges import measure_ranges
from edgediff.targets.onnx.quantize import (
    affine,
    attended,
    observed_tensors,
    quantize,
    quantized_nodes,
    quantized_weight,
)
from edgediff.targets.onnx.separate_gates import separate_gates
from edgediff_runtime import EdgePipeline
from edgediff_runtime.ort_options import session_options

INT8 = OnnxConfig(quantize_nbits=8, calibration_images=2)
FLOAT = TensorProto.FLOAT


def block() -> ModelProto:
    """Convolutions of every kind and matmuls of every kind, 4 channels of 6x6."""
    rng = np.random.default_rng(0)
    sizes = {
        "first": (4, 3, 3, 3), "inner": (4, 4, 3, 3), "wider": (6, 4, 3, 3), "shortcut": (6, 4, 1, 1),
        "mixing": (6, 6, 1, 1), "apart": (6, 1, 3, 3), "last": (3, 6, 3, 3), "product": (6, 5), "words": (7, 5),
        "embedded": (5, 5),
    }  # fmt: skip
    weights = [numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), n) for n, size in sizes.items()]

    def conv(given: str, weight: str, made: str, **attributes: int) -> NodeProto:
        pad = sizes[weight][-1] // 2
        return helper.make_node("Conv", [given, weight], [made], weight, pads=[pad] * 4, **attributes)

    nodes = [
        conv("sample", "first", "a"),
        conv("a", "inner", "b"),
        conv("b", "wider", "d"),
        conv("a", "shortcut", "e"),
        helper.make_node("Add", ["d", "e"], ["f"]),
        conv("f", "mixing", "g"),
        conv("g", "apart", "h", group=6),
        conv("h", "last", "out_sample"),
        helper.make_node("Transpose", ["g"], ["i"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["i", "product"], ["j"], "product"),
        helper.make_node("MatMul", ["text", "words"], ["k"], "words"),
        helper.make_node("Gemm", ["emb", "embedded"], ["l"], "embedded"),
        helper.make_node("MatMul", ["j", "j_turned"], ["m"], "scores"),
        helper.make_node("Transpose", ["j"], ["j_turned"], perm=[0, 1, 3, 2]),
    ]
    nodes = [*nodes[:-2], nodes[-1], nodes[-2]]
    given = {"sample": ["batch", 3, 6, 6], "text": ["batch", 2, 7], "emb": ["batch", 5]}
    made = {"out_sample": given["sample"], "k": ["batch", 2, 5], "l": ["batch", 5], "m": ["batch", 6, 6, 6]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in given.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in made.items()],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model: ModelProto, feeds: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    options = session_options(int8=True)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"sample": (2, 3, 6, 6), "text": (2, 2, 7), "emb": (2, 5)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def extents(model: ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    names = observed_tensors(model)
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    have = {value.name for value in watched.graph.output}
    watched.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names if name not in have)
    return {name: (float(a.min()), float(a.max())) for name, a in run(watched, feeds, names).items()}


def test_the_ends_the_shortcuts_and_what_comes_from_outside_stay() -> None:
    assert [node.name for node in quantized_nodes(block())] == ["inner", "wider", "mixing", "product"]
    assert observed_tensors(block()) == ["a", "b", "f", "i", "d", "g"]


def test_the_ends_are_found_behind_what_scales_them() -> None:
    model = block()
    weights = {"two": 2.0, "one": 1.0}
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(value), name) for name, value in weights.items())
    model.graph.node[0].input[0] = "centered"
    (last,) = (node for node in model.graph.node if node.name == "last")
    last.output[0] = "unscaled"
    before = [
        helper.make_node("Mul", ["two", "sample"], ["doubled"]),
        helper.make_node("Sub", ["doubled", "one"], ["centered"]),
    ]
    after = [helper.make_node("Div", ["unscaled", "two"], ["out_sample"])]
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [node.name for node in quantized_nodes(model)] == ["inner", "wider", "mixing", "product"]


def test_it_rounds_around_the_operator_and_shares_what_is_there() -> None:
    model = block()
    done = quantize(model, extents(model, inputs()))
    onnx.checker.check_model(done, full_check=True)
    by_output = {name: node for node in done.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in done.graph.initializer}
    for node in done.graph.node:
        if node.name in ("inner", "wider", "mixing", "product"):
            around = [by_output[name].op_type for name in node.input[:2]]
            assert around == ["DequantizeLinear", "DequantizeLinear"], node.name
            assert weights[by_output[node.input[1]].input[0]].data_type == TensorProto.INT8
        if node.name in ("inner", "wider", "mixing"):
            (after,) = [other for other in done.graph.node if node.output[0] in other.input]
            assert after.op_type == "QuantizeLinear"
    # What one convolution leaves and the next one takes is rounded once.
    assert sum(node.op_type == "QuantizeLinear" for node in done.graph.node) == 6
    assert not {"inner", "wider", "mixing", "product"} & weights.keys()


def test_the_numbers_hold_and_what_stays_is_exact() -> None:
    model, feeds, names = block(), inputs(), ["out_sample", "k", "l", "m"]
    want = run(model, feeds, names)
    got = run(quantize(block(), extents(model, feeds)), feeds, names)
    assert np.array_equal(got["k"], want["k"])
    assert np.array_equal(got["l"], want["l"])
    for name in ("out_sample", "m"):
        assert 35 < psnr_db(want[name], got[name]) < 80, name


def attending() -> ModelProto:
    """One attention of 2 heads of 4 features over 5 keys, by 3 queries, and its keys taken a second time."""
    attention = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["a"], "attention", domain="com.microsoft", num_heads=2, scale=0.6
    )
    graph = helper.make_graph(
        [
            attention,
            helper.make_node("MatMul", ["a", "to_out"], ["out"]),
            helper.make_node("Identity", ["k"], ["kept"]),
        ],
        "g",
        [helper.make_tensor_value_info(name, FLOAT, ["batch", n, 8]) for name, n in (("q", 3), ("k", 5), ("v", 5))],
        [helper.make_tensor_value_info(name, FLOAT, ["batch", n, 8]) for name, n in (("out", 3), ("kept", 5))],
        [numpy_helper.from_array(np.random.default_rng(3).standard_normal((8, 8)).astype(np.float32), "to_out")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_attention_is_decomposed_and_its_matmuls_quantized() -> None:
    rng = np.random.default_rng(2)
    feeds = {name: rng.standard_normal((2, n, 8)).astype(np.float32) for name, n in (("q", 3), ("k", 5), ("v", 5))}
    want = run(attending(), feeds, ["out", "kept"])
    decomposed = decompose_attention(attending())
    kinds = ["Reshape", "Transpose"] * 3 + ["MatMul", "Mul", "Softmax", "MatMul", "Transpose", "Reshape"]
    assert [node.op_type for node in decomposed.graph.node] == [*kinds, "MatMul", "Identity"]
    assert psnr_db(want["out"], run(decomposed, feeds, ["out"])["out"]) > 110
    assert attended(decomposed) == {"a": ("a.q", "a.k", "a.v", "a.weights")}
    done = quantize(decomposed, extents(decomposed, feeds))
    onnx.checker.check_model(done)
    got = run(done, feeds, ["out", "kept"])
    assert 30 < psnr_db(want["out"], got["out"]) < 70
    assert np.array_equal(got["kept"], want["kept"])
    zeros = {t.name: numpy_helper.to_array(t) for t in done.graph.initializer if t.name.endswith("zero_point")}
    zeros_of_a = ("uint8", int(zeros["a.zero_point"]))
    # OpenVINO's kernel takes signed queries, keys and values, and unsigned weights.
    assert {name: (array.dtype.name, int(array.max())) for name, array in zeros.items()} == {
        "a.q.zero_point": ("int8", 0), "a.k.zero_point": ("int8", 0), "a.v.zero_point": ("int8", 0),
        "a.weights.zero_point": ("uint8", 0), "to_out.zero_point": ("int8", 0), "a.zero_point": zeros_of_a,
    }  # fmt: skip


def gated(sizes: tuple[int, ...] | None, axis: int = 2) -> ModelProto:
    """A product of 6 features whose halves are taken apart."""
    rng = np.random.default_rng(4)
    initializers = {"weight": rng.standard_normal((4, 6)), "bias": rng.standard_normal(6)}
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in initializers.items()]
    if sizes is not None:
        tensors.append(numpy_helper.from_array(np.array(sizes), "sizes"))
    cut = {"num_outputs": 2} if sizes is None else {}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Split", ["sum", *([] if sizes is None else ["sizes"])], ["a", "b"], axis=axis, **cut),
    ]
    ends = [helper.make_tensor_value_info(name, FLOAT, ["batch", None, None]) for name in ("a", "b")]
    given = [helper.make_tensor_value_info("x", FLOAT, ["batch", 2, 4])]
    graph = helper.make_graph(nodes, "g", given, ends, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize(
    ("sizes", "axis", "is_halved"),
    [(None, 2, True), ((3, 3), -1, True), ((2, 4), 2, False), (None, 1, False), ((1, 1), 1, False)],
)
def test_gates_are_products_of_their_own(sizes: tuple[int, ...] | None, axis: int, is_halved: bool) -> None:
    x = {"x": np.random.default_rng(5).standard_normal((2, 2, 4)).astype(np.float32)}
    want = run(gated(sizes, axis), x, ["a", "b"])
    done = separate_gates(gated(sizes, axis))
    kinds = [node.op_type for node in done.graph.node]
    assert kinds == (["MatMul", "Add"] * 2 if is_halved else ["MatMul", "Add", "Split"])
    assert ("weight" in {tensor.name for tensor in done.graph.initializer}) is not is_halved
    got = run(done, x, ["a", "b"])
    assert all(np.allclose(got[name], want[name], rtol=1e-6, atol=1e-6) for name in want)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (0.0, 1e-42)])
def test_a_range_is_covered_to_half_a_step(low: float, high: float) -> None:
    scale, zero = affine((low, high))
    values = np.linspace(low, high, 101)
    rounded = (np.clip(np.rint(values / scale) + int(zero), 0, 255) - int(zero)) * scale
    assert np.abs(rounded - values).max() <= 0.501 * scale + 1e-6
    assert scale > 0


def test_weights_are_rounded_by_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32) * np.array(
        [1e-3, 1, 50, 0], np.float32
    ).reshape(4, 1, 1, 1)
    for axis, given in ((0, weight), (1, np.moveaxis(weight, 0, 1))):
        rounded, scale = quantized_weight(given, axis)
        shape = [-1 if i == axis else 1 for i in range(4)]
        assert (np.abs(rounded * scale.reshape(shape) - given) <= 0.501 * scale.reshape(shape)).all()
        assert np.abs(rounded).max() == 127


@pytest.fixture(scope="module")
def quantized_bundle(class_model: Path, export_once: Export) -> Path:
    """The class model in int8, 4 steps at clock 2, as a pair."""
    path = export_once(class_model, edgediff.ExportConfig(steps=4, onnx=INT8))
    assert {row["floor_db"] for row in rows_of(path)} == {35.0, None}
    return path


def test_a_bundle_of_eight_bits_is_verified_and_runs(
    quantized_bundle: Path, class_bundle: Path, command: Command
) -> None:
    target = manifest_of(quantized_bundle).target("onnx")
    assert (target.unet.dtype, target.unet.layout) == ("int8", "pair")
    assert {tensor.dtype for graph in target.unet.graphs for tensor in graph.outputs} == {"float32"}
    kinds = {node.op_type for node in onnx.load(quantized_bundle / "onnx/unet/full.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "in int8 for ONNX" in (quantized_bundle / "README.md").read_text()
    said = command("verify", quantized_bundle)
    assert said.code == 0, said.err
    request = {"num_images": 2, "seed": 5}
    got, want = (EdgePipeline.from_pretrained(path)(**request).latents for path in (quantized_bundle, class_bundle))
    assert 30 < psnr_db(want, got) < 90


def test_weights_take_a_quarter(quantized_bundle: Path) -> None:
    model = onnx.load(quantized_bundle / "onnx/unet/full.onnx")
    kinds = {TensorProto.INT8: 0, FLOAT: 0}
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type in kinds:
            kinds[tensor.data_type] += int(np.prod(tensor.dims))
    assert kinds[TensorProto.INT8] > kinds[FLOAT]
    assert (quantized_bundle / "onnx/unet/weights.bin").stat().st_size < 2 * kinds[TensorProto.INT8] + 4 * kinds[FLOAT]


@pytest.mark.parametrize("name", ["highres_in", "lowres", "highres_out"])
def test_the_parts_are_quantized_apart_too(class_bundle: Path, name: str) -> None:
    graph = next(graph for graph in manifest_of(class_bundle).target("onnx").unet.graphs if graph.name == name)
    steps = load_reference(class_bundle / REFERENCE).steps
    path = class_bundle / f"onnx/unet/{name}.onnx"
    before = sorted(path.parent.iterdir())
    ranges = measure_ranges(path, graph, Calibration(steps, floor_db=100.0))
    assert sorted(path.parent.iterdir()) == before
    assert ranges.keys() == set(observed_tensors(onnx.load(path)))
    assert np.isfinite([*ranges.values()]).all()
    given = step_inputs(steps[0], graph)
    outputs = [tensor.name for tensor in graph.outputs]
    made = run(quantize(onnx.load(path), ranges), given, outputs)
    for output in outputs:
        assert psnr_db(steps[0].tensors[output], made[output]) > 35, output


def test_a_graph_that_is_wrong_before_it_is_quantized(class_bundle: Path) -> None:
    graph = manifest_of(class_bundle).target("onnx").unet.graphs[0]
    steps = load_reference(class_bundle / REFERENCE).steps
    before = sorted((class_bundle / "onnx/unet").iterdir())
    steps[-1].tensors["emb"][0, 0] += 0.1
    with pytest.raises(VerificationError, match=r"highres_in: before it is quantized, emb is \d+\.\d dB of torch's"):
        measure_ranges(class_bundle / "onnx/unet/highres_in.onnx", graph, Calibration(steps, floor_db=100.0))
    assert sorted((class_bundle / "onnx/unet").iterdir()) == before


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--quantize-nbits", 4), ("onnx.quantize_nbits",)),
        (("--quantize-nbits", 8, "--target", "coreml"), ("--quantize-nbits", "coreml")),
    ],
)
def test_other_widths_and_targets_are_refused(
    command: Command, class_model: Path, place: Path, args: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    assert_error(command("export", class_model, "-o", place / "bundle", *args), *parts)
    assert not (place / "bundle").exists()


def test_no_images_to_calibrate_with() -> None:
    with pytest.raises(ConfigError, match=r"onnx\.calibration_images.* is 0"):
        check_config(edgediff.ExportConfig(onnx=OnnxConfig(quantize_nbits=8, calibration_images=0)))


@pytest.mark.parametrize("lacks", [{}, {"quantize_nbits": 8, "opset": 22}])
def test_attention_alone_is_not_quantized(lacks: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"onnx\.quantize_attention' needs"):
        config_from({"onnx": {"quantize_attention": True, **lacks}})
