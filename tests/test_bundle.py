import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file, save_file

from edgediff import verify_bundle
from edgediff_runtime import BundleError, EdgePipeline, open_bundle
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, inside, render_sums, sha256_of
from edgediff_runtime.manifest import File, Manifest, Tensor, parse_manifest, render_manifest

GRAPHS = ("onnx/highres_in.onnx", "onnx/lowres.onnx", "onnx/highres_out.onnx")
REFERENCE = "evidence/reference.safetensors"
FILES = (MANIFEST, SUMS, *GRAPHS, REFERENCE, "README.md")
BAD_PATHS = (
    "../x", "/etc/passwd", "a/../../b", "onnx/../x", "..", ".", "", "/", "./x", "onnx//lowres.onnx", "onnx/", "C:\\x",
    "C:x", "..\\x", "onnx\\lowres.onnx", "a\0b", "a\nb", "//x",
)  # fmt: skip


@pytest.fixture
def bundle(class_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(class_bundle, tmp_path / "bundle")


def reseal(bundle: Path, manifest: Manifest | None = None) -> None:
    """Makes every hash agree with what is there now: a lie that hashes do not catch."""
    manifest = parse_manifest((bundle / MANIFEST).read_bytes()) if manifest is None else manifest
    found = [file for file in bundle.rglob("*") if file.is_file()]
    names = [name for file in found if (name := file.relative_to(bundle).as_posix()) not in (MANIFEST, SUMS, PARITY)]
    files = {name: File((bundle / name).stat().st_size, sha256_of(bundle / name)) for name in names}
    seal(bundle, msgspec.structs.replace(manifest, files=files))


def seal(bundle: Path, manifest: Manifest) -> None:
    data = render_manifest(manifest)
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SUMS).write_bytes(render_sums(manifest, data))


