"""The LiteRT target: a file with a signature for each graph, proved and run like any other."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import saved_once
from command_line import Command, assert_error
from conftest import Export
from safetensors.numpy import load_file
from seals import assert_refused, flip_bit, manifest_of, replace_graph, reseal, rows_of, seal
from sized_components import cases, written
from tiny_pipelines import SAVE

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import UnsupportedError
from edgediff.export.export_config import config_from
from edgediff.inspect.placement import LITERT_GPU, LITERT_MEDIATEK, LITERT_QUALCOMM, lint, lint_bundle
from edgediff.models.graphs import graph_list
from edgediff.models.part import Part
from edgediff.models.stored_weights import StoredWeights, uniform, weights_of
from edgediff.models.torch_session import TorchSession
from edgediff.models.weight_formats import Half
from edgediff.targets.backends import usual_backend
from edgediff.targets.litert.dequantized_weights import store_weights_in_tflite
from edgediff.targets.litert.litert_operations import read_signature
from edgediff.targets.litert.tflite_file import _module, operations, read_tflite, schema
from edgediff.targets.litert.write_litert import write_litert
from edgediff.targets.operations import Op, Value
from edgediff_runtime import BundleError, EdgePipeline, RequestError, open_bundle
from edgediff_runtime.litert_session import Held, LiteRtSession
from edgediff_runtime.manifest import Component, Floors, Graph, Tensor

for package in ("litert_torch", "ai_edge_litert"):  # found and not imported, which takes every worker a second
    if find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)
FILE = "litert/unet.tflite"


def interpreted(path: Path) -> Any:
    """LiteRT's interpreter of a file."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path))


@pytest.fixture(scope="module")
def litert_bundle(plain_model: Path, export_once: Export) -> Path:
    """That as a .tflite file, 4 steps at clock 2."""
    path = export_once(plain_model, edgediff.ExportConfig(steps=4, targets=("litert",)))
    measured = {(row["check"], row["part"]): row["psnr_db"] for row in rows_of(path) if row["status"] == "measured"}
    assert measured.keys() >= {("graph", "full"), ("graph", "cached"), ("trajectory", "latents")}
    assert min(number for (check, _), number in measured.items() if check in ("graph", "composed")) > 100
    return path


@pytest.mark.long
def test_one_file_has_a_signature_for_each_graph_and_weights_once(litert_bundle: Path, plain_model: Path) -> None:
    target = manifest_of(litert_bundle).target("litert")
    assert [(g.file, g.function) for g in target.unet.graphs] == [(FILE, "full"), (FILE, "cached")]
    assert (target.unet.layout, target.unet.batch, target.unet.dtype) == ("pair", 2, "fp32")
    assert sorted(file.name for file in (litert_bundle / FILE).parent.iterdir()) == ["unet.tflite"]
    file = (litert_bundle / FILE).read_bytes()
    weights = load_file(plain_model / "unet/diffusion_pytorch_model.safetensors")
    # Both signatures have the first convolution; LiteRT's weights have their channels last.
    assert file.count(weights["conv_in.weight"].transpose(0, 2, 3, 1).tobytes()) == 1
    assert file.count(weights["conv_in.bias"].tobytes()) == 1


@pytest.mark.long
def test_images_are_those_of_torch_and_features_stay_in_its_buffers(litert_bundle: Path, plain_model: Path) -> None:
    bundle = open_bundle(litert_bundle)
    assert usual_backend(bundle) == "litert"
    request: dict[str, Any] = {"num_images": 3, "guidance_scale": [2.0, 2.0, 1.0, 1.0], "seed": 3}
    got = EdgePipeline.from_pretrained(litert_bundle, backend="litert")(**request)
    model = edgediff.load_model(plain_model)
    divided = edgediff.split(model.unet)
    want = EdgePipeline(bundle.manifest, TorchSession(divided.parts, graph_list(divided, model)))(**request)
    assert got.mask == want.mask
    assert psnr_db(want.latents, got.latents) > 90
    again = EdgePipeline.from_pretrained(litert_bundle, backend="litert", threads=64)(**request)
    assert psnr_db(want.latents, again.latents) > 90
    session = LiteRtSession(bundle)
    full, cached = session.graphs
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        t.name: rng.standard_normal(t.shape).astype(t.dtype) for graph in session.graphs for t in graph.inputs
    }
    session.run(full, tensors)
    feature = tensors["lowres_feature"]
    assert isinstance(feature, Held)
    tensors["cache"] = feature
    before = session.get(feature)
    session.run(cached, tensors)
    by_value = tensors | {"cache": before}
    session.run(cached, by_value)
    assert np.array_equal(session.get(tensors["out_sample"]), session.get(by_value["out_sample"]))
    assert np.array_equal(session.get(feature), before)


