from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from edgediff.errors import UnsupportedError
from edgediff.targets.onnx.group_norm import expand_group_norm

CHANNELS, GROUPS = 6, 3
FLOAT = TensorProto.FLOAT


def normalizing(shape: tuple[int | str, ...], *, shared: bool = False) -> ModelProto:
    """Two group normalizations in a row; `shared`: with the same weights."""
    rng = np.random.default_rng(0)
    names = ("scale", "bias") if shared else ("scale", "bias", "scale_2", "bias_2")
    weights = [numpy_helper.from_array(rng.standard_normal(CHANNELS).astype(np.float32), name) for name in names]
    nodes = [
        helper.make_node("GroupNormalization", ["x", *names[:2]], ["y"], "one", num_groups=GROUPS, epsilon=1e-3),
        helper.make_node("GroupNormalization", ["y", *names[-2:]], ["z"], "two", num_groups=2, epsilon=1e-5),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("z", FLOAT, shape)],
        weights,
        # As torch's exporter writes it: of weights too.
        value_info=[
            helper.make_tensor_value_info("y", FLOAT, shape),
            *(helper.make_tensor_value_info(name, FLOAT, [CHANNELS]) for name in names),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x})
    return np.asarray(out)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [("batch", CHANNELS, 4, 5), ("batch", CHANNELS, 7), (2, CHANNELS, 4, 5)])
@pytest.mark.parametrize(
    ("portable", "scaling"), [(False, ["BatchNormalization"]), (True, ["Unsqueeze", "Mul", "Unsqueeze", "Add"])]
)
def test_it_computes_what_the_operator_does(
    shape: tuple[int | str, ...], shared: bool, portable: bool, scaling: list[str]
) -> None:
    model = normalizing(shape, shared=shared)
    x = np.random.default_rng(1).standard_normal((2, *shape[1:])).astype(np.float32) * 3 + 1  # type: ignore[arg-type]
    want = run(model, x)
    expanded = expand_group_norm(model, portable)
    kinds = ["Reshape", "InstanceNormalization", "Reshape", *scaling]
    assert [node.op_type for node in expanded.graph.node] == 2 * kinds
    onnx.checker.check_model(expanded, full_check=True)
    used = {name for node in expanded.graph.node for name in node.input}
    assert {tensor.name for tensor in expanded.graph.initializer} <= used
    np.testing.assert_allclose(run(expanded, x), want, atol=1e-5)


def test_weights_outside_are_not_opened(tmp_path: Path) -> None:
    model = normalizing(("batch", CHANNELS, 4, 4))
    scale = model.graph.initializer[0]
    set_external_data(scale, "elsewhere.bin", 64, 4 * CHANNELS)
    scale.ClearField("raw_data")
    scale.data_location = TensorProto.EXTERNAL
    expanded = expand_group_norm(model)
    kept = next(tensor for tensor in expanded.graph.initializer if tensor.name == "scale")
    assert {entry.key: entry.value for entry in kept.external_data}["offset"] == "64"


def test_a_graph_without_any_stays_as_it_is() -> None:
    node = helper.make_node("Identity", ["x"], ["z"])
    info = [helper.make_tensor_value_info(name, FLOAT, [1]) for name in "xz"]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]))
    before = model.SerializeToString(deterministic=True)
    assert expand_group_norm(model).SerializeToString(deterministic=True) == before


def test_what_cannot_be_expanded_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"one normalizes x, whose number of channels is not known"):
        expand_group_norm(normalizing(("batch", "channels", 4, 5)))


@pytest.mark.parametrize("portable", [False, True])
def test_height_and_width_may_be_symbolic(portable: bool) -> None:
    model = normalizing(("batch", CHANNELS, "height", "width"))
    inputs = [np.random.default_rng(n).standard_normal((n, CHANNELS, 2 * n, 7)).astype(np.float32) for n in (1, 3)]
    want = [run(model, x) for x in inputs]
    expanded = expand_group_norm(model, portable)
    for x, y in zip(inputs, want, strict=True):
        np.testing.assert_allclose(run(expanded, x), y, rtol=1e-4, atol=1e-5)
