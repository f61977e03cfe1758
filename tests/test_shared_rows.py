"""What guidance asks for twice and is computed once: where the pass fires, that the numbers hold, and who is told."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from seals import assert_refused, manifest_of, replace_graph, reseal, seal, seal_plain

import edgediff
from edgediff import verify_bundle
from edgediff.bench.backends import export_undivided
from edgediff.config import ExportConfig, OnnxConfig, QuantizedFloors, VerifyConfig
from edgediff.export.shared_rows import has_shared_rows, share_rows
from edgediff.verify.psnr import psnr_db
from edgediff.verify.reference import REFERENCE, load_reference, reference_request
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.manifest import Tensor
from edgediff_runtime.ort_session import OrtSession

SIZE, CHANNELS, TOKENS, WIDTH = 4, 3, 2, 5
# Tensors that are made of the sample and the time alone, whose sizes the graph tells.
INSIDE = ("times", "column", "emb", "emb_map", "skip", "with_time", "x", "x_rows")


def node(kind: str, inputs: str, output: str, **said: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], output, **said)


def tensor(name: str, *sizes: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def denoising(
    change: Callable[[list[NodeProto]], None] | None = None, *, outputs: tuple[str, ...] = ("out_sample",),
    without: tuple[str, ...] = (),
) -> ModelProto:  # fmt: skip
    """A step in small: two convolutions with the time added in between, then attention's products with a text.

    `change` rewrites the nodes, `outputs` are given, and of the tensors `without` no sizes are known.
    """
    rng = np.random.default_rng(0)
    weights = {
        "w": (CHANNELS, CHANNELS, 3, 3), "v": (CHANNELS, CHANNELS, 3, 3), "joined": (CHANNELS, 2 * CHANNELS, 1, 1),
        "of_time": (1, CHANNELS), "of_text": (WIDTH, CHANNELS),
    }  # fmt: skip
    integers = {"pixels": [0, CHANNELS, -1], "map": [0, CHANNELS, SIZE, SIZE], "ends": [2, 3], "last": [1]}
    nodes = [
        node("Shape", "sample", "rows", start=0, end=1),
        node("Expand", "timestep rows", "times"),
        node("Unsqueeze", "times last", "column"),
        node("MatMul", "column of_time", "emb"),
        node("Unsqueeze", "emb ends", "emb_map"),
        node("Conv", "sample w", "skip", pads=[1, 1, 1, 1]),
        node("Add", "skip emb_map", "with_time"),
        node("Conv", "with_time v", "x", pads=[1, 1, 1, 1]),
        node("Reshape", "x pixels", "x_rows"),
        node("MatMul", "encoder_hidden_states of_text", "keys"),
        node("MatMul", "keys x_rows", "scores"),
        node("Softmax", "scores", "weights", axis=1),
        node("Transpose", "keys", "values", perm=[0, 2, 1]),
        node("MatMul", "values weights", "seen"),
        node("Reshape", "seen map", "seen_map"),
        node("Concat", "seen_map skip", "both", axis=1),
        node("Conv", "both joined", "y"),
        node("Add", "y emb_map", "out_sample"),
    ]
    if change is not None:
        change(nodes)
    image = (CHANNELS, SIZE, SIZE)
    sizes = {
        "times": (), "column": (1,), "emb": (CHANNELS,), "emb_map": (CHANNELS, 1, 1), "skip": image, "with_time": image,
        "x": image, "x_rows": (CHANNELS, SIZE * SIZE), "out_sample": image,
        "skip_joined": (2 * CHANNELS,), "seen_map_joined": (2 * CHANNELS,),
    }  # fmt: skip
    made = {name: tensor(name, "batch", *size) for name, size in sizes.items()}
    text = tensor("encoder_hidden_states", "batch", TOKENS, WIDTH)
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("sample", "batch", *image), tensor("timestep", 1), text],
        [made[name] for name in outputs],
        [
            *(
                numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name)
                for name, size in weights.items()
            ),
            *(numpy_helper.from_array(np.array(values), name) for name, values in integers.items()),
        ],
        value_info=[made[name] for name in INSIDE if name not in (*outputs, *without)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: ModelProto, sample: np.ndarray, text: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"sample": sample, "timestep": np.array([7.0], np.float32), "encoder_hidden_states": text}
    return [np.asarray(made) for made in session.run(None, given)]


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(each.op_type for each in model.graph.node)


def drawn(images: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(images)
    sample = rng.standard_normal((images, CHANNELS, SIZE, SIZE)).astype(np.float32)
    return sample, rng.standard_normal((rows, TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(("images", "copies"), [(1, 1), (1, 2), (3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("outputs", [("out_sample",), ("out_sample", "skip", "emb")])
def test_images_are_convolved_once_and_repeated(images: int, copies: int, outputs: tuple[str, ...]) -> None:
    before, after = denoising(outputs=outputs), share_rows(denoising(outputs=outputs))
    sample, text = drawn(images, copies * images)
    rows = np.concatenate([sample] * copies)
    wanted = run(before, rows, text)
    for given in (sample, rows):
        for one, other in zip(run(after, given, text), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_where_rows_part() -> None:
    model = share_rows(denoising())
    tiles = [each for each in model.graph.node if each.op_type == "Tile"]
    # What the text meets, and what lay beside it; the time has one row, which sums repeat themselves.
    assert [each.input[0] for each in tiles] == ["x_rows", "skip"]
    assert "Expand" not in kinds(model)
    assert has_shared_rows(model)
    assert not has_shared_rows(denoising())
    # Sizes that are no longer true are not told.
    assert {value.name for value in model.graph.value_info} == set()


def test_results_of_the_graph_keep_their_names_and_have_all_rows() -> None:
    model = share_rows(denoising(outputs=("out_sample", "skip", "emb")))
    tiles = {each.output[0]: each.input[0] for each in model.graph.node if each.op_type == "Tile"}
    assert tiles == {"x_rows.copies": "x_rows", "skip.copies": "skip.few", "skip": "skip.few", "emb": "emb.few"}
    assert [value.name for value in model.graph.output] == ["out_sample", "skip", "emb"]


def test_a_time_that_is_joined_to_images_or_rows_is_repeated_for_them() -> None:
    def join(nodes: list[NodeProto]) -> None:
        for of in ("skip", "seen_map"):
            nodes.append(node("ReduceMean", f"{of} ends", f"{of}_mean", keepdims=0))
            nodes.append(node("Concat", f"{of}_mean emb", f"{of}_joined", axis=1))

    outputs = ("out_sample", "skip_joined", "seen_map_joined")
    sample, text = drawn(2, 4)
    wanted = run(denoising(join, outputs=outputs), np.concatenate([sample, sample]), text)
    model = share_rows(denoising(join, outputs=outputs))
    for one, other in zip(run(model, sample, text), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    repeated = {each.output[0] for each in model.graph.node if each.op_type == "Tile"}
    assert repeated == {"x_rows.copies", "skip.copies", "emb.images", "emb.rows", "skip_joined"}


def counted(nodes: list[NodeProto]) -> None:
    """Sizes are taken from a tensor of images."""
    nodes.insert(6, node("Shape", "skip", "like"))
    nodes[15].input[1] = "like"


def parted(nodes: list[NodeProto]) -> None:
    """The text is looked at between the convolutions."""
    keys = nodes.pop(9)
    nodes[7].input[0] = "with_text"
    nodes[7:7] = [
        keys,
        node("ReduceMean", "keys last", "text", keepdims=0),
        node("Unsqueeze", "text ends", "text_map"),
        node("Add", "with_time text_map", "with_text"),
    ]


@pytest.mark.parametrize(("change", "without"), [(counted, ()), (parted, ()), (None, ("skip",))])
def test_it_leaves_alone_what_it_cannot_share(change: Any, without: tuple[str, ...]) -> None:
    model = denoising(change, without=without)
    before = model.SerializeToString(deterministic=True)
    assert run(model, *drawn(2, 2))
    assert share_rows(model).SerializeToString(deterministic=True) == before


def test_without_a_condition_there_is_nothing_to_share() -> None:
    model = denoising()
    model.graph.input[2].name = "other"
    for each in model.graph.node:
        each.input[:] = ["other" if name == "encoder_hidden_states" else name for name in each.input]
    before = model.SerializeToString(deterministic=True)
    assert share_rows(model).SerializeToString(deterministic=True) == before


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph counts as too large for its rows to go apart."""
    monkeypatch.setattr("edgediff.export.onnx.APART_BYTES", 0)