def seal_plain(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as plain data, so that it may hold what no struct can, and makes its hash agree."""
    data = json.loads((bundle / MANIFEST).read_bytes())
    change(data)
    seal_bytes(bundle, json.dumps(data).encode())


def seal_bytes(bundle: Path, data: bytes) -> None:
    lines = [line for line in (bundle / SUMS).read_text().splitlines() if not line.endswith(MANIFEST)]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}")
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SUMS).write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line[66:])))


def assert_refused(bundle: Path, match: str, run: bool = True) -> None:
    for opens in (EdgePipeline.from_pretrained, verify_bundle) if run else (verify_bundle,):
        with pytest.raises(BundleError, match=match) as caught:
            opens(bundle)
        assert "\n" not in str(caught.value)


def replace_graph(manifest: Manifest, number: int, **changes: Any) -> Manifest:
    target = manifest.targets[0]
    graphs = list(target.graphs)
    graphs[number] = msgspec.structs.replace(graphs[number], **changes)
    return msgspec.structs.replace(manifest, targets=(msgspec.structs.replace(target, graphs=tuple(graphs)),))


def change_graph(bundle: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle / name)
    change(model)
    (bundle / name).write_bytes(model.SerializeToString())
    reseal(bundle)


# What hashes see.


def test_a_resealed_bundle_that_nobody_changed_is_as_good_as_new(bundle: Path) -> None:
    before = (bundle / MANIFEST).read_bytes(), (bundle / SUMS).read_bytes()
    reseal(bundle)
    assert ((bundle / MANIFEST).read_bytes(), (bundle / SUMS).read_bytes()) == before
    assert verify_bundle(bundle).ok


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_refused(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    size = len(data)
    some = sorted({0, 1, size // 2, size - 1, *random.Random(name).sample(range(size), 8)})
    positions = {MANIFEST: range(0, size, 41), SUMS: range(size)}.get(name, some)
    for position in positions:
        old = data[position]
        data[position] = old ^ (1 << random.Random(position).randrange(8))
        (bundle / name).write_bytes(data)
        data[position] = old
        for opens in (open_bundle,) if name == SUMS else (EdgePipeline.from_pretrained, verify_bundle):
            if opens == EdgePipeline.from_pretrained and name in (REFERENCE, "README.md"):
                assert opens(bundle).manifest.format_version == 1  # a device opens neither
                continue
            with pytest.raises(BundleError) as caught:
                opens(bundle)
            assert "\n" not in str(caught.value), position
    (bundle / name).write_bytes(data)
    assert open_bundle(bundle).file("README.md")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_a_short_and_a_long_file_are_refused_by_name(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    run = name not in (REFERENCE, "README.md")
    for changed in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        (bundle / name).write_bytes(changed)
        assert_refused(bundle, "damaged|not a manifest", run)
    (bundle / name).unlink()
    assert_refused(bundle, f"{name}.* is missing", run)
    (bundle / name).mkdir()
    assert_refused(bundle, f"{name}.* is missing", run)


def test_a_file_that_is_not_listed_is_refused_by_verify(bundle: Path) -> None:
    (bundle / "onnx" / "extra.bin").touch()
    assert_refused(bundle, r"onnx/extra.bin is in the bundle but not listed", run=False)


def test_a_folder_of_files_that_are_not_listed_is_refused_by_verify(bundle: Path) -> None:
    (bundle / "more" / "deep").mkdir(parents=True)
    (bundle / "more" / "deep" / "x").touch()
    assert_refused(bundle, "more/deep/x is in the bundle but not listed", run=False)


@pytest.mark.parametrize("name", FILES)
def test_a_symlink_in_the_place_of_a_file_is_refused(bundle: Path, name: str, tmp_path: Path) -> None:
    shutil.move(bundle / name, tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    assert_refused(bundle, f"{name} is a symlink", run=name not in (REFERENCE, "README.md"))


def test_a_folder_that_is_a_symlink_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "onnx", tmp_path / "outside")
    (bundle / "onnx").symlink_to(tmp_path / "outside")
    assert_refused(bundle, r"onnx/\w+.onnx is a symlink")


def test_a_symlink_that_is_not_listed_is_refused_by_verify(bundle: Path, tmp_path: Path) -> None:
    (bundle / "evidence" / "more").symlink_to(tmp_path)
    assert_refused(bundle, "evidence/more is a symlink", run=False)


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_what_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.touch()
    elif what == "an empty folder":
        path.mkdir()
    assert_refused(path, "manifest.json is missing" if what == "an empty folder" else "no bundle at .*x: no such dir")


# What the manifest says.


def test_a_newer_version_says_to_install_a_newer_one_whatever_else_it_holds(bundle: Path) -> None:
    seal_bytes(bundle, b'{"format_version": 2, "all": "new"}')
    assert_refused(bundle, "format version 2, this runtime reads up to 1; install a newer edgediff")
    (bundle / SUMS).write_text("0" * 64 + f"  {MANIFEST}\n")
    assert_refused(bundle, "install a newer edgediff")


@pytest.mark.parametrize("version", ["0", "-1"])
def test_a_version_that_never_was(bundle: Path, version: str) -> None:
    seal_bytes(bundle, f'{{"format_version": {version}}}'.encode())
    assert_refused(bundle, f"format version {version}; expected 1 to 1")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b'{"format_version": "1"}', b'{"format_version": 1}',
     b'{"format_version": 1.5}', b'{"format_version": null}', b"NaN", b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_manifest(bundle: Path, data: bytes) -> None:
    seal_bytes(bundle, data)
    assert_refused(bundle, "manifest.json is not a manifest: ")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(extra=1), "unknown field `extra`"),
        (lambda m: m.pop("sample"), "missing required field `sample`"),
        (lambda m: m["targets"][0]["graphs"][0].update(frequency="often"), "Invalid enum value 'often'"),
        (lambda m: m["targets"][0].update(target="exe"), "Invalid enum value 'exe'"),
        (lambda m: m["sample"].update(height="16"), "Expected `int`, got `str`"),
        (lambda m: m.update(files=[]), "Expected `object`, got `array`"),
        (lambda m: m["scheduler"].update(beta_start=-1), "beta_start -1"),
        (lambda m: m["scheduler"].update(num_train_timesteps=0), "num_train_timesteps 0"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    seal_plain(bundle, change)
    assert_refused(bundle, f"manifest.json is not a manifest: .*{match}")


def _point(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["operating_point"].update(values)


def _graph(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["targets"][0]["graphs"][number].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_point(num_inference_steps=0), "steps is 0"),
        (_point(num_inference_steps=-4), "steps is -4"),
        (_point(clock=0), "clock is 0"),
        (_point(clock="0,1,1,1"), "begins with 0"),
        (_point(mask=[1, 1, 1, 1]), "mask"),
        (_point(mask=[]), "mask"),
        (_point(guidance_scale=-1.0), "guidance_scale is -1.0"),
        (_point(guidance_scale=1e300), "guidance_scale"),
        (_point(num_images=0), "num_images is 0"),
        (_point(seed=-1), "seed is -1"),
        (lambda m: m["sample"].update(channels=0), "channels is 0"),
        (lambda m: m["sample"].update(width=-16), "width is -16"),
        (lambda m: m["cut"].update(level=0), "cut.level is 0"),
        (lambda m: m.update(cache_bytes=-1), "cache_bytes is -1"),
        (lambda m: m["floors"].update(graph=-1000.0), "floors.graph is -1000.0"),
        (lambda m: m["floors"].update(caching=0.0), "floors.caching is 0.0"),
        (lambda m: m["conditioning"].update(labels=[]), "labels"),
        (lambda m: m["conditioning"].update(null_label=5), "null_label is 5; expected 0 to 4"),
        (lambda m: m["conditioning"].update(null_label=-1), "null_label is -1"),
        (lambda m: m["conditioning"].update(kind="none"), "inputs of highres_in is .*class_labels"),
        (lambda m: m["cost"].pop("full"), "cost"),
        (lambda m: m["files"]["README.md"].update(size=-1), "size of README.md is -1"),
        (lambda m: m["files"]["README.md"].update(sha256="x"), "sha256 of README.md is 'x'"),
        (lambda m: m["targets"][0].update(batch=0), "batch is 0"),
        (lambda m: m["targets"][0].update(graphs=[]), "outputs of a step"),
        (lambda m: m["targets"][0]["graphs"].reverse(), "inputs of highres_out"),
        (lambda m: m["targets"][0]["graphs"].append(m["targets"][0]["graphs"][0]), "distinct names"),
        (_graph(1, frequency="cached_step"), "inputs of highres_out is .*lowres_feature"),
        (_graph(0, inputs=[{"name": "x", "dtype": "float32", "shape": [0]}]), r"shape of x is \(0,\)"),
    ],
)  # fmt: skip
def test_numbers_and_names_that_cannot_be_are_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    seal_plain(bundle, change)
    assert_refused(bundle, match)


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_leave_the_bundle_or_are_not_plain(bundle: Path, path: str) -> None:
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    known = manifest.files[GRAPHS[0]]
    for changed in (
        replace_graph(manifest, 0, file=path),
        replace_graph(manifest, 0, external_data=path),
        msgspec.structs.replace(manifest, files={**manifest.files, path: known}),
    ):
        seal(bundle, changed)
        assert_refused(bundle, "leaves the bundle or is not plain; expected a relative path inside")
    with pytest.raises(BundleError, match="leaves the bundle"):
        inside(bundle, path)


def test_a_graph_that_is_not_listed_is_refused(bundle: Path) -> None:
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    shutil.copy(bundle / GRAPHS[0], bundle / "onnx" / "other.onnx")
    seal(bundle, replace_graph(manifest, 0, file="onnx/other.onnx"))
    assert_refused(bundle, "onnx/other.onnx is (in the bundle but )?not listed")


def test_a_target_or_a_backend_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no backend 'tpu'; choices: onnxruntime"):
        EdgePipeline.from_pretrained(bundle, backend="tpu")
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    seal(bundle, msgspec.structs.replace(manifest, targets=()))
    assert_refused(bundle, "no 'onnx' target")


# Lies that are sealed.


def test_tensor_names_that_are_not_the_graphs(bundle: Path) -> None:
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    tensors = manifest.targets[0].graphs[0].outputs
    renamed = (msgspec.structs.replace(tensors[0], name="out_of_nowhere"), *tensors[1:])
    more = (*tensors, msgspec.structs.replace(tensors[0], name="more"))
    seal(bundle, replace_graph(manifest, 0, outputs=more))
    assert_refused(bundle, "onnx/highres_in.onnx has the outputs .*; the manifest says .*more|has no more for step 0")
    seal(bundle, replace_graph(manifest, 0, outputs=renamed))
    assert_refused(bundle, "inputs of lowres|the manifest says")


def _of_16_channels(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(msgspec.structs.replace(t, shape=(t.shape[0], 16, *t.shape[2:])) for t in tensors)


@pytest.mark.parametrize("change", [{"shape": ("batch", 3, 32, 32)}, {"dtype": "float16"}])
def test_dtypes_and_shapes_that_are_not_the_graphs(bundle: Path, change: dict[str, Any]) -> None:
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    tensors = manifest.targets[0].graphs[0].inputs
    assert tensors[0].name == "sample"
    changed = (msgspec.structs.replace(tensors[0], **change), *tensors[1:])
    seal(bundle, replace_graph(manifest, 0, inputs=changed))
    assert_refused(bundle, "sample")
    seal(bundle, replace_graph(manifest, 1, inputs=_of_16_channels(manifest.targets[0].graphs[1].inputs)))
    assert_refused(bundle, r"onnx/lowres.onnx has \w+ as tensor.*; the manifest says|expected float32 .*16, 8, 8")


def test_a_sample_size_that_is_not_the_graphs(bundle: Path) -> None:
    seal_plain(bundle, lambda m: m["sample"].update(height=32))
    assert_refused(bundle, "sample|latents")


def test_swapped_graph_files_are_refused(bundle: Path) -> None:
    first, second = (bundle / name for name in GRAPHS[:2])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    reseal(bundle)
    assert_refused(bundle, "onnx/highres_in.onnx has the inputs")


@pytest.mark.parametrize("data", [b"", b"no model at all", b"\x08\x07"])
def test_a_graph_that_is_no_graph_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / GRAPHS[1]).write_bytes(data)
    reseal(bundle)
    assert_refused(bundle, "onnx/lowres.onnx cannot be loaded")


def _weight(model: onnx.ModelProto) -> TensorProto:
    """The largest convolution's weights."""
    return max((t for t in model.graph.initializer if len(t.dims) == 4), key=lambda t: np.prod(t.dims))


def _scale_a_few_percent(model: onnx.ModelProto) -> None:
    tensor = _weight(model)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.05), tensor.name))


