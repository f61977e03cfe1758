"""Upsampling merged into convolutions, and Winograd's filtering of rows: where they fire, and that the numbers hold."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Export
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

import edgediff
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.upsampling import merge_upsampling
from edgediff.targets.onnx.winograd import CHANNELS, ROWS, TILE, filter_rows, sums_of_rows
from edgediff_runtime import EdgePipeline

NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
PLAIN = {"pads": [1, 1, 1, 1]}
MERGED = {"MatMul": 4, "Reshape": 4, "Conv": 4, "Concat": 1, "DepthToSpace": 1}
FILTERED = {"MatMul": 8, "Split": 1, "Conv": 6, "Concat": 1}


def convolving(
    size: tuple[int, int, int], outputs: int, *, scales: list[float] | None = None, bias: bool = True, kernel: int = 3,
    resize: dict[str, str] = NEAREST, shown: bool = False, **said: Any,
) -> ModelProto:  # fmt: skip
    """A convolution, behind an upsampling where there are scales; `shown`: what is between them is an output too."""
    rng = np.random.default_rng(0)
    channels, height, width = size
    times = 1 if scales is None else 2
    weights = [
        numpy_helper.from_array(rng.standard_normal((outputs, channels, kernel, kernel)).astype(np.float32), "w")
    ]
    given, nodes = "x", []
    if scales is not None:
        weights.append(numpy_helper.from_array(np.array(scales, np.float32), "scales"))
        nodes.append(helper.make_node("Resize", ["x", "", "scales"], ["up"], "up", **resize))
        given = "up"
    if bias:
        weights.append(numpy_helper.from_array(rng.standard_normal(outputs).astype(np.float32), "b"))
    inputs = [given, "w", *(["b"] if bias else [])]
    nodes.append(helper.make_node("Conv", inputs, ["y"], "y", **(PLAIN | said)))
    between = tensor("up", channels, times * height, times * width)
    made = [tensor("y", outputs, "rows", "columns"), *([between] if shown else [])]
    graph = helper.make_graph(
        nodes, "g", [tensor("x", *size)], made, weights, value_info=[between] if scales is not None else []
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tensor(name: str, *sizes: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sizes])


def run(model: ModelProto, size: tuple[int, ...]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, *size)).astype(np.float32)
    return np.asarray(session.run(["y"], {"x": x})[0])


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(3, 5, 4), (2, 1, 1), (4, 2, 7)])
def test_upsampling_and_convolution_are_four_convolutions(size: tuple[int, int, int], bias: bool) -> None:
    model = convolving(size, 5, scales=[1, 1, 2, 2], bias=bias)
    want = run(model, size)
    merged = merge_upsampling(model)
    onnx.checker.check_model(merged, full_check=True)
    assert kinds(merged) == MERGED
    assert {name for node in merged.graph.node for name in node.input} >= {
        tensor.name for tensor in merged.graph.initializer
    }
    got = run(merged, size)
    assert got.shape == (2, 5, 2 * size[1], 2 * size[2])
    # Nine products a pixel are added in another order.
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    "otherwise",
    [
        {"scales": [1, 1, 3, 3]},
        {"scales": [1, 1, 2, 1]},
        {"scales": [1, 1, 2, 2], "resize": NEAREST | {"mode": "linear"}},
        {"scales": [1, 1, 2, 2], "resize": NEAREST | {"nearest_mode": "ceil"}},
        {"scales": [1, 1, 2, 2], "strides": [2, 2]},
        {"scales": [1, 1, 2, 2], "pads": [0, 0, 0, 0]},
        {"scales": [1, 1, 2, 2], "dilations": [2, 2]},
        {"scales": [1, 1, 2, 2], "kernel": 5},
        {"scales": [1, 1, 2, 2], "shown": True},
        {},
    ],
    ids=lambda otherwise: " ".join(f"{name}={value}" for name, value in otherwise.items())[:40] or "no upsampling",
)
def test_other_upsampling_and_other_convolutions_stay(otherwise: dict[str, Any]) -> None:
    model = convolving((4, 4, 4), 4, **otherwise)
    before = model.SerializeToString(deterministic=True)
    assert merge_upsampling(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [ROWS, 5, 1])
@pytest.mark.parametrize("outputs", [CHANNELS, CHANNELS + 8])
def test_rows_are_filtered_with_half_the_products(width: int, outputs: int, bias: bool) -> None:
    size = (CHANNELS, ROWS, width)
    model = convolving(size, outputs, bias=bias)
    want = run(model, size)
    filtered = filter_rows(model)
    onnx.checker.check_model(filtered, full_check=True)
    assert kinds(filtered) == FILTERED
    # Sums with coefficients up to 8 and over 1152 products: a few times the rounding of the products themselves.
    np.testing.assert_allclose(run(filtered, size), want, atol=3e-6 * np.abs(want).max())


def test_sums_of_rows_filter_exactly() -> None:
    """In float64, with zeros around the map: the matrices are the algorithm, whatever the kernel."""
    rows = 12
    spread, gather = (matrix.astype(np.float64) for matrix in sums_of_rows(rows))
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal(rows), rng.standard_normal(3)
    points = [
        [1 / 4, 0, 0],
        [-1 / 6] * 3,
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
    by_tile = np.repeat(np.array(points) @ kernel, rows // TILE)
    want = np.correlate(np.pad(x, 1), kernel, "valid")
    np.testing.assert_allclose(gather @ (by_tile * (spread @ x)), want, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "outputs", "said"),
    [
        ((CHANNELS - 1, ROWS, ROWS), CHANNELS, {}),
        ((CHANNELS, ROWS, ROWS), CHANNELS - 1, {}),
        ((CHANNELS, ROWS - TILE, ROWS), CHANNELS, {}),
        ((CHANNELS, CHANNELS // 2 + TILE, 4), CHANNELS, {}),
        ((CHANNELS, ROWS + 2, ROWS), CHANNELS, {}),
        ((CHANNELS, ROWS, ROWS), CHANNELS, {"strides": [2, 2]}),
        ((CHANNELS, ROWS, ROWS), CHANNELS, {"kernel": 1, "pads": [0, 0, 0, 0]}),
    ],
    ids=[
        "few channels in",
        "few channels out",
        "few rows",
        "many rows",
        "four does not divide the rows",
        "strided",
        "1 x 1",
    ],
)
def test_what_would_win_nothing_or_cannot_be_filtered_stays(
    size: tuple[int, int, int], outputs: int, said: dict[str, Any]
) -> None:
    model = convolving(size, outputs, **said)
    before = model.SerializeToString(deterministic=True)
    assert filter_rows(model).SerializeToString(deterministic=True) == before


def test_more_channels_pay_for_the_sums_of_more_rows() -> None:
    for rows, channels in ((CHANNELS // 2, CHANNELS), (CHANNELS // 2 + TILE, CHANNELS + 8)):
        assert kinds(filter_rows(convolving((channels, rows, 4), channels)))["Conv"] == 6


def test_a_kernel_that_two_convolutions_share_stays() -> None:
    size = (CHANNELS, ROWS, 4)
    model = convolving(size, CHANNELS)
    model.graph.node.append(helper.make_node("Conv", ["x", "w"], ["z"], "z", **PLAIN))
    model.graph.output.append(tensor("z", CHANNELS, *size[1:]))
    before = model.SerializeToString(deterministic=True)
    assert filter_rows(model).SerializeToString(deterministic=True) == before


def test_a_map_of_unknown_size_stays() -> None:
    model = convolving((CHANNELS, ROWS, ROWS), CHANNELS)
    del model.graph.input[:]
    model.graph.input.append(tensor("x", "channels", "rows", "columns"))
    assert kinds(filter_rows(model)) == {"Conv": 1}


def test_weights_outside_are_neither_opened_nor_stored_again(tmp_path: Path) -> None:
    size = (CHANNELS, ROWS, 4)
    model = convolving(size, CHANNELS)
    kept = model.graph.initializer[0]
    elsewhere = b"\0" * 64 + kept.raw_data
    (tmp_path / "elsewhere.bin").write_bytes(elsewhere)
    want = run(model, size)
    set_external_data(kept, "elsewhere.bin", 64, len(kept.raw_data))
    kept.ClearField("raw_data")
    filtered = filter_rows(model)
    (tmp_path / "filtered.onnx").write_bytes(filtered.SerializeToString())
    assert (tmp_path / "filtered.onnx").stat().st_size < len(elsewhere) / 8
    session = ort.InferenceSession(tmp_path / "filtered.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((2, *size)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], want, atol=3e-6 * np.abs(want).max())


@pytest.mark.long
def test_both_go_through_an_export_and_neither_into_portable_graphs(class_model: Path, export_once: Export) -> None:
    small = {"edgediff.targets.onnx.winograd.CHANNELS": 8, "edgediff.targets.onnx.winograd.ROWS": 4}
    found, bundles = {}, {}
    for portable in (False, True):
        config = edgediff.ExportConfig(steps=2, layout="split", onnx=OnnxConfig(portable=portable))
        bundles[portable] = export_once(class_model, config, small)
        files = sorted((bundles[portable] / "onnx/unet").glob("*.onnx"))
        graphs = [onnx.load(path) for path in files if path.stem != "model"]  # which is made of the others
        found[portable] = sum((kinds(graph) for graph in graphs), Counter())
        names = {node.name for graph in graphs for node in graph.graph.node}
        assert any(".products" in name for name in names) is not portable
    assert found[False]["DepthToSpace"] == found[True]["Resize"] > 0
    assert found[True]["DepthToSpace"] == found[False]["Resize"] == 0
    pytest.importorskip("openvino")
    pipes = [EdgePipeline.from_pretrained(bundles[False], backend=name) for name in ("onnxruntime", "openvino")]
    results = [pipe(seed=1) for pipe in pipes]
    assert np.abs(results[0].latents - results[1].latents).max() < 1e-3
