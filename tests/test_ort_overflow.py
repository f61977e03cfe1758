"""Exact kernels of eight bits are asked for where the others overflow, and nowhere else: with VNNI they cost time."""

import base64
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgediff_runtime import ort_options, ort_overflow
from edgediff_runtime.ort_options import session_options
from edgediff_runtime.ort_overflow import PRODUCT, SIZE, bytes_overflow

CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    bytes_overflow.cache_clear()
    yield
    bytes_overflow.cache_clear()


def product(most: int | None = None) -> ModelProto:
    """The graph, with sums that end at a number where one is given."""
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["c" if most is None else "sums"])]
    limits = []
    if most is not None:
        nodes.append(helper.make_node("Min", ["sums", "most"], ["c"]))
        limits = [numpy_helper.from_array(np.array(most, np.int32), "most")]
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.UINT8, ["m", "k"]),
        helper.make_tensor_value_info("b", TensorProto.INT8, ["k", "n"]),
    ]
    output = helper.make_tensor_value_info("c", TensorProto.INT32, ["m", "n"])
    graph = helper.make_graph(nodes, "g", inputs, [output], limits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def encoded(model: ModelProto) -> str:
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode()


def test_the_graph_is_one_product() -> None:
    assert encoded(product()) == PRODUCT


@pytest.mark.skipif(not CPUINFO.exists() or platform.machine() != "x86_64", reason="flags are read on Linux, x64")
def test_it_says_of_this_processor_what_its_flags_do() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert bytes_overflow() == (not {"avx512_vnni", "avx_vnni"} & set(flags))


@pytest.mark.parametrize(("most", "overflows"), [(SIZE // 2 * 32767, True), (SIZE * 255 * 127, False)])
def test_sums_of_sixteen_bits_are_found_out(most: int, overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_overflow, "PRODUCT", encoded(product(most)))
    assert bytes_overflow() == overflows


@pytest.mark.parametrize(
    ("wanted", "overflows", "entry"), [(True, True, "1"), (True, False, "0"), (False, True, "0"), (False, False, "0")]
)
def test_exact_kernels_are_asked_for_where_others_overflow(
    wanted: bool, overflows: bool, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_options, "bytes_overflow", lambda: overflows)
    options = session_options(wanted)
    assert options.get_session_config_entry("session.x64quantprecision") == entry