def _swap_two_channels(model: onnx.ModelProto) -> None:
    tensor = _weight(model)
    array = numpy_helper.to_array(tensor).copy()
    array[[0, 1]] = array[[1, 0]]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _one_weight_is_not_a_number(model: onnx.ModelProto) -> None:
    tensor = _weight(model)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _another_epsilon(model: onnx.ModelProto) -> None:
    found = [a for node in model.graph.node for a in node.attribute if a.name == "epsilon"]
    assert found
    for attribute in found:
        attribute.f = 0.05


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("change", [_scale_a_few_percent, _swap_two_channels, _another_epsilon])
def test_a_graph_that_computes_something_else_does_not_hold(
    bundle: Path, name: str, change: Callable[[onnx.ModelProto], None]
) -> None:
    # Random weights hardly show in the output: 35 dB, the default, lets 5% pass here. Recipes of fp32 ask for more.
    seal_plain(bundle, lambda m: m["floors"].update(graph=100.0, composed=100.0))
    change_graph(bundle, name, change)
    report = verify_bundle(bundle)
    part = name.removeprefix("onnx/").removesuffix(".onnx")
    assert not report.ok
    assert [row.part for row in report.rows if row.check == "graph" and row.ok is False] == [part]
    assert any(row.ok is False for row in report.rows if row.check == "composed")
    assert json.loads((bundle / PARITY).read_text())["ok"] is False


