"""Wavelet-gated students as bundles: numbers, operations, and how many partitions they fall into."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import LABELS, SMALL_CLASS, save_model
from learned import trained
from onnxruntime.tools.mobile_helpers.usability_checker import check_coreml_partitions
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from unets import unet2d

import edgediff
from edgediff.inspect.placement import COREML, lint_bundle
from edgediff.mil.ops import OPS
from edgediff.mil.package import read_package
from edgediff.models.spectral import spectralize
from edgediff.targets.coreml.mil_operations import mil_ops
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline, open_bundle

# Of ai.onnx, with a kernel for WebGPU: docs/webgpu-operators.md in the npm package onnxruntime-web 1.30.0. On the CPU
# the package is ONNX Runtime itself, compiled to WebAssembly; its README.md says all operators of ai.onnx.
_NAMES = (
    "Abs Acos Acosh Add ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Clip Concat "
    "Conv ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand "
    "Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual "
    "GridSample HardSigmoid HardSwish If InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log "
    "MatMul MaxPool MemcpyFromHost MemcpyToHost Mul Neg Not Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize "
    "ScatterND Shape Sigmoid SimplifiedLayerNormalization Sin Sinh Slice Softmax Split Sqrt Squeeze Sub Tan Tanh "
    "ThresholdedRelu Tile Transpose Unsqueeze Where"
)
WEBGPU = frozenset(_NAMES.split())
FLOORS = {
    ("onnxruntime", "graph"): 100.0,
    ("onnxruntime", "composed"): 90.0,
    ("onnxruntime", "trajectory"): 70.0,
    ("mil-reference", "program"): 100.0,
    ("mil-reference", "graph"): 45.0,
    ("mil-reference", "composed"): 45.0,
    ("mil-reference", "trajectory"): 35.0,
}
Exported = tuple[Path, edgediff.ParityReport]

pytestmark = pytest.mark.long


def export(folder: Path, layout: str, adaptor: bool, build: dict[str, Any], **settings: Any) -> Exported:
    plain = unet2d(**SMALL_CLASS, **build)
    torch.manual_seed(0)
    save_model(spectralize(plain, **settings), folder / "student")
    (folder / "student" / "classes.json").write_text(json.dumps(LABELS))
    model = edgediff.load_model(folder / "student")
    config = edgediff.ExportConfig(
        steps=4, clock=2, layout=layout, targets=("onnx", "coreml"), onnx=OnnxConfig(portable=True),
        adaptor=str(trained(model, folder / "adaptor")) if adaptor else None,
    )  # fmt: skip
    done = edgediff.export_bundle(model, folder / "bundle", config)
    assert done.report is not None
    return folder / "bundle", done.report


@pytest.fixture(scope="module")
def split_bundle(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The paper's gating, Haar, on the way up within a residual block, in four graphs."""
    build = {"upsample_type": "resnet"}
    return export(tmp_path_factory.mktemp("spectral") / "split", "split", adaptor=False, build=build)


