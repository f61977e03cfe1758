"""ONNX in fp16: what is converted, what stays fp32, precision by component, and overflows, refused by name."""

import copy
import math
import shutil
import weakref
from collections import Counter
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
from conftest import SMALL_CLASS, Export
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from seals import manifest_of, rows_of
from tiny_pipelines import save_sd1
from unets import unet2d

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, step_inputs
from edgediff.config.floors import HalfFloors
from edgediff.errors import ConfigError, UnsupportedError, VerificationError
from edgediff.export.export_config import config_from
from edgediff.export.half_reference import RoundedPart
from edgediff.models.torch_session import graph_tensor
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_session
from edgediff.targets.base import LARGEST_HALF, HalfConstants
from edgediff.targets.layout import modules
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.half_precision import Converting, element_types, to_float, to_half
from edgediff.targets.onnx.half_ranges import beyond_half
from edgediff.targets.onnx.pool_weights import WeightFile
from edgediff.targets.onnx.unrounded import UnroundedSession
from edgediff.targets.onnx.write_onnx import write_graph
from edgediff.verify import parity
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.loop import LOWRES_FEATURE
from edgediff_runtime.manifest import Graph, Tensor


@pytest.fixture(scope="module")
def sd1() -> Path:
    """A small Stable Diffusion 1.x; copy it before a change."""
    return saved_once("tiny-sd1", save_sd1)


@pytest.fixture(scope="module")
def half_bundle(sd1: Path, export_once: Export) -> Path:
    """That in fp16, with its decoder in fp32."""
    return export_once(sd1, config_from({"steps": 2, "adaptor": "identity", "onnx": {"dtype": "fp16"},
                                         "dtypes": {"vae_decoder": "fp32"}}))  # fmt: skip


def _embedding() -> onnx.ModelProto:
    """sin(timestep * 1000) * weight + mask: a time embedding, a weight and a constant for minus infinity."""
    nodes = [
        helper.make_node("Mul", ["timestep", "frequency"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["wave"]),
        helper.make_node("Mul", ["wave", "weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["out"]),
        helper.make_node("Add", ["scaled", "cache"], ["feature"]),
    ]
    values = {"frequency": [997.0] * 3, "weight": [0.1, 0.2, 0.3], "mask": [0.0, -3.4e38, 0.0]}
    weights = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in names]
        for names in (("timestep", "cache"), ("out", "feature"))
    )
    graph = helper.make_graph(nodes, "embedding", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


KINDS = {"timestep": "float32", "cache": "float16", "out": "float32", "feature": "float16"}
TENSORS = [Tensor(name, kind, (3,)) for name, kind in KINDS.items()]  # type: ignore[arg-type]


def test_the_timestep_s_path_and_what_comes_from_outside_stay_fp32() -> None:
    model = to_half(_embedding(), TENSORS)
    onnx.checker.check_model(model, full_check=True)
    kinds = {name: helper.tensor_dtype_to_np_dtype(kind).name for name, kind in element_types(model).items()}
    assert {name: kinds[name] for name in KINDS} == KINDS
    assert {name: kinds[name] for name in ("frequency", "angle", "wave", "weight.half", "scaled", "masked")} == {
        "frequency": "float32", "angle": "float32", "wave": "float32",
        "weight.half": "float16", "scaled": "float16", "masked": "float16",
    }  # fmt: skip
    feeds = {"timestep": np.array([1, 500, 999], np.float32), "cache": np.zeros(3, np.float16)}
    out, feature = ort.InferenceSession(model.SerializeToString()).run(["out", "feature"], feeds)
    wave = np.sin(feeds["timestep"] * 997) * np.float16([0.1, 0.2, 0.3])
    np.testing.assert_allclose(feature, wave, atol=1e-3)
    assert (out[1], feature.dtype) == (0, np.float16)


def test_fp32_arithmetic_has_the_rounded_weights() -> None:
    model, rounded = to_float(to_half(_embedding(), TENSORS))
    assert set(rounded) == {"wave.half", "scaled", "masked", "feature", "out.computed"}
    feeds = {"timestep": np.array([1, 500, 999], np.float32), "cache": np.ones(3, np.float32)}
    (feature,) = ort.InferenceSession(model.SerializeToString()).run(["feature"], feeds)
    np.testing.assert_allclose(
        feature, np.sin(feeds["timestep"] * 997) * np.float16([0.1, 0.2, 0.3]).astype(np.float32) + 1, rtol=1e-6
    )


def test_a_weight_beyond_fp16_is_refused() -> None:
    model = _embedding()
    large = numpy_helper.from_array(np.array([1, 2, 7e4], np.float32), "weight")
    next(tensor for tensor in model.graph.initializer if tensor.name == "weight").CopyFrom(large)
    with pytest.raises(UnsupportedError, match=r"overflows in the weight weight \(largest 7e\+04, fp16 holds 65504\)"):
        to_half(model, TENSORS)


def test_weights_outside_of_a_graph_are_converted_from_file_to_file(tmp_path: Path) -> None:
    inside = _embedding()
    numbers = np.linspace(-1, 1, 900, dtype=np.float32).reshape(300, 3)
    inside.graph.initializer.append(numpy_helper.from_array(numbers, "large"))
    inside.graph.node.append(helper.make_node("MatMul", ["large", "scaled"], ["more"]))
    inside.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [300]))
    tensors = [*TENSORS, Tensor("more", "float32", (300,))]
    onnx.save(
        copy.deepcopy(inside),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.bin",
        size_threshold=0,
    )
    outside = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with WeightFile(tmp_path / "half.bin") as file:
        half = to_half(outside, tensors, Converting(tmp_path, file))
    onnx.save(half, tmp_path / "half.onnx")
    where = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in half.graph.initializer
    }
    # What stays fp32 stays where it is; small weights go into the graph.
    assert {name: place["location"] for name, place in where.items() if place} == {
        "large.half": "half.bin", "frequency": "model.bin"
    }  # fmt: skip
    with WeightFile(tmp_path / "float.bin") as file:
        back, _ = to_float(onnx.load(tmp_path / "half.onnx", load_external_data=False), Converting(tmp_path, file))
    onnx.save(back, tmp_path / "float.onnx")
    want_half = to_half(inside, tensors)
    for name, want in (("half", want_half), ("float", to_float(copy.deepcopy(want_half))[0])):
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        for tensor in want.graph.initializer:
            given = numpy_helper.to_array(tensor)
            assert found[tensor.name].dtype == given.dtype
            assert np.array_equal(found[tensor.name], given)


