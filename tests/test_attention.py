"""Attention that takes the heads apart itself: where the pass fires, where it does not, and that the numbers hold."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Export
from onnx import ModelProto, TensorProto, helper, numpy_helper

import edgediff
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.attention import CONTRIB, MANY_KEYS, fuse_attention, slice_attention
from edgediff_runtime import EdgePipeline

HEADS, WIDTH = 2, 4
FEATURES = HEADS * WIDTH
FIRST = [0, 2, 1, 3]


def attending(
    tokens: int = 6,
    keys: int | str | None = 6,
    *,
    opset: int = 23,
    perm: list[int] = FIRST,
    mask: bool = False,
    **said: Any,
) -> ModelProto:
    """Attention as torch's exporter writes it: heads taken apart before, put together after.

    Keys may be of any number, under a name or None.
    """
    nodes, values, weights = [], [], []
    for name, source, length in (("q", "x", tokens), ("k", "text", keys), ("v", "text", keys)):
        rows = np.random.default_rng(len(weights)).standard_normal((FEATURES, FEATURES)).astype(np.float32)
        weights.append(numpy_helper.from_array(rows, f"{name}_weight"))
        fixed = isinstance(length, int)
        apart = np.array([-1, length, HEADS, WIDTH] if fixed else [0, 0, HEADS, WIDTH], np.int64)
        weights.append(numpy_helper.from_array(apart, f"{name}_apart_shape"))
        nodes += [
            helper.make_node("MatMul", [source, f"{name}_weight"], [name]),
            helper.make_node("Reshape", [name, f"{name}_apart_shape"], [f"{name}_apart"], allowzero=int(fixed)),
            helper.make_node("Transpose", [f"{name}_apart"], [f"{name}_heads"], perm=perm),
        ]
        values += [tensor(name, length, FEATURES), tensor(f"{name}_apart", length, HEADS, WIDTH)]
    given = ["q_heads", "k_heads", "v_heads"]
    if mask:
        assert isinstance(keys, int)
        weights.append(numpy_helper.from_array(np.linspace(-3, 0, keys, dtype=np.float32)[None], "mask"))
        given.append("mask")
    weights.append(numpy_helper.from_array(np.array([-1, tokens, FEATURES], np.int64), "rows_shape"))
    nodes += [
        helper.make_node("Attention", given, ["attended"], **({"is_causal": 0, "softcap": 0.0} | said)),
        helper.make_node("Transpose", ["attended"], ["rows"], perm=perm),
        helper.make_node("Reshape", ["rows", "rows_shape"], ["out"], allowzero=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", tokens, FEATURES), tensor("text", keys, FEATURES)],
        [tensor("out", tokens, FEATURES)],
        weights,
        value_info=values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def tensor(name: str, *sizes: int | str | None) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sizes])


def run(model: ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(7)
    feeds = {
        value.name: rng.standard_normal([size if isinstance(size, int) else 2 for size in value.shape]).astype(
            np.float32
        )
        for value in session.get_inputs()
    }
    (out,) = session.run(None, feeds)
    return np.asarray(out)


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(":".join(filter(None, (node.domain, node.op_type))) for node in model.graph.node)


@pytest.mark.parametrize(
    ("tokens", "keys", "operator"),
    [
        (6, 6, "Attention"),
        (6, 3, "Attention"),  # over text
        (6, "tokens", "Attention"),  # of any length
        (4, MANY_KEYS, f"{CONTRIB}:MultiHeadAttention"),
    ],
)
def test_heads_are_the_operators_own_business(tokens: int, keys: int | str, operator: str) -> None:
    model = attending(tokens, keys)
    want = run(model)
    fused = fuse_attention(model)
    assert kinds(fused) == {"MatMul": 3, operator: 1}
    onnx.checker.check_model(fused)
    said = {each.name: helper.get_attribute_value(each) for each in fused.graph.node[-1].attribute}
    assert said.pop("scale", 0.5) == 0.5  # of heads that are 4 wide
    assert set(said.values()) == {HEADS}
    np.testing.assert_allclose(run(fused), want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    "otherwise",
    [{"mask": True}, {"scale": 0.25}, {"softcap": 2.0}, {"is_causal": 1}, {"perm": [0, 2, 3, 1]}, {"keys": None}],
    ids=["mask", "scale", "softcap", "causal", "another order", "keys without a name"],
)
def test_what_is_more_than_plain_attention_stays(otherwise: dict[str, Any]) -> None:
    model = attending(**otherwise)
    assert kinds(fuse_attention(model)) == kinds(model)


def test_heads_that_are_not_the_last_dimension_taken_apart_stay() -> None:
    model = attending()
    shapes = {each.name: each for each in model.graph.value_info}
    shapes["q_apart"].CopyFrom(tensor("q_apart", FEATURES, HEADS, 3))  # as if rows were mixed with tokens
    assert kinds(fuse_attention(model)) == kinds(model)
    del model.graph.value_info[:]  # nothing is known of any shape
    assert kinds(fuse_attention(model)) == kinds(model)


def test_an_exported_graph_has_attention_whole(class_bundle: Path) -> None:
    """Portable graphs, of an earlier operator set, have it decomposed."""
    lowres = onnx.load(class_bundle / "onnx/unet/lowres.onnx")
    assert kinds(lowres).keys() & {"Attention", "Softmax"} == {"Attention"}
    node = next(node for node in lowres.graph.node if node.op_type == "Attention")
    assert "q_num_heads" in {each.name for each in node.attribute}


@pytest.mark.long
def test_the_operator_that_goes_block_by_block_goes_through_an_export(class_model: Path, export_once: Export) -> None:
    few = {"edgediff.targets.onnx.attention.MANY_KEYS": 1}
    bundle = export_once(class_model, edgediff.ExportConfig(steps=2), few)
    for name in ("full", "cached"):
        found = kinds(onnx.load(bundle / f"onnx/unet/{name}.onnx"))
        assert f"{CONTRIB}:MultiHeadAttention" in found or name == "cached"
        assert "Attention" not in found
    pytest.importorskip("openvino")
    results = [EdgePipeline.from_pretrained(bundle, backend=name)(seed=1) for name in ("onnxruntime", "openvino")]
    assert np.abs(results[0].latents - results[1].latents).max() < 1e-3


def scored(queries: int = 8, heads: int = 2, mask: bool = False) -> ModelProto:
    """Attention as two matmuls and a softmax, as torch's exporter writes it for earlier operator sets."""
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        *([helper.make_node("Add", ["scores", "mask"], ["masked"])] if mask else []),
        helper.make_node("Softmax", ["masked" if mask else "scores"], ["weights"], "weights", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"], "mixed"),
        helper.make_node("Relu", ["mixed"], ["out"], "out"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("q", heads, queries, WIDTH), tensor("k", heads, WIDTH, 6), tensor("v", heads, 6, WIDTH)],
        [tensor("out", heads, queries, WIDTH)],
        [numpy_helper.from_array(np.linspace(-3, 0, 6, dtype=np.float32), "mask")],
        value_info=[tensor("scores", heads, queries, 6), tensor("weights", heads, queries, 6)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# Scores of one image take 2 heads x 8 queries x 6 keys x 4 bytes = 384.
@pytest.mark.parametrize(("most", "slices"), [(400, 1), (384, 1), (200, 2), (100, 4), (1, 8)])
def test_attention_is_computed_in_slices_of_queries(monkeypatch: pytest.MonkeyPatch, most: int, slices: int) -> None:
    monkeypatch.setattr("edgediff.targets.onnx.attention.SCORE_BYTES", most)
    want = run(scored())
    model = slice_attention(scored())
    onnx.checker.check_model(model)
    assert Counter(node.op_type for node in model.graph.node)["Softmax"] == slices
    assert np.abs(run(model) - want).max() < 1e-6  # another shape of a matmul may add in another order


@pytest.mark.parametrize("model", [scored(queries=9), scored(mask=True)])
def test_what_cannot_be_sliced_stays(monkeypatch: pytest.MonkeyPatch, model: ModelProto) -> None:
    monkeypatch.setattr("edgediff.targets.onnx.attention.SCORE_BYTES", 1)
    assert [node.op_type for node in slice_attention(model).graph.node].count("Softmax") == 1


@pytest.mark.long
def test_portable_graphs_have_slices_where_scores_are_many(
    class_model: Path, export_once: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = edgediff.ExportConfig(steps=2, onnx=OnnxConfig(portable=True))
    small = {"edgediff.targets.onnx.attention.SCORE_BYTES": 2**8}
    count = {}
    for name, changes in (("whole", {}), ("sliced", small)):
        path = export_once(class_model, config, changes)
        model = onnx.load(path / "onnx/unet/lowres.onnx", load_external_data=False)
        count[name] = Counter(node.op_type for node in model.graph.node)
    assert count["sliced"]["Softmax"] > count["whole"]["Softmax"] > 0
    assert "Attention" not in count["whole"]
    assert count["sliced"]["Split"] > count["whole"]["Split"]
