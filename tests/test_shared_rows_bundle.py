"""Bundles whose graphs take a sample once for each image: the loop, verification, backends, and what is refused."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from artefacts import exported, saved_once
from conftest import SMALL_TEXT, Export, save_text_model
from edits import picture
from onnx import helper
from pipelines import config_of, saved
from seals import assert_refused, manifest_of, replace_graph, reseal, seal, seal_plain
from unets import unet2d_condition

from edgediff import verify_bundle
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, reference_request
from edgediff.config.floors import QuantizedFloors, VerifyConfig
from edgediff.export.export_config import ExportConfig
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.manifest import Tensor
from edgediff_runtime.ort_bound_session import OrtBoundSession
from edgediff_runtime.ort_session import OrtSession

APART = "edgediff.targets.onnx.write_onnx.APART_BYTES"


@pytest.fixture
def large(export_once: Export) -> Export:
    """Exports a model with every graph counting as too large for its rows to go apart."""
    return lambda model, **said: export_once(model, ExportConfig(steps=4, **said), {APART: 0})


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every tensor that a session is handed, as it is handed them; a number alone has none."""
    rows: list[int] = []
    put = OrtSession.put
    monkeypatch.setattr(OrtSession, "put", lambda self, array: rows.extend(array.shape[:1]) or put(self, array))
    return rows


def asked(bundle: Path) -> dict[str, Any]:
    """What the reference was made from."""
    return reference_request(manifest_of(bundle), load_reference(bundle / REFERENCE).conditioning)


def shares(bundle: Path, target: str = "onnx") -> dict[str, bool]:
    graphs = manifest_of(bundle).target(target).unet.graphs
    return {graph.name: graph.shares_rows for graph in graphs if any(t.name == "sample" for t in graph.inputs)}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["pair", "split"])
def test_a_bundle_that_shares_rows_makes_the_same_images(
    layout: Any, text_model: Path, text_bundle: Path, large: Export, handed: list[int]
) -> None:
    bundle = large(text_model, layout=layout)
    assert set(shares(bundle).values()) == {True}
    assert set(shares(text_bundle).values()) == {False}
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


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_a_bundle_with_controlnets_shares_rows(count: int) -> None:
    config = config_of("sd1", control=count)
    shared, each = (EdgePipeline.from_pretrained(exported(saved("sd1"), config, said)) for said in ({APART: 0}, {}))
    for pipe, shares_rows in ((shared, True), (each, False)):
        taking = [graph for graph in pipe.session.graphs if graph.takes_sample]
        assert {graph.name for graph in taking} == {"controlnet", "full", "cached"}
        assert {graph.shares_rows for graph in taking} == {shares_rows}
    # Other words for each image: rows that were repeated in another order than the text's would show.
    request: dict[str, Any] = {"prompt": ["a red bowl", "a green tree"], "seed": 5, "clock": 2, "guidance_scale": 5.0}
    request["num_inference_steps"] = 4
    for control in (None, [picture(), picture(3)][:count] if count > 1 else picture()):
        one, other = (pipe(**request, control_image=control).latents for pipe in (shared, each))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.long
def test_what_rows_share_is_verified_without_guidance_too(text_model: Path, large: Export, tmp_path: Path) -> None:
    made = large(text_model, layout="pair", verify=VerifyConfig(mode="graphs"))
    bundle = shutil.copytree(made, tmp_path / "bundle")
    assert len(load_reference(bundle / REFERENCE).steps[0].tensors["sample"]) == 1
    for name in ("full", "cached"):
        file = bundle / f"onnx/unet/{name}.onnx"
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