@pytest.mark.long
@torch.no_grad()
def test_a_graph_has_the_reference_s_constants(tmp_path: Path) -> None:
    # Divisions, a norm's epsilon, and heads whose scale fp16 does not hold.
    odd = {"mid_block_scale_factor": math.sqrt(2), "norm_eps": 3e-6, "attention_head_dim": 6}
    unet = unet2d(**SMALL_CLASS | odd | {"block_out_channels": (8, 24)})
    part = modules(edgediff.split(unet), "pair")["full"]
    given = {
        "sample": torch.randn(2, 3, 16, 16),
        "timestep": torch.tensor([637.0]),
        "class_labels": torch.tensor([1, 2]),
    }
    made = dict(zip(part.outputs, part(*(given[name] for name in part.inputs)), strict=True))

    def listed(tensors: dict[str, torch.Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            msgspec.structs.replace(each, dtype="float16") if each.name == LOWRES_FEATURE else each
            for each in (graph_tensor(name, tensor) for name, tensor in tensors.items())
        )

    graph = Graph("full", "full.onnx", "full_step", listed({name: given[name] for name in part.inputs}), listed(made))
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    write_graph(part, graph, arrays, tmp_path / "full.onnx", OnnxConfig(dtype="fp16"))
    model, _ = to_float(onnx.load(tmp_path / "full.onnx"))
    got = ort.InferenceSession(model.SerializeToString()).run(list(part.outputs), arrays)

    def worst(constants: HalfConstants) -> float:
        want = RoundedPart(part, constants, None)(*(given[name] for name in part.inputs))
        return min(psnr_db(tensor.numpy(), array) for tensor, array in zip(want, got, strict=True))

    assert worst(TARGETS["onnx"].half_constants(None)) > HalfFloors().program_db + 10
    assert worst(HalfConstants()) < HalfFloors().program_db


@pytest.mark.long
def test_each_component_has_its_precision(half_bundle: Path) -> None:
    target = manifest_of(half_bundle).target("onnx")
    assert {name: each.dtype for name, each in target.components.items()} == {
        "unet": "fp16", "text_encoder": "fp16", "vae_decoder": "fp32", "vae_encoder": "fp16"
    }  # fmt: skip
    full, cached = target.unet.graphs
    crossing = {t.name: t.dtype for graph in (full, cached) for t in (*graph.inputs, *graph.outputs)}
    assert crossing == {
        "sample": "float32", "timestep": "float32", "encoder_hidden_states": "float32", "out_sample": "float32",
        "lowres_feature": "float16", "cache": "float16",
    }  # fmt: skip
    for name, component in target.components.items():
        for graph in component.graphs:
            model = onnx.load(half_bundle / str(graph.file))
            bytes_of = Counter[int]()
            for tensor in model.graph.initializer:
                bytes_of[tensor.data_type] += numpy_helper.to_array(tensor).nbytes
            kind, other = TensorProto.FLOAT16, TensorProto.FLOAT
            if component.dtype == "fp32":
                kind, other = other, kind
            assert bytes_of[kind] > 20 * bytes_of[other], name
            assert component.dtype == "fp32" or {node.domain for node in model.graph.node} == {""}
    floors = {name: (each.floors.graph, each.floors.program) for name, each in target.components.items()}
    assert floors == {name: (100, None) if name == "vae_decoder" else (45, 100) for name in floors}


@pytest.mark.long
def test_fp16_is_verified_twice(half_bundle: Path) -> None:
    rows = {(row["check"], row["part"]): row["psnr_db"] for row in rows_of(half_bundle) if row["status"] == "measured"}
    for name in ("full", "cached", "text_encoder", "vae_encoder"):
        # Rounded results are some 70 dB of fp32; the same graph in fp32 arithmetic shows that its constants are right.
        assert 45 < rows["graph", name] < 100
        assert rows["program", name] > 100
    assert rows["graph", "vae_decoder"] > 100
    assert ("program", "vae_decoder") not in rows
    assert rows["picture", "pixels"] > 35


@pytest.mark.long
def test_a_large_model_is_written_and_verified_without_all_of_it_in_memory(
    sd1: Path, export_once: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {
        "edgediff.targets.onnx.write_onnx.EXTERNAL_DATA_BYTES": 2**10,
        "edgediff.targets.onnx.pool_weights.FILE_BYTES": 2**17,
    }
    recipe = {"steps": 2, "adaptor": "identity", "onnx": {"dtype": "fp16"}, "verify": {"mode": "graphs"}}
    path = export_once(sd1, config_from(recipe), large)
    components = manifest_of(path).target("onnx").components
    beside = {name: each.graphs[0].external_data for name, each in components.items()}
    for name, files in beside.items():
        first, ending = ("weights", ".bin") if name == "unet" else ("model.onnx", ".data")
        assert set(files) == {
            f"onnx/{name}/{first}{'' if i == 0 else f'-{i + 1}'}{ending}" for i in range(len(files))
        }  # fmt: skip
        assert {path / file for file in files} == {
            file for file in (path / f"onnx/{name}").iterdir() if file.suffix in (".bin", ".data")
        }
        assert set(files) <= set(components[name].files)
    assert len(beside["unet"]) > 1
    assert all((path / file).stat().st_size <= 2**17 for file in beside["text_encoder"])
    request = {"prompt": "an apple", "seed": 1, "output_type": "latent"}
    images = [EdgePipeline.from_pretrained(path, backend=name)(**request) for name in ("onnxruntime", "openvino")]
    assert psnr_db(*(each.latents for each in images)) > 45
    rows = {(row["check"], row["part"]): row["psnr_db"] for row in rows_of(path) if row["status"] == "measured"}
    assert all(rows["program", name] > 100 for name in ("full", "cached", "text_encoder", "vae_decoder"))

    opened: list[weakref.ref[object]] = []

    def open_alone(*given: Any, **named: Any) -> object:
        assert not [name for name, session in enumerate(opened) if session() is not None]
        session = open_session(*given, **named)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(parity, "open_session", open_alone)
    assert parity.verify_bundle(path, record=False).ok
    assert len(opened) == len(components) + 1  # and the undivided step


@pytest.mark.long
def test_a_wrong_constant_shows_in_fp32_arithmetic(half_bundle: Path, place: Path) -> None:
    bundle = open_bundle(shutil.copytree(half_bundle, place / "bundle"))
    reference, graph = load_reference(bundle.path / REFERENCE), bundle.manifest.target("onnx").unet.graphs[0]
    inputs = step_inputs(reference.steps[0], graph)
    want = reference.half["onnx", 0, "full"]["out_sample"]

    def number() -> float:
        session = UnroundedSession(bundle, "unet")
        tensors = {name: session.put(value) for name, value in inputs.items()}
        session.run(graph, tensors)
        return psnr_db(want, tensors["out_sample"])

    assert number() > 100
    path = bundle.path / str(graph.file)
    model = onnx.load(path)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) * 1.01).astype(np.float16), bias.name))
    onnx.save(model, path)
    assert number() < 90


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"dtypes": {"vae": "fp32"}}, "'dtypes' names 'vae'; expected components of: text_encoder, "),
        ({"dtypes": {"unet": "bf16"}}, "'dtypes.unet' is 'bf16'; expected one of: fp16, fp32"),
        ({"targets": ["onnx", "executorch"], "dtypes": {"vae_decoder": "fp16"}}, "'dtypes.vae_decoder' is fp16; Exec"),
        ({"targets": ["executorch"], "dtypes": {"unet": "fp16"}}, "'dtypes.unet' is fp16; ExecuTorch has it in fp32"),
        ({"onnx": {"dtype": "fp16", "quantize_nbits": 8}}, "'onnx.dtype' is fp16, and 'onnx.quantize_nbits' asks"),
        ({"dtypes": {"unet": "fp16"}, "onnx": {"quantize_nbits": 8}}, "'onnx.dtype' is fp16, and"),
        ({"onnx": {"dtype": "fp16", "opset": 23}}, "'onnx.opset' is 23; expected 18 to 22"),
    ],
)  # fmt: skip
def test_a_precision_that_is_not_there_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(data)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "vae=fp32"], "'dtypes' names 'vae'"),
        (["--dtype", "vae_decoder=fp8"], "'dtypes.vae_decoder' is 'fp8'"),
        (["--dtype", "text_encoder_2=fp32"], "'dtypes' names text_encoder_2, which"),
        (["--dtype", "fp16", "--target", "onnx", "--target", "executorch"], "--dtype fp16: ExecuTorch has fp32 alone"),
    ],
)
def test_the_command_line_refuses_them_too(
    command: Command, sd1: Path, place: Path, options: list[str], words: str
) -> None:
    assert_error(command("export", sd1, "-o", place / "bundle", *options), words)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]


