"""Graphs that ONNX Runtime and OpenVINO keep as they optimized them."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command, assert_error

from edgediff_runtime import Bundle, BundleError, EdgePipeline, RequestError, __main__
from edgediff_runtime import ort_cache as kept

REQUEST: dict[str, Any] = {"num_images": 4, "seed": 3}


def latents(bundle: Path, cache: Path | None, **given: Any) -> np.ndarray:
    pipe = EdgePipeline.from_pretrained(bundle, threads=2, cache=cache, **given)
    embeds = np.ones((1, 7, 12), np.float32)
    text = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    return pipe(**REQUEST, **(text if pipe.manifest.conditioning.kind == "text" else {})).latents


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_images_are_the_same_and_the_bundle_is_not_read_again(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool
) -> None:
    cache = tmp_path / "deep/cache"
    want = latents(class_bundle, None)
    assert np.array_equal(latents(class_bundle, cache, low_memory=low_memory), want)
    (place,) = cache.iterdir()
    assert {path.suffix for path in place.iterdir()} == {".onnx", ".bin", ".json"}

    def never(*_: object) -> None:
        raise AssertionError("the bundle's graphs are read")

    monkeypatch.setattr(Bundle, "hold", never)
    assert np.array_equal(latents(class_bundle, cache, low_memory=low_memory), want)


def shorten(place: Path) -> None:
    for path in place.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:1000])


def scribble(place: Path) -> None:
    path = next(place.glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def empty(place: Path) -> None:
    next(place.glob("*.onnx")).write_bytes(b"")


def lose(place: Path) -> None:
    next(place.glob("*.onnx")).unlink()


@pytest.mark.parametrize("damage", [shorten, scribble, empty, lose])
def test_a_damaged_cache_is_made_again(
    class_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    want = latents(class_bundle, tmp_path)
    (place,) = tmp_path.iterdir()
    whole = names(place)
    damage(place)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(latents(class_bundle, tmp_path), want)
    assert "is damaged and made again" in caplog.text
    assert names(place) == whole
    caplog.clear()
    assert np.array_equal(latents(class_bundle, tmp_path), want)
    assert caplog.text == ""


def test_a_damaged_bundle_does_not_enter_it(class_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(class_bundle, tmp_path / "bundle"))
    weights = bundle / "onnx/unet/weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 64
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin does not have the hash"):
        latents(bundle, tmp_path / "cache")
    assert names(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_done_without(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.tempfile, "mkdtemp", full)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(latents(class_bundle, tmp_path), latents(class_bundle, None))
    assert "cannot be used as a cache: No space left on device" in caplog.text


def test_a_file_in_its_place_is_refused(class_bundle: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("no folder")
    said = command("run", class_bundle, "-o", tmp_path / "a.png", "--cache", tmp_path / "file")
    assert_error(said, "is a file; expected a folder")
    with pytest.raises(RequestError, match="is a file; expected a folder"):
        EdgePipeline.from_pretrained(class_bundle, cache=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_disk_that_is_full_is_done_without(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = kept.tempfile.mkdtemp

    def gone(**given: Any) -> str:
        path = made(**given)
        shutil.rmtree(path)  # ONNX Runtime cannot write there
        return path

    monkeypatch.setattr(kept.tempfile, "mkdtemp", gone)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(latents(class_bundle, tmp_path), latents(class_bundle, None))
    assert "is not kept in the cache" in caplog.text
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["processor", "settings", "version"])
def test_what_would_be_another_graph_is_kept_apart(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import onnxruntime

    latents(class_bundle, tmp_path)
    if what == "processor":
        monkeypatch.setattr(kept, "_processor", lambda: ["another"])
    elif what == "settings":
        monkeypatch.setattr("edgediff_runtime.ort_session.options_key", lambda *_: "another")
    else:
        monkeypatch.setattr(onnxruntime, "__version__", "0.1")
    latents(class_bundle, tmp_path)
    assert len(names(tmp_path)) == 2


def test_two_bundles_share_a_folder(class_bundle: Path, text_bundle: Path, tmp_path: Path) -> None:
    for bundle in (class_bundle, text_bundle, class_bundle, text_bundle):
        assert np.array_equal(latents(bundle, tmp_path), latents(bundle, None))
    assert len(names(tmp_path)) == 2


def test_openvino_keeps_compiled_graphs(class_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    want = latents(class_bundle, None, backend="openvino")
    for _ in range(2):
        assert np.array_equal(latents(class_bundle, tmp_path, backend="openvino"), want)
        found = names(tmp_path)
        assert found
        assert all(name.endswith(".blob") for name in found)


def test_the_light_command_keeps_them_too(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["edgediff_runtime", class_bundle, "-o", tmp_path / "a.png", "--cache", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    assert __main__.main() == 0
    capsys.readouterr()
    assert len(names(tmp_path / "cache")) == 1