def test_a_graph_that_gives_no_number_never_passes(bundle: Path) -> None:
    change_graph(bundle, GRAPHS[0], _one_weight_is_not_a_number)
    with pytest.raises(BundleError, match="not finite at step 0"):
        EdgePipeline.from_pretrained(bundle)()
    try:
        assert not verify_bundle(bundle).ok
    except BundleError as e:
        assert "not finite" in str(e)  # noqa: PT017


@pytest.mark.parametrize("kind", ["../secret.bin", "absolute", "symlink", "symlinked folder", "missing"])
def test_external_data_never_comes_from_outside(bundle: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    locations = {"absolute": str(outside / "secret.bin"), "symlinked folder": "folder/secret.bin"}
    location = locations.get(kind, kind if kind.startswith("..") else "secret.bin")
    model = onnx.load(bundle / GRAPHS[0])
    tensor = _weight(model)
    secret = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (bundle / GRAPHS[0]).write_bytes(model.SerializeToString())
    (outside / "secret.bin").write_bytes(secret)
    (bundle / "secret.bin").write_bytes(secret)
    if kind == "symlink":
        (bundle / "onnx" / "secret.bin").symlink_to(outside / "secret.bin")
    elif kind == "symlinked folder":
        (bundle / "onnx" / "folder").symlink_to(outside)
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    reseal(bundle, manifest)
    assert_refused(bundle, r"onnx/highres_in.onnx cannot be loaded|is a symlink")
    # Named in the manifest, the same file is refused before ONNX Runtime sees the graph.
    name = location if os.path.isabs(location) else f"onnx/{location}"
    reseal(bundle, replace_graph(manifest, 0, external_data=name))
    assert_refused(bundle, "leaves the bundle|is a symlink|is not listed|is missing|cannot be loaded")


def test_external_data_inside_the_bundle_is_used_and_hashed(bundle: Path) -> None:
    model = onnx.load(bundle / GRAPHS[0])
    onnx.save_model(model, str(bundle / GRAPHS[0]), save_as_external_data=True, location="highres_in.onnx.data")
    manifest = parse_manifest((bundle / MANIFEST).read_bytes())
    reseal(bundle, replace_graph(manifest, 0, external_data="onnx/highres_in.onnx.data"))
    assert verify_bundle(bundle).ok
    data = bytearray((bundle / "onnx" / "highres_in.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "onnx" / "highres_in.onnx.data").write_bytes(data)
    assert_refused(bundle, "onnx/highres_in.onnx.data does not have the hash")


def test_external_data_that_the_manifest_does_not_name_is_hashed_by_verify(bundle: Path) -> None:
    model = onnx.load(bundle / GRAPHS[0])
    onnx.save_model(model, str(bundle / GRAPHS[0]), save_as_external_data=True, location="highres_in.onnx.data")
    reseal(bundle)
    (bundle / "onnx" / "highres_in.onnx.data").write_bytes(b"x")
    assert_refused(bundle, "highres_in.onnx.data has 1 bytes", run=False)


# The evidence.


def _change_evidence(bundle: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    flat = load_file(bundle / REFERENCE)
    change(flat)
    save_file(flat, bundle / REFERENCE)
    reseal(bundle)


def test_evidence_without_any_one_of_its_tensors_is_refused(bundle: Path) -> None:
    flat = load_file(bundle / REFERENCE)
    assert len(flat) > 10
    for key in flat:
        save_file({name: value for name, value in flat.items() if name != key}, bundle / REFERENCE)
        reseal(bundle)
        assert_refused(bundle, f"{REFERENCE} has no {key.rpartition('/')[2]}", run=False)


@pytest.mark.parametrize("kept", ["", "latents", "steps/0/full/", "steps/1/cached/"])
def test_evidence_without_its_steps_is_refused(bundle: Path, kept: str) -> None:
    flat = {name: value for name, value in load_file(bundle / REFERENCE).items() if kept and name.startswith(kept)}
    save_file(flat, bundle / REFERENCE)
    reseal(bundle)
    assert_refused(bundle, f"{REFERENCE} holds the steps .*; the manifest asks for 0", run=False)


@pytest.mark.parametrize("key", ["more", "steps/x/full/sample", "steps/0/half/sample", "steps/0/full", "a/b/c/d/e"])
def test_evidence_with_foreign_keys_is_refused(bundle: Path, key: str) -> None:
    _change_evidence(bundle, lambda flat: flat.update({key: np.zeros(1, np.float32)}))
    assert_refused(bundle, f"holds '{key}', which is nothing that a reference holds", run=False)


@pytest.mark.parametrize(
    "value",
    [np.zeros(3, np.float32), np.zeros((0, 3, 16, 16), np.float32), np.zeros((4, 3, 16, 16)), np.float32(1),
     np.full((4, 3, 16, 16), np.nan, np.float32), np.full((4, 3, 16, 16), np.inf, np.float32)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["steps/0/full/sample", "steps/1/cached/out_sample"])
def test_evidence_of_another_kind_is_refused(bundle: Path, key: str, value: np.ndarray) -> None:
    _change_evidence(bundle, lambda flat: flat.update({key: np.asarray(value)}))
    assert_refused(bundle, f"{REFERENCE}: ", run=False)


@pytest.mark.parametrize("key", ["latents", "steps/0/full/out_sample", "steps/1/cached/cache", "steps/3/cached/sample"])
def test_evidence_of_other_numbers_does_not_hold(bundle: Path, key: str) -> None:
    _change_evidence(bundle, lambda flat: flat.update({key: flat[key] * np.float32(1.2) + np.float32(0.1)}))
    assert not verify_bundle(bundle).ok


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"])
def test_evidence_that_is_no_evidence_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / REFERENCE).write_bytes(data)
    reseal(bundle)
    assert_refused(bundle, f"{REFERENCE} (cannot be read|holds the steps none)", run=False)


@pytest.mark.parametrize("data", [None, b"garbage"])
def test_the_last_report_is_not_relied_on_and_is_replaced(bundle: Path, data: bytes | None) -> None:
    if data is None:
        (bundle / PARITY).unlink()
    else:
        (bundle / PARITY).write_bytes(data)
    report = verify_bundle(bundle)
    written = json.loads((bundle / PARITY).read_text())
    assert written["ok"] is report.ok is True
    assert written["rows"] == report.to_dict()["rows"]


def test_a_bundle_on_read_only_media_is_verified_all_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    before = (bundle / PARITY).read_bytes()
    monkeypatch.setattr(os, "replace", read_only)
    assert verify_bundle(bundle).ok
    assert (bundle / PARITY).read_bytes() == before
    assert sorted(file.name for file in (bundle / "evidence").iterdir()) == ["parity.json", "reference.safetensors"]


def test_what_a_killed_verification_left_is_no_obstacle(bundle: Path) -> None:
    (bundle / "evidence" / ".parity.json.new").write_text("half")
    assert verify_bundle(bundle).ok
    assert not (bundle / "evidence" / ".parity.json.new").exists()