@pytest.mark.long
def test_a_cache_keeps_packed_weights(litert_bundle: Path, tmp_path: Path) -> None:
    images = [
        EdgePipeline.from_pretrained(litert_bundle, backend="litert", cache=cache)(num_images=2, seed=1).latents
        for cache in (None, tmp_path / "deep/cache", tmp_path / "deep/cache")
    ]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    (kept,) = (tmp_path / "deep/cache").iterdir()
    assert kept.suffix == ".xnnpack"


@pytest.mark.long
def test_it_verifies_and_runs_on_the_command_line_in_silence(
    litert_bundle: Path, command: Command, tmp_path: Path
) -> None:
    assert command("verify", litert_bundle).code == 0
    said = command("inspect", litert_bundle)
    assert said.code == 0, said.errors
    assert "litert fp32, pair" in said.out
    arguments = [litert_bundle, "--backend", "litert", "--num-images", 2, "-o", tmp_path / "out.png"]
    light = [sys.executable, "-m", "edgediff_runtime", *map(str, arguments)]
    done = subprocess.run(light, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("2 images in ")
    assert (tmp_path / "out.png").is_file()


@pytest.mark.long
def test_a_component_is_a_file_with_a_signature_for_each_size(tmp_path: Path) -> None:
    name = "preview_decoder"
    entry, part = written("litert", name, ((12, 20),), tmp_path)
    assert [graph.function for graph in entry.every_graph] == [name, f"{name}_40x24"]
    interpreter = interpreted(tmp_path / str(entry.graphs[0].file))
    for graph, value, wanted in cases(entry, part):
        made = interpreter.get_signature_runner(graph.function)(**{graph.inputs[0].name: value})
        for tensor, want in zip(graph.outputs, wanted, strict=True):
            assert made[tensor.name].shape == tensor.shape
            assert psnr_db(want, made[tensor.name]) > 100


@pytest.mark.long
def test_a_whole_pipeline_draws(export_once: Export) -> None:
    path = export_once(saved_once("sd1", SAVE["sd1"]), edgediff.ExportConfig(steps=2, targets=("litert",)))
    rows = {(row["check"], row["part"]): row["psnr_db"] for row in rows_of(path) if row["status"] == "measured"}
    assert min(number for (check, _), number in rows.items() if check == "graph") > 100
    assert rows["trajectory", "latents"] > 80
    assert rows["picture", "pixels"] > 60
    assert EdgePipeline.from_pretrained(path, backend="litert")(prompt="an apple", seed=1).images.any()


@pytest.mark.long
def test_in_int8_weights_take_a_byte_and_what_is_sensitive_stays_wide(
    litert_bundle: Path, plain_model: Path, export_once: Export
) -> None:
    floors = {"graph_db": 25, "composed_db": 25, "trajectory_db": 20}  # of random weights
    recipe = {"steps": 4, "targets": ["litert"], "litert": {"quantize_nbits": 8}, "verify": {"int8": floors}}
    path = export_once(plain_model, config_from(recipe))
    target = manifest_of(path).target("litert")
    assert target.unet.dtype == "int8"
    assert {tensor.dtype for graph in target.unet.graphs for tensor in graph.outputs} == {"float32"}
    file, whole = ((bundle / FILE).read_bytes() for bundle in (path, litert_bundle))
    assert len(file) < len(whole)
    weights = load_file(plain_model / "unet/diffusion_pytorch_model.safetensors")
    for name, stays in (("conv_in", True), ("down_blocks.1.resnets.0.conv2", False)):
        stored = weights[f"{name}.weight"].transpose(0, 2, 3, 1).tobytes()
        assert whole.count(stored) == 1
        assert (file.count(stored) == 1) == stays
    images = [
        EdgePipeline.from_pretrained(each, backend="litert")(num_images=2, seed=1) for each in (path, litert_bundle)
    ]
    assert 20 < psnr_db(images[1].latents, images[0].latents) < 80


@pytest.mark.long
@pytest.mark.parametrize(
    ("form", "type_", "share", "least_db"),
    [("fp16", "FLOAT16", 0.6, 60), ("int8", "INT8", 0.4, 30), ("int4", "INT4", 0.4, 10)],
)
def test_weights_are_stored_in_fewer_bits_and_made_where_they_are_used(
    form: Any, type_: str, share: float, least_db: float, litert_bundle: Path, plain_model: Path, tmp_path: Path
) -> None:
    model = edgediff.load_model(plain_model)
    weights = weights_of(model.unet)
    stored = StoredWeights(weights, uniform(weights, form, "channels"), "channels")
    whole = read_tflite(litert_bundle / FILE)
    path = tmp_path / "unet.tflite"
    shutil.copy(litert_bundle / FILE, path)
    assert store_weights_in_tflite(path, stored) == weights.keys()  # also those that the converter multiplied
    file = read_tflite(path)
    types = {code: name for name, code in vars(schema().TensorType).items() if isinstance(code, int)}
    assert type_ in {types[tensor.type] for graph in file.subgraphs for tensor in graph.tensors}
    assert sum(kind == "DEQUANTIZE" for *_, kind in operations(file)) > 30
    sizes = [sum(len(b.data) for b in each.buffers if b.data is not None) for each in (file, whole)]
    assert sizes[0] < share * sizes[1]
    # What no constant was multiplied into is, number by number, what torch was told.
    signatures = [interpreted(each).get_signature_runner("full") for each in (path, litert_bundle / FILE)]
    rng = np.random.default_rng(0)
    graph = manifest_of(litert_bundle).target("litert").unet.graphs[0]
    given = {tensor.name: rng.random(tensor.shape).astype(tensor.dtype) for tensor in graph.inputs}
    made, want = (signature(**given)["out_sample"] for signature in signatures)
    assert least_db < psnr_db(want, made) < 140
    name = "down_blocks.1.resnets.0.conv2.weight"
    assert np.array_equal(values_of(file, stored, name), stored.stored(name).values())


def values_of(file: Any, stored: StoredWeights, name: str) -> np.ndarray:
    """A convolution's weight as a file has it, in torch's order; its codes and scales are looked for."""
    wanted = stored.stored(name)
    for graph in file.subgraphs:
        for tensor in graph.tensors:
            data = file.buffers[tensor.buffer].data
            if data is None or tensor.shape is None or not tensor.name.endswith(b";stored"):
                continue
            outputs, *inputs = wanted.values().shape
            if list(tensor.shape) != [outputs, *inputs[1:], inputs[0]]:
                continue
            if isinstance(wanted, Half):
                codes = np.frombuffer(data, np.float16).astype(np.float32)
            elif wanted.bits == 8:
                codes = np.frombuffer(data, np.int8).astype(np.float32)
            else:
                halves = np.frombuffer(data, np.uint8)
                both = np.stack([halves & 15, halves >> 4], axis=1).reshape(-1).astype(np.int8)
                codes = np.where(both > 7, both - 16, both).astype(np.float32)
            found = codes[: int(np.prod(tensor.shape))].reshape(tensor.shape).transpose(0, 3, 1, 2)
            if tensor.quantization is not None and tensor.quantization.scale is not None:
                assert tensor.quantization.quantizedDimension == 0
                found = found * np.array(tensor.quantization.scale, np.float32)[:, None, None, None]
            if np.array_equal(found, wanted.values()):
                return found
    raise AssertionError(f"{name} is not in the file")


@pytest.mark.long
def test_ranges_are_measured_where_activations_are_static(
    litert_bundle: Path, plain_model: Path, export_once: Export
) -> None:
    floors = {"graph_db": 15, "composed_db": 15, "trajectory_db": 10}  # of random weights
    settings = {"quantize_nbits": 8, "activations": "int8", "calibration_images": 1}
    path = export_once(
        plain_model, config_from({"steps": 4, "targets": ["litert"], "litert": settings, "verify": {"int8": floors}})
    )
    file = read_tflite(path / FILE)
    kinds = [kind for *_, kind in operations(file)]
    assert kinds.count("QUANTIZE") > 20
    convolutions = [(graph, operation) for graph, operation, kind in operations(file) if kind == "CONV_2D"]
    int8 = schema().TensorType.INT8
    narrow = [all(graph.tensors[o.inputs[i]].type == int8 for i in (0, 1)) for graph, o in convolutions]
    assert 0 < narrow.count(False) < narrow.count(True)  # the first, the last, shortcuts
    images = [
        EdgePipeline.from_pretrained(each, backend="litert")(num_images=2, seed=1) for each in (path, litert_bundle)
    ]
    assert 10 < psnr_db(images[1].latents, images[0].latents) < 80


@pytest.mark.long
def test_placement_knows_what_the_accelerators_do_not_take(litert_bundle: Path) -> None:
    known = {name for name, code in vars(schema().BuiltinOperator).items() if isinstance(code, int)}
    assert not (LITERT_GPU | LITERT_QUALCOMM | LITERT_MEDIATEK) - known
    found = {(note.rule.id, note.graph): note.ops for note in lint_bundle(litert_bundle)}
    assert found["litert-mediatek-op", "full"].keys() >= {"SIN", "COS"}
    assert "litert-qualcomm-op" not in {rule for rule, _ in found}
    ops = read_signature(litert_bundle / FILE, "cached")
    assert {op.inputs["1"].dtype for op in ops if op.type == "CONV_2D"} == {"float32"}
    wide = Op("ADD", "x", {"0": Value("x", "float32", (1, 2, 3, 4, 5))})
    odd = Op("RFFT2D", "y", outputs=(Value("y", "float32", (1,)),))
    assert [note.rule.id for note in lint([wide, odd], "litert", "full")] == [
        "litert-gpu-op", "litert-gpu-rank", "litert-qualcomm-op", "litert-mediatek-op",
    ]  # fmt: skip


def test_tensors_keep_modules_names_alone() -> None:
    long = (
        "edgediff.models.part.Chain_part/edgediff.models.clockwork.HighresIn_0/torch.nn.modules.conv.Conv2d_conv_in;3"
    )
    assert "/".join(map(_module, long.split("/"))) == "part/0/conv_in;3"
    assert _module("full_sample") == "full_sample"
    assert _module("arith.constant1") == "arith.constant1"


class Eigenvalues(torch.nn.Module):
    """An operation that LiteRT has no form for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x)


class Unknown(Part):
    """A part with it inside."""

    def __init__(self) -> None:
        super().__init__(("sample",), ("out_sample",))
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), Eigenvalues())

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"out_sample": self.layers(tensors["sample"])}


def component_of(part: Part, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> Component:
    sides = (tuple(Tensor(name, "float32", shape) for name, shape in side.items()) for side in (inputs, outputs))
    graph = Graph("full", FILE, "full_step", *sides, function="full")
    return Component("step", "fp32", 1, Floors(100, 100, 80, None), (graph,), "pair")


@pytest.mark.long
def test_an_operation_without_a_form_is_named_with_its_module(tmp_path: Path) -> None:
    part = Unknown()
    component = component_of(part, {"sample": (1, 4, 4)}, {"out_sample": (1, 4)})
    with pytest.raises(UnsupportedError, match=r"unet\.tflite: .*_linalg_eigh.*layers\.1 \(Eigenvalues\)"):
        write_litert(tmp_path, component, {"full": part}, lambda what: None)


@pytest.mark.long
def test_what_is_damaged_or_of_another_shape_is_refused(litert_bundle: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(litert_bundle, tmp_path / "damaged")
    flip_bit(damaged / FILE)
    assert_refused(damaged, FILE, run=False)
    manifest = manifest_of(litert_bundle)
    for name, content in (("short", (litert_bundle / FILE).read_bytes()[:2000]), ("foreign", b"no model" * 100)):
        other = shutil.copytree(litert_bundle, tmp_path / name)
        (other / FILE).write_bytes(content)
        reseal(other, manifest)
        with pytest.raises(BundleError, match=r"unet\.tflite cannot be loaded by LiteRT: .*; export again"):
            LiteRtSession(open_bundle(other))
    other = shutil.copytree(litert_bundle, tmp_path / "other")
    for changes, said in (
        ({"function": "no_such"}, r"has no signature 'no_such'; it has: "),
        ({"inputs": manifest.target("litert").unet.graphs[1].inputs[:-1]}, r"has the inputs .*; the manifest says"),
    ):
        seal(other, replace_graph(manifest, 1, **changes))
        with pytest.raises(BundleError, match=said):
            LiteRtSession(open_bundle(other))


@pytest.mark.long
@pytest.mark.parametrize(
    ("hidden", "said"),
    [("ai_edge_litert", "which is not installed; pip install"), ("ai_edge_litert.options", "which is older than 2.3")],
)
def test_a_runtime_that_is_missing_or_old_is_named(
    litert_bundle: Path, monkeypatch: pytest.MonkeyPatch, hidden: str, said: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{hidden}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(RequestError, match=f"backend 'litert' needs ai-edge-litert, {said}"):
        LiteRtSession(open_bundle(litert_bundle))


def test_without_the_converter_the_command_that_installs_it_is_named(
    class_model: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    said = command("export", class_model, "-o", place / "bundle", "--target", "litert")
    assert_error(said, 'pip install "edgediff[litert]"')
    assert not (place / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "fp16"), "--dtype fp16: LiteRT has fp32 alone"),
        (("--size", "any"), "LiteRT take fixed sizes"),
        (("--quantize-nbits", 4), "litert.quantize_nbits"),
        (("--weights", "palette4"), "LiteRT has fp16, int8, int4"),
    ],
)
def test_what_it_does_not_have_is_refused(
    class_model: Path, place: Path, command: Command, arguments: tuple[str, ...], said: str
) -> None:
    assert_error(command("export", class_model, "-o", place / "bundle", "--target", "litert", *arguments), said)
    assert not (place / "bundle").exists()
