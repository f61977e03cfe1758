import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import unchanged
from seals import (
    FILES,
    GRAPHS,
    UNOPENED,
    assert_refused,
    manifest_of,
    replace_graph,
    reseal,
    seal,
    seal_bytes,
    seal_plain,
)

from edgediff import verify_bundle
from edgediff.bundle.files import check_files
from edgediff.bundle.staging import check_place
from edgediff.targets.backends import open_session
from edgediff_runtime import BundleError, EdgePipeline, RequestError, open_bundle
from edgediff_runtime.bundle import MANIFEST, SUMS, inside, sha256_of
from edgediff_runtime.coreml_session import quiet
from edgediff_runtime.ort_session import OrtSession

BAD_PATHS = (
    "../x", "/etc/passwd", "a/../../b", "onnx/../x", "..", ".", "", "/", "./x", "onnx//lowres.onnx", "onnx/", "C:\\x",
    "C:x", "..\\x", "onnx\\lowres.onnx", "a\0b", "a\nb", "//x",
)  # fmt: skip


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
            if opens == EdgePipeline.from_pretrained and name in UNOPENED:
                assert opens(bundle).manifest.format_version == 2
                continue
            with pytest.raises(BundleError) as caught:
                opens(bundle)
            assert "\n" not in str(caught.value), position
    (bundle / name).write_bytes(data)
    assert open_bundle(bundle).file("README.md")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_a_short_and_a_long_file_are_refused_by_name(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    run = name not in UNOPENED
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
    assert_refused(bundle, f"{name} is a symlink", run=name not in UNOPENED)


def test_a_folder_that_is_a_symlink_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "onnx", tmp_path / "outside")
    (bundle / "onnx").symlink_to(tmp_path / "outside")
    assert_refused(bundle, r"onnx/unet/[\w.]+ is a symlink")


def test_a_symlink_that_is_not_listed_is_refused_by_verify(bundle: Path, tmp_path: Path) -> None:
    (bundle / "evidence" / "more").symlink_to(tmp_path)
    assert_refused(bundle, "evidence/more is a symlink", run=False)


# What other tools leave in a bundle, or make of it.


@pytest.mark.parametrize("name", [".DS_Store", "._model", "Thumbs.db", "desktop.ini", ".gitattributes",
                                  "__MACOSX/._onnx", ".cache/huggingface/download/x.metadata"])  # fmt: skip
@pytest.mark.parametrize("folder", ["", "onnx/unet", "evidence"])
def test_what_systems_and_tools_leave_is_no_part_of_a_bundle(bundle: Path, name: str, folder: str) -> None:
    left = bundle / folder / name
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"left")
    check_files(open_bundle(bundle))
    assert EdgePipeline.from_pretrained(bundle)(num_inference_steps=1).mask == (1,)
    check_place(bundle, force=True)
    left.unlink()
    left.symlink_to("/etc/hostname")
    assert_refused(bundle, f"{left.name} is a symlink out of the bundle; put the file itself", run=folder == "onnx")


def _in_cache(bundle: Path, cache: Path) -> Path:
    """A bundle as the Hugging Face Hub lays it out: a snapshot of links into blobs."""
    snapshot = cache / "models--me--mine" / "snapshots" / "0123abcd"
    blobs = cache / "models--me--mine" / "blobs"
    blobs.mkdir(parents=True)
    for file in [file for file in bundle.rglob("*") if file.is_file()]:
        link, blob = snapshot / file.relative_to(bundle), blobs / sha256_of(file)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_in_a_hugging_face_cache_is_valid(bundle: Path, tmp_path: Path) -> None:
    snapshot = _in_cache(bundle, tmp_path / "hub")
    assert verify_bundle(snapshot, record=False).ok
    (tmp_path / "link").symlink_to(snapshot)
    check_files(open_bundle(tmp_path / "link"))
    assert EdgePipeline.from_pretrained(snapshot)(num_inference_steps=1).mask == (1,)


