import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgediff.export.pipeline as pipeline
from edgediff import cli
from edgediff.verify.reference import Reference, save_reference

# What the commands say on the way where there is no terminal, one line for each thing.
PROGRESS = (
    "loading ", "opening ", "step ", "dividing ", "drawing ", "reference trajectory", "exporting ", "verifying: ",
    "hashing ", "onnxruntime: ", "torch: ",
)  # fmt: skip
NUMBERS = "encoder_hidden_states"


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    errors: list[str]


Command = Callable[..., Said]


def _said(code: int, out: str, err: str) -> Said:
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(PROGRESS)]
    return Said(code, out, lines)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*args: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["edgediff", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return _said(caught.value.code, said.out, said.err)

    return run


def process(*args: object, **options: Any) -> Said:
    script = Path(sys.executable).parent / "edgediff"
    done = subprocess.run([script, *map(str, args)], capture_output=True, text=True, timeout=120, **options)
    return _said(done.returncode, done.stdout, done.stderr)


def assert_error(said: Said, *parts: str, code: int = 2) -> None:
    assert said.code == code, said
    assert len(said.errors) == 1, said.errors
    assert said.errors[0].startswith("error: "), said.errors
    for part in parts:
        assert part in said.errors[0], (part, said.errors)
    assert said.out == ""


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything under a folder, hidden things too."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        for p in found
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file of the user's; what a test makes in it lies in `place`, and all else stays as it was."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    yield tmp_path / "work"
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"


# The model.


@pytest.fixture
def model(class_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(class_model, tmp_path / "model")


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _scheduler(**values: Any) -> Callable[[Path], None]:
    return _config("scheduler/scheduler_config.json", **values)


def _config(name: str, **values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | values))

    return change


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such directory, and no built-in name (choices: grocery-32, sd15)"),
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), "is empty; expected config.json"),
    "a file": (lambda m: (shutil.rmtree(m), m.touch()), "is a file; expected a diffusers directory"),
    "empty unet": (lambda m: (shutil.rmtree(m / "unet"), (m / "unet").mkdir()), "unet is empty"),
    "no weights": (lambda m: (m / WEIGHTS).unlink(), "has a config.json but no weights"),
    "no config": (lambda m: (m / "unet/config.json").unlink(), "config.json is missing"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "no scheduler/scheduler_config.json"),
    "truncated weights": (lambda m: _cut_short(m / WEIGHTS), "damaged or truncated"),
    "empty weights": (lambda m: (m / WEIGHTS).write_bytes(b""), "damaged or truncated"),
    "weights of another model": (_config("unet/config.json", out_channels=5), "do not fit"),
    "not JSON": (lambda m: (m / "unet/config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda m: (m / "unet/config.json").write_text("[1]"), "config.json"),
    "another class": (_config("unet/config.json", _class_name="VQModel"), "supported: UNet2DModel"),
    "no size": (_config("unet/config.json", sample_size=None), "sample_size"),
    "size 0": (_config("unet/config.json", sample_size=0), "sample_size 0"),
    "size 17": (_config("unet/config.json", sample_size=17), "17x17"),
    "no channels": (_config("unet/config.json", block_out_channels=[]), "does not describe a UNet2DModel"),
    "no groups": (_config("unet/config.json", norm_num_groups=0), "does not describe a UNet2DModel"),
    "unknown time": (_config("unet/config.json", time_embedding_type="x"), "does not describe a UNet2DModel"),
    "negative channels": (_config("unet/config.json", in_channels=-3), "does not describe"),
    "labels twice": (lambda m: (m / "classes.json").write_text('["a","a","b","c"]'), "expected 5 distinct names"),
    "labels of numbers": (lambda m: (m / "classes.json").write_text("[1,2,3,4]"), "is not a list of names"),
    "a scheduler of steps 0": (_scheduler(num_train_timesteps=0), "num_train_timesteps 0"),
    "a negative beta": (_scheduler(beta_start=-1.0), "beta_start -1.0"),
    "a beta that is no number": (_scheduler(beta_end=float("nan")), "beta_end nan"),
    "an unknown prediction": (_scheduler(prediction_type="flow"), "prediction_type 'flow'"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_cannot_be_exported(command: Command, model: Path, place: Path, name: str) -> None:
    change, part = BAD_MODELS[name]
    change(model)
    before = snapshot(place)
    assert_error(command("export", model, "-o", place / "out"), part)
    assert snapshot(place) == before


def test_weights_that_are_not_finite(command: Command, model: Path, place: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / WEIGHTS)
    weights["conv_in.bias"][0] = np.inf
    save_file(weights, model / WEIGHTS)
    assert_error(command("export", model, "-o", place / "out"), "weights are not finite in conv_in.bias")
    assert not (place / "out").exists()


# The recipe and the options.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("clok: 2", ("unknown key 'clok', did you mean 'clock'?",)),
        ("onnx: {opsett: 21}", ("unknown key 'onnx.opsett', did you mean 'onnx.opset'?",)),
        ("steps: many", ("'steps'", "expected `int`")),
        ("steps: 2.5", ("'steps'",)),
        ("steps: true", ("'steps'",)),
        ("steps: 0", ("'steps' is 0; expected 1 or more",)),
        ("cut: {level: 0}", ("'cut.level' is 0",)),
        ("cut: {level: -1}", ("'cut.level' is -1",)),
        ("cut: {level: 7}", ("cannot cut at level 7", "choices: 1")),
        ("cut: {point: middle}", ("before_upsample, after_upsample",)),
        ("cut: 1", ("'cut'",)),
        ("clock: 0", ("clock is 0",)),
        ("clock: [1, 0]", ("has 2 entries for 8 steps",)),
        ("clock: 0,1,1,1\nsteps: 4", ("begins with 0",)),
        ("guidance_scale: .nan", ("'guidance_scale' is nan",)),
        ("guidance_scale: .inf", ("'guidance_scale' is inf",)),
        ("guidance_scale: -2", ("'guidance_scale' is -2.0",)),
        ("verify: {graph_db: .nan}", ("'verify.graph_db' is nan",)),
        ("verify: {graph_db: 0}", ("'verify.graph_db' is 0",)),
        ("verify: {caching_db: -1}", ("'verify.caching_db' is -1",)),
        ("seed: -1", ("'seed' is -1",)),
        ("onnx: {opset: 99}", ("'onnx.opset' is 99; expected 18 to 23",)),
        ("targets: []", ("'targets' is empty",)),
        ("scheduler: lms", ("'scheduler'", "dpmpp_2m")),
        ("random_weights: 3", ("has weights of its own",)),
        ("conditioning: x.npz", ("not conditioned on text",)),
        ("- 1", ("expected a mapping of settings, got list",)),
        ("{", ("not YAML",)),
        ("a: !!python/object/apply:os.system [id]", ("not YAML",)),
    ],
)
def test_recipes_that_are_wrong(
    command: Command, class_model: Path, place: Path, text: str, parts: tuple[str, ...]
) -> None:
    (place / "recipe.yaml").write_text(text)
    before = snapshot(place)
    assert_error(command("export", class_model, "-o", place / "out", "--config", place / "recipe.yaml"), *parts)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--level", "abc"], "valid integer"),
        (["--level", "0"], "'cut.level' is 0"),
        (["--level", "3"], "levels, choices: 1"),
        (["--point", "here"], "before_upsample, after_upsample"),
        (["--steps", "0"], "'steps' is 0"),
        (["--steps", "100000"], "from 1 to 1000"),
        (["--clock", "0"], "clock is 0"),
        (["--clock", "1,0"], "2 entries for 8 steps"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--guidance-scale", "-1"], "guidance_scale"),
        (["--seed", "-1"], "'seed' is -1"),
        (["--seed", str(2**64)], "seed"),
        (["--dtype", "int4"], "dtype"),
        (["--layout", "heap"], "layout"),
        (["--adaptor", "nothing"], "identity"),
        (["--target", "exe"], "exe"),
        (["--scheduler", "lms"], "lms"),
        (["--verify", "no"], "verify.mode"),
        (["--random-weights", "1"], "has weights of its own"),
        (["--conditioning", "x.npz"], "not conditioned on text"),
        (["--config", "no-such-recipe"], "no recipe no-such-recipe"),
        (["--no-such-option"], "--no-such-option"),
        (["one", "more"], "unexpected extra argument"),
    ],
)
def test_export_options_that_are_wrong(
    command: Command, class_model: Path, place: Path, options: list[str], part: str
) -> None:
    before = snapshot(place)
    assert_error(command("export", class_model, "-o", place / "out", *options), part)
    assert snapshot(place) == before


