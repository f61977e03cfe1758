"""Weights in fewer bits in ONNX graphs, in OpenVINO's models and in Core ML packages."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from artefacts import saved_once
from command_line import Command, assert_error
from conftest import Export
from onnx import ModelProto, TensorProto, helper, numpy_helper
from seals import rows_of
from tiny_pipelines import save_sd1
from torch import nn
from torch.nn import Parameter

from edgediff import export_bundle, load_model
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import ConfigError, TargetError
from edgediff.export.export_config import config_from
from edgediff.models.stored_weights import StoredWeights
from edgediff.targets.onnx.half_precision import to_float, to_half
from edgediff.targets.onnx.passes import check, tensor_bytes
from edgediff.targets.onnx.pool_weights import pool_weights
from edgediff.targets.onnx.store_weights import store_weights
from edgediff_runtime import BundleError, EdgePipeline, open_bundle
from edgediff_runtime.manifest import Tensor, WeightFormat
from edgediff_runtime.ort_options import session_options

# By what a graph does with each: its shape in torch.
WEIGHTS = {"conv": (8, 5, 3, 3), "pointwise": (6, 8, 1, 1), "matmul": (40, 36), "gemm": (36, 40), "table": (50, 36)}


@pytest.fixture
def weights() -> dict[str, Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(0.3 * torch.randn(shape)) for name, shape in WEIGHTS.items()}


def graph_of(weights: dict[str, Parameter]) -> ModelProto:
    """Each weight as an exporter has it: matmuls' transposed."""
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    arrays["matmul"] = np.ascontiguousarray(arrays["matmul"].T)
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "conv"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "pointwise"], ["image"]),
        node("Gather", ["table", "ids"], ["rows"]),
        node("MatMul", ["rows", "matmul"], ["b"]),
        node("Gemm", ["b", "gemm"], ["text"], transB=1),
    ]
    sides = [
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 9, 9]),
         helper.make_tensor_value_info("ids", TensorProto.INT64, [7])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 6, 9, 9]),
         helper.make_tensor_value_info("text", TensorProto.FLOAT, [7, 36])],
    ]  # fmt: skip
    inits = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", *sides, inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


FEEDS = {
    "x": np.random.default_rng(1).normal(size=(2, 5, 9, 9)).astype(np.float32),
    "ids": np.array([0, 3, 49, 7, 7, 20, 31]),
}


def run(model: ModelProto | str, stored: bool = True) -> list[np.ndarray]:
    given = model if isinstance(model, str) else model.SerializeToString()
    options = session_options(int8=False, threads=1, stored=stored)
    return list(ort.InferenceSession(given, options, providers=["CPUExecutionProvider"]).run(None, FEEDS))


def rounded(weights: dict[str, Parameter], forms: dict[str, WeightFormat]) -> dict[str, Parameter]:
    known = StoredWeights(weights, forms)
    return {name: nn.Parameter(known.rounded(weight)) for name, weight in weights.items()}


def plan_of(unet: dict[str, str]) -> str:
    return json.dumps({"components": {"unet": unet}})


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("form", ["fp16", "int8", "int4"])
def test_a_graph_computes_with_the_rounded_weights(weights: dict[str, Parameter], form: WeightFormat) -> None:
    forms = dict.fromkeys(weights, form)
    model = graph_of(weights)
    assert store_weights(model, StoredWeights(weights, forms)) == set(weights)
    check(model)
    for want, got in zip(run(graph_of(rounded(weights, forms))), run(model), strict=True):
        assert psnr_db(want, got) >= 120  # fp32 against fp32: only the order of additions differs
    numbers = sum(weight.numel() for weight in weights.values())
    codes = [tensor for tensor in model.graph.initializer if tensor.name.endswith((".codes", ".half"))]
    assert sum(map(tensor_bytes, codes)) <= numbers * {"fp16": 2, "int8": 1, "int4": 0.5}[form] + len(codes)
    assert not {tensor.name for tensor in model.graph.initializer} & set(weights)


def test_each_weight_may_have_a_format_of_its_own(weights: dict[str, Parameter]) -> None:
    forms: dict[str, WeightFormat] = {"conv": "int8", "matmul": "int4", "table": "fp16"}
    model = graph_of(weights)
    assert store_weights(model, StoredWeights(weights, forms)) == set(forms)
    assert {"pointwise", "gemm"} <= {tensor.name for tensor in model.graph.initializer}
    assert operators(model).count("DequantizeLinear") == 2