def test_a_package_of_links_says_how_to_download_it(coreml_bundle: Path, tmp_path: Path) -> None:
    snapshot = _in_cache(coreml_bundle, tmp_path / "hub")
    check_files(open_bundle(snapshot))
    with pytest.raises(BundleError, match=r"is a link, which a package cannot hold; download .* with --local-dir"):
        open_session(open_bundle(snapshot), "mil-reference")


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_cache_or_to_another_blob_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    snapshot = _in_cache(bundle, tmp_path / "hub")
    run = name not in UNOPENED
    (snapshot / name).unlink()
    (tmp_path / "hub" / "blobs").mkdir()
    for outside in (tmp_path / "outside", tmp_path / "hub" / "blobs" / "x", tmp_path / "hub" / "x"):
        shutil.copy(bundle / name, outside)
        (snapshot / name).symlink_to(outside)
        assert_refused(snapshot, f"{name} is a symlink out of the bundle", run=run)
        (snapshot / name).unlink()
    other = next(file for file in FILES if file != name)
    (snapshot / name).symlink_to((snapshot / other).resolve())
    assert_refused(snapshot, "damaged|not a manifest", run=run)


def test_a_folder_that_unpacking_added_is_named(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    shutil.move(bundle, tmp_path / "unpacked" / "mine")
    assert_refused(tmp_path / "unpacked", r"manifest.json is missing; did you mean .*unpacked/mine\?$")


def test_a_package_that_coremltools_opened_is_still_valid(coreml_bundle: Path, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    bundle = shutil.copytree(coreml_bundle, tmp_path / "bundle")
    with quiet(), unchanged(bundle):
        for package in bundle.rglob("*.mlpackage"):
            coremltools.models.MLModel(str(package), skip_model_load=True)
    check_files(open_bundle(bundle))


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
    seal_bytes(bundle, b'{"format_version": 3, "all": "new"}')
    assert_refused(bundle, "format version 3, this runtime reads version 2; install a newer edgediff")
    (bundle / SUMS).write_text("0" * 64 + f"  {MANIFEST}\n")
    assert_refused(bundle, "install a newer edgediff")


@pytest.mark.parametrize("version", ["1", "0", "-1"])
def test_a_version_that_never_was(bundle: Path, version: str) -> None:
    seal_bytes(bundle, f'{{"format_version": {version}}}'.encode())
    assert_refused(bundle, f"format version {version}, this runtime reads version 2; export the model again")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b'{"format_version": "2"}', b'{"format_version": 2}',
     b'{"format_version": 2.5}', b'{"format_version": null}', b"NaN", b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_manifest(bundle: Path, data: bytes) -> None:
    seal_bytes(bundle, data)
    assert_refused(bundle, "manifest.json is not a manifest: ")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(extra=1), "unknown field `extra`"),
        (lambda m: m.pop("sample"), "missing required field `sample`"),
        (lambda m: _unet(m)["graphs"][0].update(frequency="often"), "Invalid enum value 'often'"),
        (lambda m: m["targets"][0].pop("opset"), "missing required field `opset`"),
        (lambda m: m["targets"][0].update(deployment_target="iOS18"), "unknown field `deployment_target`"),
        (lambda m: m["targets"][0].update(opset=None), "Expected `int`, got `null`"),
        (lambda m: _point(seed=5)(m), "Expected `str`, got `int`"),
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


def _unet(m: dict[str, Any]) -> dict[str, Any]:
    return m["targets"][0]["components"]["unet"]


def _point(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["operating_point"].update(values)


def _graph(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: _unet(m)["graphs"][number].update(values)


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
        (_point(seed="-1"), "seed is '-1'; expected 0 to 2\\^64 - 1 as decimal text"),
        (_point(seed="07"), "seed is '07'"),
        (_point(seed=str(2**64)), "seed is '18446744073709551616'"),
        (lambda m: m["sample"].update(channels=0), "channels is 0"),
        (lambda m: m["sample"].update(width=-16), "width is -16"),
        (lambda m: m["cut"].update(level=0), "cut.level is 0"),
        (lambda m: m.update(cache_bytes=-1), "cache_bytes is -1"),
        (lambda m: _unet(m)["floors"].update(graph=-1000.0), "floors.graph is -1000.0"),
        (lambda m: _unet(m)["floors"].update(caching=0.0), "floors.caching is 0.0"),
        (lambda m: m["conditioning"].update(labels=[]), "labels"),
        (lambda m: m["conditioning"].update(null_label=5), "null_label is 5; expected 0 to 4"),
        (lambda m: m["conditioning"].update(null_label=-1), "null_label is -1"),
        (lambda m: m["conditioning"].update(kind="none"), "conditioning.tensors is .*class_labels"),
        (lambda m: m["conditioning"]["tensors"][0].update(name="text"), "inputs of highres_in is .*class_labels"),
        (lambda m: m["cost"].pop("full"), "cost"),
        (lambda m: m["files"]["README.md"].update(size=-1), "size of README.md is -1"),
        (lambda m: m["files"]["README.md"].update(sha256="x"), "sha256 of README.md is 'x'"),
        (lambda m: m.update(targets=[]), r"targets is \[\]; expected one of a kind"),
        (lambda m: m["targets"].append(m["targets"][0]), "targets is .*; expected one of a kind"),
        (lambda m: m["targets"][0].update(target="exe"), r"targets is \[\]; expected one of a kind"),
        (lambda m: m["targets"][0]["components"].update(unet2=_unet(m)), "components of stage step in onnx"),
        (lambda m: _unet(m).update(stage="decode"), "components of stage step in onnx"),
        (lambda m: _unet(m).update(layout=None), "layout is None; expected a value for the unet alone"),
        (lambda m: _unet(m)["files"].append("gone"), r"files of a component is \['gone'\]"),
        (lambda m: _unet(m).update(batch=0), "batch is 0"),
        (lambda m: _unet(m).update(batch=2), "shape of sample is .*; expected 2 first"),
        (lambda m: _unet(m).update(graphs=[]), "outputs of a step"),
        (lambda m: _unet(m)["graphs"].reverse(), "inputs of highres_out"),
        (lambda m: _unet(m)["graphs"].append(_unet(m)["graphs"][0]), "distinct names"),
        (_graph(1, frequency="cached_step"), "inputs of highres_out is .*lowres_feature"),
        (_graph(0, frequency=None), "frequency of highres_in is None; expected a value for graphs of the unet alone"),
        (_graph(1, file=None), "file of lowres is None"),
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
    manifest = manifest_of(bundle)
    known = manifest.files[GRAPHS[0]]
    for changed in (
        replace_graph(manifest, 0, file=path),
        replace_graph(manifest, 0, external_data=(path,)),
        msgspec.structs.replace(manifest, files={**manifest.files, path: known}),
    ):
        seal(bundle, changed)
        assert_refused(bundle, "leaves the bundle or is not plain; expected a relative path inside")
    with pytest.raises(BundleError, match="leaves the bundle"):
        inside(bundle, path)


def test_a_graph_that_is_not_listed_is_refused(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    shutil.copy(bundle / GRAPHS[0], bundle / "onnx" / "other.onnx")
    seal(bundle, replace_graph(manifest, 0, file="onnx/other.onnx"))
    assert_refused(bundle, "onnx/other.onnx is (in the bundle but )?not listed")


def test_threads_of_one_graph_do_not_spin_while_the_next_one_runs(bundle: Path) -> None:
    session = OrtSession(open_bundle(bundle))
    options = [each.get_session_options() for each in session._shared.values()]
    assert [each.get_session_config_entry("session.force_spinning_stop") for each in options] == ["1"] * len(GRAPHS)


def test_a_target_or_a_backend_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"no backend 'tpu'; choices: onnxruntime, onnxruntime-cuda, openvino, openvino-bf16, coreml, litert$",
    ):
        EdgePipeline.from_pretrained(bundle, backend="tpu")
    with pytest.raises(BundleError, match="no 'coreml' target; it has: onnx"):
        open_session(open_bundle(bundle), "mil-reference")
    with pytest.raises(BundleError, match="no 'coreml' target; it has: onnx"):
        verify_bundle(bundle, targets=["coreml"])