@pytest.fixture(scope="module")
def pair_bundle(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Another wavelet, gates that look at the time, and a learned adaptor, in a full and a cached step."""
    folder = tmp_path_factory.mktemp("spectral") / "pair"
    return export(folder, "pair", adaptor=True, build={"mid_block_type": None}, wavelet="db2", gate_takes_time=True)


@pytest.fixture(params=["split", "pair"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(f"{request.param}_bundle")


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    """The ONNX graphs of a step by name, with their weights."""
    unet = open_bundle(bundle).manifest.target("onnx").unet
    return {graph.name: onnx.load(bundle / graph.file) for graph in unet.graphs if graph.file is not None}


def test_every_number_holds(exported: Exported) -> None:
    _, report = exported
    assert report.ok
    measured = {(row.backend, row.check) for row in report.rows if row.status == "measured"}
    assert measured == {*FLOORS, ("onnxruntime", "caching"), ("mil-reference", "caching")}
    for row in report.rows:
        if (floor := FLOORS.get((row.backend, row.check))) is not None:
            assert row.floor_db == floor
            assert row.psnr_db is not None
            assert row.psnr_db >= floor, (row.backend, row.check, row.part)


def test_the_manifest_knows_adaptor_and_layout(split_bundle: Exported, pair_bundle: Exported) -> None:
    split, pair = (open_bundle(bundle).manifest for bundle, _ in (split_bundle, pair_bundle))
    assert [graph.name for graph in split.targets[0].unet.graphs] == ["highres_in", "lowres", "adaptor", "highres_out"]
    assert [graph.name for graph in pair.targets[0].unet.graphs] == ["full", "cached"]
    assert (split.adaptor.kind, pair.adaptor.kind) == ("identity", "resnet")
    assert split.operating_point.mask == pair.operating_point.mask == (1, 0, 1, 0)
    # The cache is the feature whose quarters are the bands that WG-Up puts together, at half the sample's size.
    assert split.cache_bytes == 4 * 16 * 8 * 8


def test_bundles_run(exported: Exported) -> None:
    result = EdgePipeline.from_pretrained(exported[0])(label="Kiwi", num_images=2, seed=3)
    assert result.images.shape == (2, 16, 16, 3)
    assert [step.full for step in result.ledger] == [True, False, True, False]


# Operations


def test_the_evaluator_knows_every_operation(exported: Exported) -> None:
    packages = sorted((exported[0] / "coreml").glob("*.mlpackage"))
    functions = [(spec, name) for spec in (read_package(p).spec for p in packages) for name in spec.mlProgram.functions]
    assert len(functions) in (2, 3)
    for spec, name in functions:
        assert {op.type for op in mil_ops(spec, name)} - {"input", "output"} <= OPS.keys()


def test_onnxruntime_web_has_every_operation(exported: Exported, tmp_path: Path) -> None:
    for name, model in graphs(exported[0]).items():
        assert {entry.domain for entry in model.opset_import} == {""}
        assert all(node.domain == "" and onnx.defs.has(node.op_type, 21) for node in model.graph.node)
        # ONNX Runtime writes what no kernel computes in other operations before it assigns them: nothing is left to.
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert session.get_providers() == ["CPUExecutionProvider"]
        inlined = onnx.load(tmp_path / f"{name}.onnx").graph.node
        assert [node.op_type for node in inlined] == [node.op_type for node in model.graph.node]
        assert {(node.domain, node.op_type) for node in inlined} <= {("", op) for op in WEBGPU}, name


def test_gating_divides_no_graph_on_mobile_accelerators(exported: Exported) -> None:
    # By ONNX Runtime's own checker and list. What the Core ML provider leaves to the CPU is what any UNet has: the
    # timestep is repeated and the class looked up, both at the beginning of a step.
    found = {}
    for name, model in graphs(exported[0]).items():
        make_dim_param_fixed(model.graph, "batch", 2)
        inferred = onnx.shape_inference.infer_shapes(model)
        info = check_coreml_partitions(inferred, True, "coreml_supported_mlprogram_ops.md")
        outside = [node.op_type for node in model.graph.node if f"ai.onnx:{node.op_type}" in info.unsupported_ops]
        found[name] = (info.num_partitions, sorted(outside))
    step = (2, ["Expand", "Gather"])
    assert found in (
        {"highres_in": step, "lowres": (1, []), "highres_out": (1, [])},
        {"full": step, "cached": step},
    )


def test_placement_knows_nothing_of_gating(exported: Exported) -> None:
    notes = lint_bundle(exported[0])
    known = {"ane-flexible-shape", "coreml-ep-pad", "ane-phone-weights", "ane-large-program"}
    assert not known & {note.rule.id for note in notes}
    outside = [op for note in notes if note.rule.id == "coreml-ep-op" for op in note.ops]
    assert set(outside) == {"Expand"}
    for model in graphs(exported[0]).values():
        assert {node.op_type for node in model.graph.node} - COREML <= {"Expand"}