def test_a_model_is_needed_and_a_geometry_needs_a_seed(command: Command, place: Path) -> None:
    assert_error(command("export", "-o", place / "out"), "no model: name a diffusers directory")
    assert_error(command("export", "sd15", "-o", place / "out"), "--random-weights SEED")
    assert not (place / "out").exists()


@pytest.mark.parametrize("args", [["explode"], ["--explode"], ["run"], ["verify", "a", "b"], ["inspect"]])
def test_commands_that_are_not_there_or_not_complete(command: Command, args: list[str]) -> None:
    assert_error(command(*args))


# Where the bundle goes.


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_other_things_are_never_replaced(command: Command, class_model: Path, place: Path, force: list[str]) -> None:
    (place / "page").mkdir()
    (place / "page" / "manifest.json").write_text('{"name": "a web page"}')
    (place / "page" / "index.html").touch()
    (place / "link").symlink_to("page")
    before = snapshot(place)
    for output, part in (
        (place, "a folder with other things in it, never replaced"),
        (place / "page", "a folder with other things in it, never replaced"),
        (place / "mine.txt", "mine.txt exists and is no directory"),
        (place / "mine.txt" / "out", "mine.txt is not a folder that can be written"),
        (place / ("x" * 300), "File name too long"),
    ):
        assert_error(command("export", class_model, "-o", output, *force), part)
        assert snapshot(place) == before
    assert_error(command("export", class_model, "-o", place / "link", *force), "link")
    assert snapshot(place) == before