def test_int8_and_other_precisions_go_together() -> None:
    config = config_from(
        {"dtypes": {"vae_encoder": "fp16"}, "onnx": {"quantize_nbits": 8}, "targets": ["onnx", "coreml"]}
    )
    assert [config.section("onnx", name).dtype for name in ("unet", "vae_encoder")] == ["fp32", "fp16"]
    assert [config.section("coreml", name).dtype for name in ("unet", "vae_decoder")] == ["fp16", "fp16"]


def _scale(model: Path, file: str, weight: str, factor: float) -> None:
    """Makes a weight larger, within fp16's range."""
    path = model / file
    weights = load_file(path)
    weights[weight] = weights[weight] * factor
    assert weights[weight].abs().max() < LARGEST_HALF
    save_file(weights, path, metadata={"format": "pt"})


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def planted(sd1: Path, place: Path) -> Path:
    """Numbers beyond fp16 in convolutions, attention scores, a text encoder's layer and the squares of a norm."""
    source = shutil.copytree(sd1, place / "planted")
    _scale(source, UNET, "down_blocks.0.resnets.0.conv1.weight", 3e5)
    _scale(source, VAE, "decoder.up_blocks.1.resnets.0.conv1.weight", 3e5)
    for name in ("to_q", "to_k"):
        _scale(source, UNET, f"{ATTENTION}.{name}.weight", 1e3)
    _scale(source, TEXT, "encoder.layers.1.mlp.fc1.weight", 1e5)
    _scale(source, TEXT, "encoder.layers.1.mlp.fc2.weight", 1e-3)
    # Some hundred: fp16 holds these, and not their squares.
    _scale(source, UNET, "mid_block.resnets.0.conv1.weight", 3e3)
    return source