@pytest.mark.long
def test_openvino_is_handed_a_sample_once(text_model: Path, text_bundle: Path, large: Export, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = shutil.copytree(large(text_model, layout="pair", targets=("onnx", "openvino")), tmp_path / "bundle")
    assert set(shares(bundle, "openvino").values()) == {True}
    request = asked(bundle) | {"num_images": 2, "seed": 1, "guidance_scale": [3.0, 3.0, 1.0, 1.0]}
    wanted = EdgePipeline.from_pretrained(text_bundle)(**request).latents
    alone = msgspec.structs.replace(manifest_of(bundle), targets=(manifest_of(bundle).target("onnx"),))
    for _ in range(2):  # OpenVINO's own models, then the ONNX graphs
        made = EdgePipeline.from_pretrained(bundle, backend="openvino")(**request).latents
        np.testing.assert_allclose(made, wanted, atol=1e-3)
        seal(bundle, alone)


@pytest.mark.long
def test_graphs_of_eight_bits_share_rows(text_model: Path, export_once: Export) -> None:
    # Random weights lose more than trained ones.
    loose = VerifyConfig(int8=QuantizedFloors(graph_db=20, composed_db=20, trajectory_db=20))
    config = ExportConfig(steps=4, layout="pair", onnx=OnnxConfig(quantize_nbits=8), verify=loose)
    small, bundle = export_once(text_model, config), export_once(text_model, config, {APART: 0})
    assert set(shares(bundle).values()) == {True}
    assert set(shares(small).values()) == {False}
    cached = onnx.load(bundle / "onnx/unet/cached.onnx", load_external_data=False)
    assert any(node.op_type == "QuantizeLinear" for node in cached.graph.node)
    one, other = (EdgePipeline.from_pretrained(path)(**asked(path)).latents for path in (bundle, small))
    assert psnr_db(one, other) > 60


@pytest.mark.long
def test_a_portable_graph_and_a_small_one_take_every_row(class_model: Path, text_bundle: Path, large: Export) -> None:
    portable = large(class_model, layout="split", onnx=OnnxConfig(portable=True))
    assert set(shares(text_bundle).values()) == set(shares(portable).values()) == {False}


@pytest.mark.long
def test_the_undivided_step_beside_it_shares_rows_too(text_model: Path, large: Export) -> None:
    model = manifest_of(large(text_model, layout="pair")).target("onnx").unet.model
    assert model is not None
    assert model.shares_rows


WITHOUT_ATTENTION_FIRST = SMALL_TEXT | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.mark.long
def test_a_cached_step_that_never_looks_at_the_text_shares_rows(
    large: Export, monkeypatch: pytest.MonkeyPatch, handed: list[int]
) -> None:
    unet = unet2d_condition(**WITHOUT_ATTENTION_FIRST)
    model = saved_once("attention-below", lambda path: save_text_model(unet, path))
    bundle = large(model, layout="pair")
    cached = next(graph for graph in manifest_of(bundle).target("onnx").unet.graphs if graph.name == "cached")
    assert "encoder_hidden_states" not in {tensor.name for tensor in cached.inputs}
    assert shares(bundle) == {"full": True, "cached": True}
    request = asked(bundle) | {"num_images": 2}
    handed.clear()
    wanted = EdgePipeline.from_pretrained(bundle)(**request).latents
    # Beside the four times, samples of two images and a text of four rows.
    assert Counter(handed) == {1: 4, 2: 4, 4: 1}
    # A graph of the step that asks for every row has all of them handed every row.
    monkeypatch.setattr("edgediff_runtime.loop.share_rows", lambda graphs: False)
    np.testing.assert_allclose(EdgePipeline.from_pretrained(bundle)(**request).latents, wanted, atol=1e-4)


@pytest.mark.long
def test_tensors_that_stay_on_a_device_share_rows_too(text_model: Path, text_bundle: Path, large: Export) -> None:
    bundle = large(text_model, layout="pair")
    request = asked(bundle) | {"num_images": 3}
    bound = EdgePipeline(manifest_of(bundle), OrtBoundSession(open_bundle(bundle), "cpu"))(**request).latents
    np.testing.assert_allclose(bound, EdgePipeline.from_pretrained(text_bundle)(**request).latents, atol=1e-4)


@pytest.mark.long
def test_manifests_that_say_otherwise_are_refused(text_model: Path, large: Export, tmp_path: Path) -> None:
    bundle = shutil.copytree(large(text_model, layout="pair"), tmp_path / "bundle")
    kept = manifest_of(bundle)
    shared = "sample in full is 'images'; expected batch: graphs share rows where the batch is symbolic"

    def refused(change: Callable[[list[dict[str, Any]]], Any], words: str) -> None:
        seal_plain(bundle, lambda m: change(m["targets"][0]["components"]["unet"]["graphs"][0]["inputs"]))
        assert_refused(bundle, words)
        seal(bundle, kept)

    refused(lambda inputs: inputs.__delitem__(2), shared)
    refused(lambda inputs: inputs[2]["shape"].__setitem__(0, "images"), "expected batch first")
    refused(lambda inputs: inputs[0]["shape"].__setitem__(1, "images"), "expected sizes")
    refused(lambda inputs: inputs[0]["shape"].__setitem__(0, "rows"), "matching regex")

    def every_row(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (msgspec.structs.replace(tensors[0], shape=("batch", *tensors[0].shape[1:])), *tensors[1:])

    seal(bundle, replace_graph(kept, 0, inputs=every_row(kept.targets[0].unet.graphs[0].inputs)))
    assert_refused(bundle, r"onnx/unet/full.onnx has sample as .*images.*; the manifest says .*batch")