def test_the_same_bundle_again_is_left_as_it_is(
    command: Command, class_model: Path, class_bundle: Path, place: Path
) -> None:
    shutil.copytree(class_bundle, place / "out")
    before = snapshot(place)
    for force in ([], ["--force"]):
        said = command("export", class_model, "-o", place / "out", "--steps", "4", *force)
        assert (said.code, snapshot(place)) == (0, before)
        assert "already there and valid: nothing was exported" in said.out.replace("\n", " ")


def test_another_bundle_and_a_damaged_one_need_force(
    command: Command, class_model: Path, class_bundle: Path, place: Path
) -> None:
    shutil.copytree(class_bundle, place / "out")
    before = snapshot(place)
    export = ("export", class_model, "-o", place / "out")
    assert_error(command(*export, "--steps", "3"), "holds another bundle; pass --force")
    assert snapshot(place) == before
    data = bytearray((place / "out" / "onnx" / "lowres.onnx").read_bytes())
    data[1000] ^= 1
    (place / "out" / "onnx" / "lowres.onnx").write_bytes(data)
    before = snapshot(place)
    assert_error(command(*export, "--steps", "4"), "not valid (onnx/lowres.onnx does not", "--force")
    assert snapshot(place) == before
    said = command(*export, "--steps", "4", "--force")
    assert (said.code, said.errors) == (0, [])
    assert command("verify", place / "out").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "out"]