def test_weights_are_made_once_when_the_runtime_opens_a_graph(weights: dict[str, Parameter], tmp_path: Path) -> None:
    """And ONNX Runtime, left to itself, makes its operator for matmuls of few bits."""
    model = graph_of(weights)
    store_weights(model, StoredWeights(weights, dict.fromkeys(weights, "int4")))
    found = {}
    for stored in (True, False):
        options = session_options(int8=False, threads=1, stored=stored)
        options.optimized_model_filepath = str(tmp_path / f"{stored}.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[stored] = operators(onnx.load(tmp_path / f"{stored}.onnx"))
    assert "DequantizeLinear" not in found[True]
    assert "MatMulNBits" in found[False]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_with_low_memory_they_stay_as_they_are(
    weights: dict[str, Parameter], form: WeightFormat, tmp_path: Path
) -> None:
    """And ONNX Runtime does not round the features."""
    model = graph_of(weights)
    store_weights(model, StoredWeights(weights, dict.fromkeys(weights, form)))
    options = session_options(int8=False, threads=1, stored=True, low_memory=True)
    options.optimized_model_filepath = str(tmp_path / "kept.onnx")
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, FEEDS)
    for want, got in zip(run(model), made, strict=True):
        assert psnr_db(want, got) >= 120  # fp32 against fp32
    kept = onnx.load(tmp_path / "kept.onnx")
    assert set(operators(kept)) & {"DequantizeLinear", "MatMulNBits"}
    known = {tensor.name: tensor.data_type for tensor in kept.graph.initializer}
    assert TensorProto.FLOAT not in {known[name] for name in known if name.endswith(".codes")}


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_graph_in_fp16_has_them_too(weights: dict[str, Parameter], form: WeightFormat) -> None:
    model = graph_of(weights)
    store_weights(model, StoredWeights(weights, dict.fromkeys(weights, form)))
    exact = run(model)
    half = to_half(model, [Tensor("x", "float32", (2, 5, 9, 9)), Tensor("image", "float32", (2, 6, 9, 9)),
                           Tensor("text", "float32", (7, 36))])  # fmt: skip
    check(half)
    for want, got in zip(exact, run(half), strict=True):
        assert psnr_db(want, got) >= 55  # weights, features and sums of up to 45 products in fp16
    unrounded, _ = to_float(half)
    halved = {name: nn.Parameter(weight.half().float())
              for name, weight in rounded(weights, dict.fromkeys(weights, form)).items()}  # fmt: skip
    for want, got in zip(run(graph_of(halved)), run(unrounded), strict=True):
        assert psnr_db(want, got) >= 60  # the sample stays fp32, codes times scales are not rounded in fp32


def test_codes_of_four_bits_lie_packed_in_a_file_of_weights(weights: dict[str, Parameter], tmp_path: Path) -> None:
    model = graph_of(weights | {"table": nn.Parameter(torch.randn(500, 36))})
    known = {name: weight for name, weight in weights.items() if name != "table"}
    store_weights(model, StoredWeights(known, dict.fromkeys(known, "int4")))
    want = run(model)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(model.SerializeToString())
    pool_weights([tmp_path / "a.onnx", tmp_path / "b.onnx"], tmp_path / "weights.bin")
    apart = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    outside = {tensor.name: tensor for tensor in apart.graph.initializer if tensor.external_data}
    assert "table" in outside
    assert (tmp_path / "weights.bin").stat().st_size < 500 * 36 * 4 + 2000
    for again in map(str, (tmp_path / "a.onnx", tmp_path / "b.onnx")):
        for one, other in zip(want, run(again), strict=True):
            assert np.array_equal(one, other)


# Whole pipelines


@pytest.fixture(scope="module")
def sd1() -> Path:
    """A small Stable Diffusion 1.x; copy it before a change."""
    return saved_once("tiny-sd1", save_sd1)


TARGETS_AND_FORMATS = [
    ("onnx", "int8"),
    ("onnx", "int4"),
    ("onnx", "fp16"),
    ("openvino", "int4"),
    ("coreml", "palette4"),
]
# Of random weights, which rounding hurts more than trained ones.
LOW = dict.fromkeys(("fp16", "int8", "int4", "palette8", "palette6", "palette4", "palette3", "palette2"), 3.0)


