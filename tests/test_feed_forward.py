"""Feed-forwards in slices of tokens: where the pass fires, where it does not, and that the numbers hold."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnxruntime as ort
import pytest
from conftest import Export
from onnx import ModelProto, TensorProto, helper, numpy_helper

import edgediff
from edgediff.targets.onnx.feed_forward import slice_feed_forwards
from edgediff_runtime import EdgePipeline

TOKENS, FEATURES, INSIDE = 12, 4, 16


def feeding(*, as_gemm: bool = True, axis: int = 2, shown: str = "", activation: str = "Gelu") -> ModelProto:
    """A gated feed-forward as onnxsim leaves it (`as_gemm`), or as the exporter does; `shown` is an output too."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((FEATURES, 2 * INSIDE)), "b": rng.standard_normal(2 * INSIDE),
        "v": rng.standard_normal((INSIDE, FEATURES)), "c": rng.standard_normal(FEATURES), "one": np.ones(FEATURES),
    }  # fmt: skip
    shapes = {
        "rows_in": [-1, FEATURES], "wide": [-1, TOKENS, 2 * INSIDE],
        "rows_inside": [-1, INSIDE], "narrow": [-1, TOKENS, FEATURES],
    }  # fmt: skip

    def linear(x: str, w: str, b: str, rows: str, shape: str, out: str) -> list[Any]:
        if as_gemm:
            return [
                helper.make_node("Reshape", [x, rows], [f"{out}.rows"]),
                helper.make_node("Gemm", [f"{out}.rows", w, b], [f"{out}.made"]),
                helper.make_node("Reshape", [f"{out}.made", shape], [out]),
            ]
        return [helper.make_node("MatMul", [x, w], [f"{out}.made"]), helper.make_node("Add", [f"{out}.made", b], [out])]

    nodes = [
        helper.make_node("LayerNormalization", ["x", "one"], ["n"]),
        *linear("n", "w", "b", "rows_in", "wide", "h"),
        helper.make_node("Split", ["h"], ["value", "gate"], axis=axis, num_outputs=2),
        helper.make_node(activation, ["gate"], ["opened"]),
        helper.make_node("Mul", ["value", "opened"], ["m"]),
        *linear("m", "v", "c", "rows_inside", "narrow", "f"),
        helper.make_node("Add", ["f", "x"], ["y"]),
    ]
    known = {"n": FEATURES, "h": 2 * INSIDE, "value": INSIDE, "gate": INSIDE, "m": INSIDE, "f": FEATURES}
    if not as_gemm:
        known |= {"h.made": 2 * INSIDE, "f.made": FEATURES}
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", FEATURES)],
        [tensor("y", FEATURES), *([tensor(shown, known[shown])] if shown else [])],
        [
            *(numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()),
            *(numpy_helper.from_array(np.array(value), name) for name, value in shapes.items()),
        ],
        value_info=[tensor(name, size) for name, size in known.items() if name != shown],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tensor(name: str, features: int) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", TOKENS, features])