# Interrupted, and a full disk.

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fails(fault: BaseException, after: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets a function work some times, then fail half done."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        calls = []

        def faulty(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) > after:
                raise fault
            return function(*args, **options)

        return faulty

    return wrap


@pytest.mark.parametrize(("fault", "code"), [(FULL, 2), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize(("name", "after"), [("write_onnx", 0), ("save_reference", 0), ("_seal", 0)])
def test_what_ends_an_export_leaves_what_was_there(
    command: Command,
    class_model: Path,
    class_bundle: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    code: int,
    name: str,
    after: int,
) -> None:
    if name != "write_onnx":  # the graphs take the time, and are not what fails here
        monkeypatch.setattr(pipeline, "_write_graphs", lambda folder, draft, *_: draft)
    monkeypatch.setattr(pipeline, name, _fails(fault, after)(getattr(pipeline, name)))
    shutil.copytree(class_bundle, place / "out")
    before = snapshot(place)
    for output in ("out", "deep/new"):
        said = command("export", class_model, "-o", place / output, "--steps", "3", "--force")
        assert_error(said, "what was there is as it was", code=code)
        assert ("the disk is full" in said.errors[0]) == (code == 2)
        shutil.rmtree(place / "deep", ignore_errors=True)
        assert snapshot(place) == before


def test_a_disk_that_fills_while_torch_writes_its_graph(
    command: Command, class_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(torch.onnx, "export", full)
    assert_error(command("export", class_model, "-o", place / "out", "--steps", "3"), "the disk is full")
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(command: Command, class_model: Path, class_bundle: Path, small_disk: Path) -> None:
    assert_error(command("export", class_model, "-o", small_disk / "out", "--steps", "3"), "the disk is full")
    assert snapshot(small_disk) == {}
    reference = Reference((), np.zeros(2**16, np.float32), {})
    with pytest.raises(OSError, match="No space left"):
        save_reference(reference, small_disk / "reference.safetensors")
    (small_disk / "reference.safetensors").unlink()
    (small_disk / "out.npy").write_bytes(b"as it was")
    (small_disk / "rest").write_bytes(b"x" * 50_000)
    said = command("run", class_bundle, "-o", small_disk / "out.npy")
    assert_error(said, "No space left on device")
    assert sorted(path.name for path in small_disk.iterdir()) == ["out.npy", "rest"]
    assert (small_disk / "out.npy").read_bytes() == b"as it was"


def test_a_number_that_does_not_hold_puts_nothing_in_place(
    command: Command, class_model: Path, class_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgediff.verify.parity import ParityReport, Row

    row = Row("graph", "lowres", "onnxruntime", "lowres_feature", 12.5, 35.0, False, "measured")
    monkeypatch.setattr(pipeline, "_write_graphs", lambda folder, draft, *_: draft)
    monkeypatch.setattr(pipeline, "verify_bundle", lambda *_, **__: ParityReport((row,), "full"))
    shutil.copytree(class_bundle, place / "out")
    before = snapshot(place)
    said = command("export", class_model, "-o", place / "out", "--steps", "3", "--force")
    assert_error(said, "graph lowres (lowres_feature, onnxruntime) is 12.5 dB, asked for 35.0 dB", code=1)
    assert snapshot(place) == before


def test_control_c_in_a_real_export(class_model: Path, place: Path) -> None:
    script = Path(sys.executable).parent / "edgediff"
    with subprocess.Popen(
        [script, "export", class_model, "-o", place / "out", "--steps", "3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        lines = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("exporting"):
                break
        time.sleep(0.3)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert_error(_said(running.returncode, out, "".join(lines) + err), "interrupted", code=130)
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt"]


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
        (["--clock", "abc"], ("clock is 'abc'",)),
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
        (["--backend", "tpu"], ("no backend 'tpu'; choices: onnxruntime",)),
        (["--level", "1"], ("--level",)),
    ],
)
def test_requests_that_a_class_bundle_cannot_serve(
    command: Command, class_bundle: Path, place: Path, options: list[str], parts: tuple[str, ...]
) -> None:
    (place / "out.png").write_text("as it was")
    before, bundle = snapshot(place), snapshot(class_bundle)
    said = command("run", class_bundle, "-o", place / "out.png", "--num-images", "1", *options)
    assert_error(said, *parts)
    assert (snapshot(place), snapshot(class_bundle)) == (before, bundle)


def test_requests_that_a_text_bundle_cannot_serve(command: Command, text_bundle: Path, place: Path) -> None:
    before = snapshot(place)
    run = ("run", text_bundle, "--num-images", "1", "-o")
    assert_error(command(*run, place / "out.npy"), "the model needs", "prompt_embeds of shape")
    assert_error(command(*run, place / "out.npy", "--label", "Apple"), "label 'Apple' was given", "text")
    assert_error(command(*run, place / "out.npy", "--prompt", "x"), "no text encoder")
    assert_error(command(*run, place / "out.png"), "latents and has no decoder; write them with -o out.npy")
    assert snapshot(place) == before


BAD_EMBEDDINGS: dict[str, tuple[Any, str]] = {
    "length": (np.zeros((1, 6, 12), np.float32), "has shape [1, 6, 12]; expected [batch, 7, 12]"),
    "rows": (np.zeros((3, 7, 12), np.float32), "1 or 1 rows"),
    "none": (np.zeros((0, 7, 12), np.float32), "has shape [0, 7, 12]"),
    "scalar": (np.float32(1), "has shape []"),
    "NaN": (np.full((1, 7, 12), np.nan, np.float32), "holds NaN or infinity"),
    "too large": (np.full((1, 7, 12), 1e300), "numbers that float32 cannot"),
    "text": (np.full((1, 7, 12), "a"), "expected numbers"),
    "complex": (np.zeros((1, 7, 12), np.complex64), "expected numbers"),
    "pickle": (np.array([{}], dtype=object), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_embeddings_that_do_not_fit(command: Command, text_bundle: Path, place: Path, name: str) -> None:
    value, part = BAD_EMBEDDINGS[name]
    np.savez(place / "text.npz", encoder_hidden_states=value, negative_encoder_hidden_states=np.zeros((1, 7, 12)))
    before = snapshot(place)
    run = ("run", text_bundle, "-o", place / "out.npy", "--num-images", "1", "--conditioning")
    assert_error(command(*run, place / "text.npz"), part)
    assert snapshot(place) == before


@pytest.mark.parametrize("data", [None, b"", b"hello", b"PK\x03\x04abc", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_hold_no_embeddings(
    command: Command, text_bundle: Path, text_model: Path, place: Path, data: bytes | None, suffix: str
) -> None:
    file = (place / "text").with_suffix(suffix)
    if data is not None:
        file.write_bytes(data)
    before = snapshot(place)
    assert_error(command("run", text_bundle, "-o", place / "out.npy", "--conditioning", file), "cannot be read as")
    assert_error(command("export", text_model, "-o", place / "out", "--conditioning", file), "cannot be read as")
    assert snapshot(place) == before


def test_embeddings_with_foreign_names(command: Command, text_bundle: Path, place: Path) -> None:
    good = np.zeros((1, 7, 12), np.float32)
    np.savez(place / "text.npz", encoder_hidden_states=good, negative_encoder_hidden_states=good, pooled=good)
    said = command("run", text_bundle, "-o", place / "out.npy", "--conditioning", place / "text.npz")
    assert_error(said, "pooled is no input of this model; it takes encoder_hidden_states")
    assert not (place / "out.npy").exists()


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
    before = snapshot(place)
    assert_error(command("run", class_bundle, "-o", place / name), part)
    assert snapshot(place) == before


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
    import edgediff.picture

    def half(path: object, *_: object) -> None:
        if isinstance(path, Path):
            path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(edgediff.picture, "write_png", half)
    monkeypatch.setattr(np, "save", half)
    (place / name).write_text("as it was")
    before = snapshot(place)
    assert_error(command("run", class_bundle, "-o", place / name, "--num-images", "1"), part, code=code)
    assert snapshot(place) == before


# Looking at bundles and models.


@pytest.mark.parametrize("name", ["verify", "run", "inspect"])
def test_what_is_no_bundle(command: Command, place: Path, name: str) -> None:
    (place / "empty").mkdir()
    before = snapshot(place)
    more = ("-o", place / "out.png") if name == "run" else ()
    for given in (place / "nowhere", place / "empty", place / "mine.txt", place):
        assert_error(command(name, given, *more), str(given))
        assert snapshot(place) == before


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
    before = snapshot(class_bundle)
    assert_error(command("verify", class_bundle, "--model", text_model), "is not the bundle's source")
    assert_error(command("verify", class_bundle, "--model", text_model / "nowhere"), "no model at")
    assert snapshot(class_bundle) == before


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "onnx/lowres.onnx", "README.md"])
def test_a_damaged_bundle(command: Command, class_bundle: Path, place: Path, name: str) -> None:
    bundle = shutil.copytree(class_bundle, place / "bundle")
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    before = snapshot(place)
    assert_error(command("verify", bundle), name)
    if name != "README.md":
        assert_error(command("run", bundle, "-o", place / "out.png"), name)
    assert snapshot(place) == before


def test_a_number_that_does_not_hold_is_a_failed_check(command: Command, class_bundle: Path, place: Path) -> None:
    from test_bundle import seal_plain

    bundle = shutil.copytree(class_bundle, place / "bundle")
    seal_plain(bundle, lambda m: m["floors"].update(graph=500.0))
    said = command("verify", bundle)
    assert said.code == 1
    assert said.errors == [f"error: {bundle} does not hold"]
    said = command("verify", bundle, "--json")
    assert (said.code, json.loads(said.out)["ok"]) == (1, False)


# The script itself.


@pytest.mark.parametrize(
    ("args", "part"),
    [(["run", "nowhere"], "no bundle at nowhere"), (["inspect", "x", "--level", "abc"], "valid integer"),
     (["explode"], "explode"), (["run", "x", "--explode"], "--explode")],
)  # fmt: skip
def test_the_script_says_one_line(tmp_path: Path, args: list[str], part: str) -> None:
    assert_error(process(*args, cwd=tmp_path), part)
    assert snapshot(tmp_path) == {}