# One operator set for both precisions: each module is traced once.
PLANTED = {
    "steps": 1, "clock": 1, "adaptor": "identity", "onnx": {"dtype": "fp16", "opset": 21},
    "components": ["text_encoder", "vae_decoder"],
}  # fmt: skip


@pytest.mark.long
def test_what_fp16_is_too_narrow_for_stays_fp32(planted: Path, place: Path) -> None:
    both = PLANTED | {"targets": ["onnx", "openvino"], "openvino": {"dtype": "fp16"}}
    done = edgediff.export_bundle(edgediff.load_model(planted), place / "bundle", config_from(both))
    assert done.report is not None
    assert done.report.ok
    of_openvino = manifest_of(place / "bundle").target("openvino").components
    components = manifest_of(place / "bundle").target("onnx").components
    kept = {name: [op for graph in each.graphs for op in graph.kept_fp32] for name, each in components.items()}
    for name, module in (
        ("unet", "layers.0.resnet.conv1/Conv"),
        ("unet", "attn1/MatMul"),
        ("unet", "resnet.norm2/GroupNormalization"),
        ("text_encoder", "layers.1.mlp.fc1/"),
        ("vae_decoder", "decoder.up_blocks.1.resnets.0.conv1/Conv"),
    ):
        assert any(module in op for op in kept[name]), (name, module, kept[name])
    # The others are still fp16.
    for name, each in components.items():
        for graph in (graph for graph in each.graphs if graph.file is not None):
            nodes = onnx.load(place / "bundle" / str(graph.file), load_external_data=False).graph.node
            assert len(graph.kept_fp32) < len(nodes) / 4, name
        # OpenVINO's devices are told of the same operations.
        for graph, other in zip(each.graphs, of_openvino[name].graphs, strict=True):
            if graph.file is not None:
                model = (place / "bundle" / str(other.file)).read_text()
                assert other.kept_fp32 == graph.kept_fp32
                assert model.count('name="DisablePrecisionConversion"') >= len(graph.kept_fp32)
                assert 'element_type="f16"' in model


