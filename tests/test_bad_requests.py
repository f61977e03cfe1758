import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import FULL, Command, assert_error, process, snapshot, unchanged
from pipelines import exported_pipeline
from seals import flip_bit, seal_plain

from edgediff_runtime import Bundle
from edgediff_runtime.__main__ import main

# Running a bundle.


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--label", "Pear"], ("no label 'Pear'; choices: Apple, Banana, Kiwi, Orange",)),
        (["--label", ""], ("no label ''; choices: Apple",)),
        (["--prompt", "an orange"], ("a prompt was given", "classes")),
        (["--num-images", "0"], ("num_images is 0",)),
        (["--num-images", "-1"], ("num_images is -1",)),
        (["--steps", "0"], ("0: expected an integer from 1 to 1000",)),
        (["--steps", "-3"], ("-3: expected an integer from 1 to 1000",)),
        (["--steps", "100000"], ("100000: expected an integer from 1 to 1000",)),
        (["--steps", "two"], ("valid integer",)),
        (["--clock", "0"], ("clock is 0",)),
        (["--clock", "-1"], ("clock is '-1'",)),
        (["--clock", "auto:0.1"], ("clock is 'auto:0.1'; expected a period such as 2 or a mask such as 1,0,1,0",)),
        (["--clock", ""], ("clock is ''",)),
        (["--clock", "0,1,1,1"], ("begins with 0",)),
        (["--clock", "1,0"], ("has 2 entries for 4 steps",)),
        (["--clock", "1,2,1,1"], ("each entry is 0 (cached) or 1 (full)",)),
        (["--clock", "1," + "1" * 5000], ("each entry is 0 (cached) or 1 (full)",)),
        (["--guidance-scale", "nan"], ("guidance_scale is nan",)),
        (["--guidance-scale", "inf"], ("guidance_scale is inf",)),
        (["--guidance-scale", "-1"], ("guidance_scale is -1.0",)),
        (["--guidance-scale", "1e39"], ("guidance_scale is 1e+39",)),
        (["--guidance-scale", "1e38"], ("not finite at step",)),
        (["--seed", "-1"], ("seed -1: expected an integer",)),
        (["--seed", str(2**64)], ("seed 18446744073709551616: expected an integer",)),
        (["--scale", "0"], ("--scale is 0",)),
        (["--threads", "0"], ("threads is 0; expected a whole number above 0",)),
        (
            ["--backend", "tpu"],
            (
                "no backend 'tpu'; choices: onnxruntime, onnxruntime-cuda, openvino",
                "coreml, litert, mil-reference, executorch",
            ),
        ),
        (["--level", "1"], ("--level",)),
    ],
)
def test_requests_that_a_class_bundle_cannot_serve(
    command: Command, class_bundle: Path, place: Path, options: list[str], parts: tuple[str, ...]
) -> None:
    (place / "out.png").write_text("as it was")
    with unchanged(place, class_bundle):
        said = command("run", class_bundle, "-o", place / "out.png", "--num-images", "1", *options)
    assert_error(said, *parts)


def test_requests_that_a_text_bundle_cannot_serve(command: Command, text_bundle: Path, place: Path) -> None:
    run = ("run", text_bundle, "--num-images", "1", "-o")
    with unchanged(place):
        assert_error(command(*run, place / "out.npy"), "the model needs", "prompt_embeds of shape")
        assert_error(command(*run, place / "out.npy", "--label", "Apple"), "label 'Apple' was given", "text")
        assert_error(command(*run, place / "out.npy", "--prompt", "x"), "no text encoder")
        assert_error(command(*run, place / "out.png"), "latents and has no decoder; write them with -o out.npy")


def test_more_images_than_memory_holds(
    command: Command, class_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgediff_runtime.pipeline.available_bytes", lambda: 10**6)
    with unchanged(place):
        said = command("run", class_bundle, "-o", place / "out.png", "--num-images", "500")
    assert_error(said, "num_images is 500: they take", "of memory at least", "ask for fewer at a time")


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", os.fsdecode(b"a red \xff apple")], "prompt: character 6 is U+DCFF, a lone surrogate; expected"),
        (["--prompt", "(red:11) apple"], "prompt: the weight of 'red' is 11; expected 0 to 10"),
        (["--prompt", "a", "--negative-prompt", "(b:-1)"], "the weight of 'b' is -1; expected 0 to 10"),
        (["--negative-prompt", "a dog"], "a negative prompt or a second one was given without a prompt"),
        (["--prompt", "a", "--clip-skip", "9"], "clip_skip is 9; expected a whole number from 0 to 2"),
        (["--prompt", "a", "--prompt", "b", "--num-images", "3"], "prompt has 2 entries for 3 images"),
        (["--prompt", "a", "--label", "Apple"], "label 'Apple' was given"),
    ],
)
def test_prompts_that_nothing_can_draw(command: Command, place: Path, options: list[str], part: str) -> None:
    with unchanged(place):
        assert_error(command("run", exported_pipeline("sd1"), "-o", place / "out.png", *options), part)