@pytest.mark.long
@pytest.mark.parametrize(("target", "form"), TARGETS_AND_FORMATS)
def test_a_pipeline_is_exported_verified_and_draws(
    sd1: Path, export_once: Export, tmp_path: Path, target: str, form: str
) -> None:
    config = {
        "steps": 2,
        "adaptor": "identity",
        "targets": [target],
        target: {"weights": form},
        "verify": {"weights": LOW},
    }
    path = export_once(sd1, config_from(config))
    bundle = open_bundle(path)
    entry = bundle.manifest.target(target)
    for name, component in entry.components.items():
        assert component.weights, name
        assert set(component.weights) <= {form, "int8"}
        assert component.floors.program == 100
    programs = [row["psnr_db"] for row in rows_of(path) if row["check"] == "program"]
    if target != "openvino":  # which rounds what it multiplies codes by
        assert len(programs) >= 4
        assert min(programs) >= 100
    if target != "coreml":
        backend = "onnxruntime" if target == "onnx" else target
        images = EdgePipeline.from_pretrained(path, backend=backend)(prompt="an apple", seed=1).images
        assert images.any()
    if target == "onnx":
        if form == "int4":
            with pytest.raises(BundleError, match="weights in int4, which OpenVINO does not read from ONNX; take"):
                EdgePipeline.from_pretrained(path, backend="openvino")
        # With low memory they are made in each run, and a cache would hold them all.
        pipe = EdgePipeline.from_pretrained(path, low_memory=True, cache=tmp_path / "cache")
        assert psnr_db(images.astype(float), pipe(prompt="an apple", seed=1).images.astype(float)) > 50
        assert not (tmp_path / "cache").exists()


@pytest.mark.long
def test_components_may_differ_and_a_plan_may_say(sd1: Path, export_once: Export, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of({"conv_in.weight": "int8", "conv_out.weight": "fp16"}))
    config = {"steps": 2, "adaptor": "identity", "weights": {"unet": str(plan), "text_encoder": "int8"},
              "verify": {"weights": LOW}}  # fmt: skip
    path = export_once(sd1, config_from(config))
    components = open_bundle(path).manifest.target("onnx").components
    assert set(components["unet"].weights) == {"fp16", "int8"}
    assert set(components["text_encoder"].weights) == {"int8"}
    assert components["vae_decoder"].weights == {}
    assert components["vae_decoder"].floors.program is None

    elsewhere = plan.rename(tmp_path / "elsewhere.json")
    again = config_from(config | {"weights": {"unet": str(elsewhere), "text_encoder": "int8"}})
    assert export_bundle(load_model(sd1), path, again).report is None  # the same bundle, and left as it is
    elsewhere.write_text(plan_of({"conv_in.weight": "int8"}))
    with pytest.raises(TargetError, match="another bundle"):
        export_bundle(load_model(sd1), path, again)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [({"onnx": {"weights": "palette6"}}, "weights palette6 of text_encoder: ONNX has fp16, int8, int4"),
     ({"targets": ["coreml"], "weights": {"unet": "int4"}}, "weights int4 of unet: Core ML has int8, palette8"),
     ({"targets": ["executorch"], "weights": {"unet": "int8"}}, "ExecuTorch has none of fewer bits"),
     ({"weights": {"colour": "int8"}}, "'weights' names 'colour'"),
     ({"onnx": {"weights": "int8", "quantize_nbits": 8}}, "already has the UNet's weights in int8"),
     ({"onnx": {"weights": "int8", "opset": 20}}, "needs 'onnx.opset' 21 or later"),
     ({"onnx": {"weights": "nothing.json"}}, "weights 'nothing.json': no format, and no plan"),
     ({"verify": {"weights": {"int8": -1}}}, "'verify.weights.int8' is -1")],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused(recipe: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        config_from(recipe)


@pytest.mark.parametrize(
    ("forms", "what"),
    [({"conv_in.wait": "int8"}, "unet has no weight conv_in.wait"),
     ({"conv_in.weight": "int4"}, "conv_in.weight has 36 inputs for each output, which OpenVINO does not take in")],
)  # fmt: skip
def test_a_plan_that_does_not_fit_the_model_is_refused(
    command: Command, sd1: Path, tmp_path: Path, forms: dict[str, str], what: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of(forms))
    said = command(
        "export", sd1, "-o", tmp_path / "b", "--target", "openvino", "--weights", f"unet={plan}", "--steps", 1
    )
    assert_error(said, what)
    assert not (tmp_path / "b").exists()


def test_the_manifest_says_how_many_elements_have_which_format() -> None:
    from edgediff_runtime.manifest import Component, Floors

    component = Component("step", "fp32", None, Floors(1, 1, 1, None, 1), (), weights={"int8": 5})
    assert msgspec.to_builtins(component)["weights"] == {"int8": 5}