def run(model: ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, TOKENS, FEATURES)).astype(np.float32)
    return np.asarray(session.run(["y"], {"x": x})[0])


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of what the feed-forward holds; twelve tokens are cut in four, there being no third of a power of two."""
    monkeypatch.setattr("edgediff.targets.onnx.feed_forward.SLICE_BYTES", 4 * TOKENS * 2 * INSIDE // 3)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("as_gemm", [True, False])
@pytest.mark.parametrize("axis", [2, -1])
def test_slices_make_the_same_numbers(as_gemm: bool, axis: int) -> None:
    model = feeding(as_gemm=as_gemm, axis=axis)
    want = run(model)
    sliced = slice_feed_forwards(model)
    onnx.checker.check_model(sliced, full_check=True)
    found = kinds(sliced)
    assert (found["Gelu"], found["Gemm"] + found["MatMul"], found["Concat"]) == (4, 12, 1)
    assert found["LayerNormalization"] == 1
    # The tokens are cut, and each half of the weight and of the bias is; nothing that is computed is.
    assert [node.input[0] for node in sliced.graph.node if node.op_type == "Split"] == ["w", "b", "n"]
    # Rows of a product do not look at each other; libraries may add in another order for fewer of them.
    np.testing.assert_allclose(run(sliced), want, atol=1e-6 * np.abs(want).max())


@pytest.mark.usefixtures("small_slices")
def test_files_keep_the_weights_and_the_loader_cuts_them(tmp_path: Path) -> None:
    before = {tensor.name: tensor.SerializeToString() for tensor in feeding().graph.initializer}
    sliced = slice_feed_forwards(feeding())
    kept = {tensor.name: tensor.SerializeToString() for tensor in sliced.graph.initializer}
    assert {name: kept[name] for name in "wbvc"} == {name: before[name] for name in "wbvc"}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(sliced.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert kinds(onnx.load(tmp_path / "loaded.onnx"))["Split"] == 1


@pytest.mark.usefixtures("small_slices")
def test_a_weight_of_two_feed_forwards_is_cut_once() -> None:
    model = feeding()
    second = feeding()
    onnx.compose.add_prefix(second, "second.", rename_initializers=False, inplace=True)
    for node in second.graph.node:
        node.input[:] = ["y" if name == "second.x" else name for name in node.input]
    model.graph.node.extend(second.graph.node)
    model.graph.value_info.extend(second.graph.value_info)
    model.graph.output[0].name = "second.y"
    model.graph.value_info.append(tensor("y", FEATURES))
    sliced = slice_feed_forwards(model)
    onnx.checker.check_model(sliced, full_check=True)
    assert [node.input[0] for node in sliced.graph.node if node.op_type == "Split"] == ["w", "b", "n", "second.n"]


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    "otherwise",
    [{"shown": "h"}, {"shown": "m"}, {"axis": 1}, {"activation": "Sigmoid"}],
    ids=["what goes in is seen", "what is in between is seen", "cut along the tokens", "another gate"],
)
def test_what_is_no_gated_feed_forward_of_its_own_stays(otherwise: dict[str, Any]) -> None:
    model = feeding(**otherwise)
    before = model.SerializeToString(deterministic=True)
    assert slice_feed_forwards(model).SerializeToString(deterministic=True) == before


def _first_product(model: ModelProto) -> Any:
    return next(node for node in model.graph.node if node.op_type == "Gemm")


def _turn(model: ModelProto) -> None:
    _first_product(model).attribute.append(helper.make_attribute("transB", 1))


def _add_what_is_computed(model: ModelProto) -> None:
    _first_product(model).input[2] = "x"


def _add_one_number(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "number"))
    _first_product(model).input[2] = "number"


def _cut_in_thirds(model: ModelProto) -> None:
    for value in model.graph.value_info:
        if value.name in ("value", "gate"):
            value.type.tensor_type.shape.dim[2].dim_value = 2 * INSIDE // 3


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("change", [_turn, _add_what_is_computed, _add_one_number, _cut_in_thirds])
def test_a_product_that_has_no_halves_stays(change: Callable[[ModelProto], None]) -> None:
    model = feeding()
    change(model)
    before = model.SerializeToString(deterministic=True)
    assert slice_feed_forwards(model).SerializeToString(deterministic=True) == before


def test_what_holds_little_stays() -> None:
    model = feeding()
    before = model.SerializeToString(deterministic=True)
    assert slice_feed_forwards(model).SerializeToString(deterministic=True) == before


@pytest.mark.long
def test_they_go_through_an_export(text_model: Path, export_once: Export) -> None:
    sliced = {"edgediff.targets.onnx.feed_forward.SLICE_BYTES": 1024}
    bundle = export_once(text_model, edgediff.ExportConfig(steps=4, layout="split"), sliced)
    for path in (bundle / "onnx/unet").glob("*.onnx"):
        graph = onnx.load(path).graph
        weights = {tensor.name for tensor in graph.initializer}
        cut = [node.input[0] for node in graph.node if node.op_type == "Split" and node.input[0] in weights]
        assert len(cut) == 2 * sum("ff.net.0.proj.bias" in name for name in weights) > 0
    pytest.importorskip("openvino")
    text = np.random.default_rng(2).standard_normal((1, 7, 12)).astype(np.float32)
    pipes = [EdgePipeline.from_pretrained(bundle, backend=name) for name in ("onnxruntime", "openvino")]
    results = [pipe(prompt_embeds=text, guidance_scale=1, seed=1) for pipe in pipes]
    assert np.abs(results[0].latents - results[1].latents).max() < 1e-3