BAD_EMBEDDINGS: dict[str, tuple[Any, str]] = {
    "width": (np.zeros((1, 7, 11), np.float32), "has shape [1, 7, 11]; expected [batch, tokens, 12]"),
    "length": (np.zeros((1, 6, 12), np.float32), "shape [1, 6, 12] and negative encoder_hidden_states [1, 7, 12]"),
    "rows": (np.zeros((3, 7, 12), np.float32), "1 or 1 rows"),
    "none": (np.zeros((0, 7, 12), np.float32), "has shape [0, 7, 12]"),
    "scalar": (np.float32(1), "has shape []"),
    "NaN": (np.full((1, 7, 12), np.nan, np.float32), "holds NaN or infinity"),
    "too large": (np.full((1, 7, 12), 1e300), "numbers beyond the range of float32"),
    "text": (np.full((1, 7, 12), "a"), "expected numbers"),
    "complex": (np.zeros((1, 7, 12), np.complex64), "expected numbers"),
    "pickle": (np.array([{}], dtype=object), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_embeddings_that_do_not_fit(command: Command, text_bundle: Path, place: Path, name: str) -> None:
    value, part = BAD_EMBEDDINGS[name]
    np.savez(place / "text.npz", encoder_hidden_states=value, negative_encoder_hidden_states=np.zeros((1, 7, 12)))
    run = ("run", text_bundle, "-o", place / "out.npy", "--num-images", "1", "--conditioning")
    with unchanged(place):
        assert_error(command(*run, place / "text.npz"), part)


@pytest.mark.parametrize("data", [None, b"", b"hello", b"PK\x03\x04abc", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_hold_no_embeddings(
    command: Command, text_bundle: Path, text_model: Path, place: Path, data: bytes | None, suffix: str
) -> None:
    file = (place / "text").with_suffix(suffix)
    if data is not None:
        file.write_bytes(data)
    with unchanged(place):
        assert_error(command("run", text_bundle, "-o", place / "out.npy", "--conditioning", file), "cannot be read as")
        assert_error(command("export", text_model, "-o", place / "out", "--conditioning", file), "cannot be read as")


def test_embeddings_with_foreign_names(command: Command, text_bundle: Path, place: Path) -> None:
    good = np.zeros((1, 7, 12), np.float32)
    np.savez(place / "text.npz", encoder_hidden_states=good, negative_encoder_hidden_states=good, pooled=good)
    with unchanged(place):
        said = command("run", text_bundle, "-o", place / "out.npy", "--conditioning", place / "text.npz")
    assert_error(said, "pooled is not an input of this model; it takes encoder_hidden_states")


@pytest.mark.parametrize(
    ("name", "part"),
    [("nowhere/out.png", "nowhere does not exist"), ("out.jpg", ".png or .npy"), ("out", ".png or .npy"),
     ("mine.txt", ".png or .npy"), ("mine.txt/out.png", "mine.txt does not exist"), ("folder.png", "it is a folder"),
     ("x" * 300 + ".png", "File name too long")],
)  # fmt: skip
def test_outputs_that_cannot_be_written(
    command: Command, class_bundle: Path, place: Path, name: str, part: str
) -> None:
    (place / "folder.png").mkdir()
    with unchanged(place):
        assert_error(command("run", class_bundle, "-o", place / name), part)


@pytest.mark.parametrize("name", ["nowhere/out.png", "out.jpg", "folder.png", "x" * 300 + ".png", "locked/out.png"])
def test_the_place_of_the_output_is_checked_before_graphs_are_opened(
    command: Command, class_bundle: Path, place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "folder.png").mkdir()
    (place / "locked").mkdir()
    allowed = os.access  # whoever runs the tests may be allowed to write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    monkeypatch.setattr(Bundle, "hold", lambda *_: pytest.fail("graphs were opened"))
    with unchanged(place):
        assert_error(command("run", class_bundle, "-o", place / name))
        monkeypatch.setattr(sys, "argv", ["edgediff_runtime", str(class_bundle), "-o", str(place / name)])
        assert main() == 2


@pytest.mark.parametrize(("fault", "code", "part"), [(FULL, 2, "No space left"), (KeyboardInterrupt(), 130, "inter")])
@pytest.mark.parametrize("name", ["out.png", "out.npy"])
def test_a_picture_that_could_not_be_written_leaves_the_old_one(
    command: Command,
    class_bundle: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    code: int,
    part: str,
    name: str,
) -> None:
    def half(path: object, *_: object) -> None:
        if isinstance(path, Path):
            path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr("edgediff_runtime.image.write_png", half)
    monkeypatch.setattr(np, "save", half)
    (place / name).write_text("as it was")
    with unchanged(place):
        assert_error(command("run", class_bundle, "-o", place / name, "--num-images", "1"), part, code=code)


# Looking at bundles and models.


@pytest.mark.parametrize("name", ["verify", "run", "inspect"])
def test_what_is_no_bundle(command: Command, place: Path, name: str) -> None:
    (place / "empty").mkdir()
    more = ("-o", place / "out.png") if name == "run" else ()
    for given in (place / "nowhere", place / "empty", place / "mine.txt", place):
        with unchanged(place):
            assert_error(command(name, given, *more), str(given))


@pytest.mark.parametrize(
    ("options", "part"),
    [(["--batch", "0"], "batch is 0"), (["--batch", "-2"], "batch is -2"), (["--batch", "x"], "valid integer"),
     (["--clock", "0"], "clock is 0"), (["--clock", "1,0"], "2 entries"), (["--steps", "0"], "steps is 0"),
     (["--steps", "-1"], "steps is -1")],
)  # fmt: skip
def test_surveys_that_cannot_be_made(
    command: Command, class_bundle: Path, class_model: Path, options: list[str], part: str
) -> None:
    for given in (class_bundle, class_model):
        assert_error(command("inspect", given, *options), part)


@pytest.mark.parametrize(("level", "part"), [("0", "choices: 1"), ("3", "choices: 1"), ("x", "valid integer")])
def test_levels_that_are_not_there(command: Command, class_model: Path, level: str, part: str) -> None:
    assert_error(command("inspect", class_model, "--level", level), part)


def test_a_bundle_has_its_cut_already(command: Command, class_bundle: Path) -> None:
    assert_error(command("inspect", class_bundle, "--level", "1"), "its cut is made")
    assert_error(command("inspect", class_bundle, "--point", "after_upsample"), "its cut is made")


def test_a_model_that_is_not_the_bundles_source(command: Command, class_bundle: Path, text_model: Path) -> None:
    with unchanged(class_bundle):
        assert_error(command("verify", class_bundle, "--model", text_model), "is not the bundle's source")
        assert_error(command("verify", class_bundle, "--model", text_model / "nowhere"), "no model at")


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "onnx/unet/lowres.onnx", "README.md"])
def test_a_damaged_bundle(command: Command, class_bundle: Path, place: Path, name: str) -> None:
    bundle = shutil.copytree(class_bundle, place / "bundle")
    flip_bit(bundle / name)
    with unchanged(place):
        assert_error(command("verify", bundle), name)
        if name != "README.md":
            assert_error(command("run", bundle, "-o", place / "out.png"), name)


def test_a_number_below_its_floor_is_a_failed_check(command: Command, class_bundle: Path, place: Path) -> None:
    bundle = shutil.copytree(class_bundle, place / "bundle")
    seal_plain(bundle, lambda m: m["targets"][0]["components"]["unet"]["floors"].update(graph=500.0))
    said = command("verify", bundle)
    assert said.code == 1
    assert len(said.errors) == 1
    assert re.match(rf"error: {bundle}: \d of \d+ numbers are below their floor, the worst: graph ", said.errors[0])
    said = command("verify", bundle, "--json")
    assert (said.code, json.loads(said.out)["ok"]) == (1, False)


# The commands themselves.


@pytest.mark.parametrize("args", [["explode"], ["--explode"], ["run"], ["verify", "a", "b"], ["inspect"]])
def test_commands_that_are_not_there_or_not_complete(command: Command, args: list[str]) -> None:
    assert_error(command(*args))


@pytest.mark.parametrize(
    ("args", "part"),
    [(["run", "nowhere"], "no bundle at nowhere"), (["inspect", "x", "--level", "abc"], "valid integer"),
     (["explode"], "explode"), (["run", "x", "--explode"], "--explode")],
)  # fmt: skip
def test_the_script_says_one_line(tmp_path: Path, args: list[str], part: str) -> None:
    assert_error(process(*args, cwd=tmp_path), part)
    assert snapshot(tmp_path) == {}
