"""Two ONNX graphs over one file of weights."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command, assert_error
from conftest import Export
from onnx import TensorProto, numpy_helper
from seals import assert_refused, flip_bit, manifest_of, rows_of

import edgediff
from edgediff.targets.onnx.pool_weights import POOLED_BYTES, pool_weights
from edgediff_runtime import BundleError, EdgePipeline, open_bundle

WEIGHTS = "onnx/unet/weights.bin"


@pytest.fixture(scope="module")
def pair_bundle(class_model: Path, export_once: Export) -> Path:
    """The class model as a full and a cached step; weights above a few bytes count as large on the way."""
    large = {"edgediff.targets.onnx.write_onnx.EXTERNAL_DATA_BYTES": 2**10}
    path = export_once(class_model, edgediff.ExportConfig(steps=4, layout="pair"), large)
    assert {(row["check"], row["part"]) for row in rows_of(path)} >= {
        ("graph", "full"), ("graph", "cached"), ("composed", "full"), ("composed", "cached"),
    }  # fmt: skip
    return path


def test_shared_weights_are_stored_once(pair_bundle: Path, class_bundle: Path) -> None:
    target = manifest_of(pair_bundle).target("onnx")
    assert [(g.name, g.file, g.frequency, g.external_data) for g in target.unet.graphs] == [
        ("full", "onnx/unet/full.onnx", "full_step", (WEIGHTS,)),
        ("cached", "onnx/unet/cached.onnx", "cached_step", (WEIGHTS,)),
    ]
    assert sorted(file.name for file in (pair_bundle / "onnx/unet").iterdir()) == [
        "cached.onnx", "config.json", "full.onnx", "model.onnx", "weights.bin",
    ]  # fmt: skip
    places: dict[str, set[tuple[str, str]]] = {}
    for name in ("full", "cached"):
        model = onnx.load(pair_bundle / f"onnx/unet/{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            inside = tensor.data_location != TensorProto.EXTERNAL
            assert inside == (np.prod(tensor.dims) * 4 < POOLED_BYTES), tensor.name
            if not inside:
                entry = {item.key: item.value for item in tensor.external_data}
                places.setdefault(name, set()).add((entry["offset"], entry["length"]))
    # All that the cached step has, the full step has too.
    assert places["cached"] < places["full"]
    size = (pair_bundle / WEIGHTS).stat().st_size
    assert size <= sum(int(length) for _, length in places["full"]) + 64 * len(places["full"])
    assert size <= sum(file.stat().st_size for file in (class_bundle / "onnx/unet").iterdir())


def test_the_images_are_those_of_the_parts(pair_bundle: Path, class_bundle: Path) -> None:
    request = {"num_images": 3, "guidance_scale": [2.0, 1.0, 1.0, 2.0], "seed": 3}
    pair, split = (EdgePipeline.from_pretrained(path)(**request) for path in (pair_bundle, class_bundle))
    assert pair.mask == split.mask
    assert np.abs(pair.latents - split.latents).max() < 1e-4
    assert set(pair.ledger[1].ms) == {"cached", "scheduler", "other"}


def test_damaged_weights_are_refused(pair_bundle: Path, command: Command, place: Path) -> None:
    bundle = shutil.copytree(pair_bundle, place / "bundle")
    flip_bit(bundle / WEIGHTS)
    assert_refused(bundle, f"{WEIGHTS} does not have the hash")
    (bundle / WEIGHTS).unlink()
    assert_error(command("run", bundle, "-o", place / "out.png"), WEIGHTS, "missing")


def test_pooled_weights_are_the_same_numbers(tmp_path: Path) -> None:
    shared = np.arange(1000, dtype=np.float32)
    models = {}
    for name, own in (("a", np.ones(500, np.float32)), ("b", np.ones(500, np.int64))):
        tensors = [numpy_helper.from_array(shared, "shared"), numpy_helper.from_array(own, "own")]
        by_value = onnx.helper.make_tensor("values", TensorProto.FLOAT, [300], np.linspace(0, 1, 300))
        models[name] = [*tensors, by_value, numpy_helper.from_array(np.float32([1.0]), "small")]
        graph = onnx.helper.make_graph([], name, [], [], initializer=models[name])
        onnx.save(onnx.helper.make_model(graph), tmp_path / f"{name}.onnx")
    pool_weights([tmp_path / "a.onnx", tmp_path / "b.onnx"], tmp_path / "weights.bin")
    for name, want in models.items():
        for got, before in zip(onnx.load(tmp_path / f"{name}.onnx").graph.initializer, want, strict=True):
            assert np.array_equal(numpy_helper.to_array(got), numpy_helper.to_array(before))
    # 1000 + 500 + 300 float32 and 500 int64, each from a multiple of 64 on.
    assert (tmp_path / "weights.bin").stat().st_size == 4032 + 2048 + 1216 + 4000


def test_graphs_are_held_before_they_are_loaded_and_weights_at_the_latest_then(
    pair_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(pair_bundle, tmp_path / "copy")
    bundle = open_bundle(copy)
    graphs = bundle.manifest.target("onnx").unet.graphs
    entered = []
    flip_bit(copy / WEIGHTS)
    with pytest.raises(BundleError, match=f"{WEIGHTS} does not have the hash"), bundle.hold(graphs):
        entered.append("weights")
    # What a reader makes of damaged weights is not what is wrong.
    with pytest.raises(BundleError, match=f"{WEIGHTS} does not have the hash"), bundle.hold(graphs):
        raise BundleError("cannot be loaded")
    (copy / WEIGHTS).write_bytes(b"short")
    with pytest.raises(BundleError, match=f"{WEIGHTS} has 5 bytes"), bundle.hold(graphs):
        entered.append("short weights")
    shutil.copy(pair_bundle / WEIGHTS, copy / WEIGHTS)
    (copy / "onnx/unet/more.bin").write_bytes(b"1")
    with pytest.raises(BundleError, match=r"more\.bin is not listed"), bundle.hold(graphs):
        entered.append("what is not listed")
    (copy / "onnx/unet/more.bin").unlink()
    flip_bit(copy / "onnx/unet/full.onnx")
    with pytest.raises(BundleError, match=r"full\.onnx does not have the hash"), bundle.hold(graphs):
        entered.append("a graph")
    assert entered == ["weights"]