@pytest.mark.long
def test_an_overflow_ends_the_export_and_is_named(planted: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As verification would find it in a bundle whose ranges were measured with too little."""
    monkeypatch.setattr("edgediff.targets.onnx.write_onnx.beyond_half", lambda *_: set())
    model = edgediff.load_model(planted)

    def refused(dtypes: dict[str, str]) -> str:
        with pytest.raises(VerificationError) as caught:
            edgediff.export_bundle(model, place / "bundle", config_from(PLANTED | {"dtypes": dtypes}))
        assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "planted"]
        return str(caught.value)

    exact = {"unet": "fp32", "text_encoder": "fp32", "vae_decoder": "fp32"}
    for component, module in (
        ("unet", "layers.0.resnet.conv1"),  # the first of highres_in
        ("text_encoder", "encoder.layers.1.mlp.fc1"),
        ("vae_decoder", "decoder.up_blocks.1.resnets.0.conv1"),
    ):
        said = refused({name: dtype for name, dtype in exact.items() if name != component})
        assert said.startswith(f"{component}: fp16 overflows in ")
        assert f"{module}/" in said
        assert f"fp16 holds 65504); keep it in fp32: --dtype {component}=fp32" in said


def _norm(kind: str, scale: float) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One norm between two products, and an input whose deviation is `scale`."""
    shape = [2, 4, 64]
    ends = ([2, 4, 64], [64]) if kind == "LayerNormalization" else ([2, 4, 64], [4])
    weights = [numpy_helper.from_array(np.ones(ends[1], np.float32), name) for name in ("weight", "bias")]
    weights.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    how = {"axis": -1, "epsilon": 1e-5} if kind == "LayerNormalization" else {"epsilon": 1e-5}
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node(kind, ["doubled", "weight", "bias"], ["normal"], **how),
        helper.make_node("Mul", ["normal", "two"], ["out"]),
    ]
    ends_of = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("x", "out")]
    graph = helper.make_graph(nodes, "g", *ends_of, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = np.random.default_rng(0).normal(scale=scale, size=shape).astype(np.float32)
    return model, {"x": x}


@pytest.mark.parametrize("kind", ["LayerNormalization", "InstanceNormalization"])
@pytest.mark.parametrize(
    ("scale", "kept"),
    [(1, set()), (100, {"normal"}), (2e-3, {"normal"}), (3e4, {"doubled", "normal"})],
    ids=["as usual", "squares", "a variance too small", "all of it"],
)
def test_norms_are_looked_into(kind: str, scale: float, kept: set[str], tmp_path: Path) -> None:
    model, feeds = _norm(kind, scale)
    assert beyond_half(model, tmp_path, [feeds]) == kept
    assert list(tmp_path.iterdir()) == []
    want = ort.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    half = to_half(model, [Tensor(name, "float32", (2, 4, 64)) for name in ("x", "out")], kept=kept)
    onnx.checker.check_model(half, full_check=True)
    got = ort.InferenceSession(half.SerializeToString()).run(None, feeds)[0]
    assert psnr_db(want, got) > 60  # two roundings of some numbers to eleven bits