def export(model: Path, folder: Path, **said: Any) -> Path:
    done = edgediff.export_bundle(edgediff.load_model(model), folder, ExportConfig(steps=4, **said))
    assert done.report is not None
    return folder


def asked(bundle: Path) -> dict[str, Any]:
    """What the reference was made from."""
    return reference_request(manifest_of(bundle), load_reference(bundle / REFERENCE).conditioning)


def shares(bundle: Path, target: str = "onnx") -> dict[str, bool]:
    graphs = manifest_of(bundle).target(target).graphs
    return {graph.name: graph.shares_rows for graph in graphs if any(t.name == "sample" for t in graph.inputs)}


@pytest.mark.usefixtures("large", "traced_once")
@pytest.mark.parametrize("layout", ["pair", "split"])
def test_a_bundle_that_shares_rows_makes_the_same_images(
    layout: Any, text_model: Path, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(text_model, tmp_path / "bundle", layout=layout)
    assert set(shares(bundle).values()) == {True}
    assert set(shares(text_bundle).values()) == {False}
    handed = []
    put = OrtSession.put
    monkeypatch.setattr(OrtSession, "put", lambda self, array: handed.append(len(array)) or put(self, array))
    for images in (1, 3):
        request = asked(bundle) | {"num_images": images, "seed": 5, "guidance_scale": [3.0, 1.0, 3.0, 3.0]}
        one, other = (EdgePipeline.from_pretrained(path)(**request) for path in (bundle, text_bundle))
        assert one.mask == other.mask
        # Convolutions of one row and of two are added up in another order.
        np.testing.assert_allclose(one.latents, other.latents, atol=1e-4)
    handed.clear()
    EdgePipeline.from_pretrained(bundle)(**request | {"guidance_scale": 3.0})
    # Four times and a step's sample each, of three rows where the text has six.
    assert Counter(handed) == {1: 4, 3: 4, 6: 1}


@pytest.mark.usefixtures("large", "traced_once")
def test_what_rows_share_is_verified_without_guidance_too(text_model: Path, tmp_path: Path) -> None:
    bundle = export(text_model, tmp_path / "bundle", layout="pair", verify=VerifyConfig(mode="graphs"))
    assert len(load_reference(bundle / REFERENCE).steps[0].tensors["sample"]) == 1
    for name in ("full", "cached"):
        file = bundle / "onnx" / f"{name}.onnx"
        model = onnx.load(file, load_external_data=False)
        tile = next(each for each in model.graph.node if each.op_type == "Tile")
        # The second copy is wrong; a row alone has none.
        at = list(model.graph.node).index(tile)
        model.graph.node.insert(at, helper.make_node("Neg", [tile.input[0]], ["wrong"]))
        model.graph.node[at + 1].CopyFrom(
            helper.make_node("Concat", [tile.input[0], "wrong"], list(tile.output), axis=0)
        )
        file.write_bytes(model.SerializeToString())
    reseal(bundle)
    report = verify_bundle(bundle)
    assert not report.ok
    assert {row.part for row in report.rows if row.ok is False} == {"full", "cached"}


@pytest.mark.usefixtures("large", "traced_once")
def test_openvino_is_handed_a_sample_once(text_model: Path, text_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = export(text_model, tmp_path / "bundle", layout="pair", targets=("onnx", "openvino"))
    assert set(shares(bundle, "openvino").values()) == {True}
    request = asked(bundle) | {"num_images": 2, "seed": 1, "guidance_scale": [3.0, 3.0, 1.0, 1.0]}
    wanted = EdgePipeline.from_pretrained(text_bundle)(**request).latents
    alone = msgspec.structs.replace(manifest_of(bundle), targets=(manifest_of(bundle).target("onnx"),))
    for _ in range(2):  # OpenVINO's own models, then the ONNX graphs
        made = EdgePipeline.from_pretrained(bundle, backend="openvino")(**request).latents
        np.testing.assert_allclose(made, wanted, atol=1e-3)
        seal(bundle, alone)


@pytest.mark.usefixtures("traced_once")
def test_graphs_of_eight_bits_share_rows(text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights lose more than trained ones.
    loose = VerifyConfig(int8=QuantizedFloors(graph_db=20, composed_db=20, trajectory_db=20))
    said: dict[str, Any] = {"layout": "pair", "onnx": OnnxConfig(quantize_nbits=8), "verify": loose}
    small = export(text_model, tmp_path / "small", **said)
    monkeypatch.setattr("edgediff.export.onnx.APART_BYTES", 0)
    bundle = export(text_model, tmp_path / "bundle", **said)
    assert set(shares(bundle).values()) == {True}
    assert set(shares(small).values()) == {False}
    assert "QuantizeLinear" in kinds(onnx.load(bundle / "onnx" / "cached.onnx", load_external_data=False))
    one, other = (EdgePipeline.from_pretrained(path)(**asked(path)).latents for path in (bundle, small))
    assert psnr_db(one, other) > 60


@pytest.mark.usefixtures("traced_once")
def test_a_portable_graph_and_a_small_one_take_every_row(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = export(text_model, tmp_path / "small", layout="pair")
    monkeypatch.setattr("edgediff.export.onnx.APART_BYTES", 0)
    portable = export(text_model, tmp_path / "portable", layout="pair", onnx=OnnxConfig(portable=True))
    assert set(shares(small).values()) == set(shares(portable).values()) == {False}
    session = manifest_of(small).target("onnx").session
    assert session is not None
    assert session.rows_apart


@pytest.mark.usefixtures("large", "traced_once")
def test_the_undivided_unet_beside_it_shares_rows_too(text_model: Path, tmp_path: Path) -> None:
    path = export(text_model, tmp_path / "bundle", layout="pair")
    bundle = open_bundle(path)
    (tmp_path / "whole").mkdir()
    first = load_reference(path / REFERENCE).steps[0].tensors
    whole = export_undivided(bundle, first, tmp_path / "whole")
    assert whole.graph.shares_rows


@pytest.mark.usefixtures("large", "traced_once")
def test_manifests_that_say_otherwise_are_refused(text_model: Path, tmp_path: Path) -> None:
    bundle = export(text_model, tmp_path / "bundle", layout="pair")
    kept = manifest_of(bundle)
    for change, words in (
        (lambda m: m["targets"][0]["session"].update(rows_apart=True), r"shape of sample is .*; expected batch first"),
        (lambda m: m["targets"][0]["graphs"][0]["inputs"][2]["shape"].__setitem__(0, "images"), "expected batch first"),
        (lambda m: m["targets"][0]["graphs"][0]["inputs"][0]["shape"].__setitem__(1, "images"), "expected sizes"),
        (lambda m: m["targets"][0]["graphs"][0]["inputs"][0]["shape"].__setitem__(0, "rows"), "rows"),
    ):  # fmt: skip
        seal_plain(bundle, change)
        assert_refused(bundle, words)
        seal(bundle, kept)

    def every_row(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (msgspec.structs.replace(tensors[0], shape=("batch", *tensors[0].shape[1:])), *tensors[1:])

    seal(bundle, replace_graph(kept, 0, inputs=every_row(kept.targets[0].graphs[0].inputs)))
    assert_refused(bundle, r"onnx/full.onnx has sample as .*images.*; the manifest says .*batch")
