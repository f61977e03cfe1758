import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from artefacts import saved_once
from command_line import Command, Said, assert_error, exit_code
from PIL import Image
from rich.console import Console
from seals import seal_plain
from tiny_pipelines import SAVE, WIDTH

import edgediff
from edgediff.cli.demo import MODELS
from edgediff.config.recipes import find_recipe
from edgediff.errors import UnsupportedError
from edgediff.export.export_config import load_config
from edgediff.models.components import pipeline_components
from edgediff.zoo import check_adaptor

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "onnx", "onnxsim", "onnxscript", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def _light(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs code where the light install is all there is."""
    return subprocess.run([sys.executable, "-c", BLOCK + code, *map(str, args)], capture_output=True, text=True)


def test_run_writes_a_grid_and_the_ledger(
    class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "out.png"
    assert exit_code(monkeypatch, "run", class_bundle, "-o", picture, "--num-images", 5, "--scale", 2, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["images"] == [str(picture)]
    assert shown["mask"] == [1, 0, 1, 0]
    assert [step["full"] for step in shown["ledger"]] == [True, False, True, False]
    assert {"highres_in", "highres_out", "scheduler", "other"} <= shown["ledger"][1]["ms"].keys()
    with Image.open(picture) as image:
        assert image.size == (3 * 16 * 2, 2 * 16 * 2)
        assert len(image.getcolors(1 << 16) or []) > 100


def test_run_writes_latents(class_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("run", class_bundle, "-o", tmp_path / "x.npy", "--num-images", 2, "--label", "Kiwi")
    assert exit_code(monkeypatch, *args) == 0
    assert np.load(tmp_path / "x.npy").shape == (2, 3, 16, 16)


def test_run_takes_embeddings_from_a_file(text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text = {n: rng.standard_normal((1, 7, 12)) for n in ("encoder_hidden_states", "negative_encoder_hidden_states")}
    np.savez(tmp_path / "prompt.npz", **text)
    args = ("run", text_bundle, "-o", tmp_path / "x.npy", "--conditioning", tmp_path / "prompt.npz", "--num-images", 3)
    assert exit_code(monkeypatch, *args) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 4, 16, 16)


def test_verify_prints_the_numbers(
    class_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "verify", class_bundle) == 0
    table = capsys.readouterr().out
    assert "every number is above its floor" in table
    assert all(check in table for check in ("graph", "composed", "trajectory", "caching"))
    assert exit_code(monkeypatch, "verify", class_bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_floor_that_is_not_reached_is_exit_code_1_and_nothing_is_placed(
    class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("steps: 2\nlayout: split\nverify: {graph_db: 199}\n")
    assert exit_code(monkeypatch, "export", class_model, "-o", tmp_path / "b", "--config", recipe) == 1
    assert "expected 199" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [recipe]


def test_inspect_shows_a_bundle_and_a_model_alike(
    class_bundle: Path, class_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for what in (class_bundle, class_model):
        assert exit_code(monkeypatch, "inspect", what, "--clock", 3, "--steps", 6, "--json") == 0
        shown.append(json.loads(capsys.readouterr().out))
    for key in ("parameters", "gflops", "gflops_attention", "macs_without_attention", "cache_bytes", "schedule"):
        assert shown[0][key] == shown[1][key]
    schedule = shown[0]["schedule"]
    assert schedule["mask"] == [1, 0, 0, 1, 0, 0]
    assert schedule["batch"] == 2
    gflops = shown[0]["gflops"]
    assert schedule["tflops"] == pytest.approx(2 * (2 * gflops["full"] + 4 * gflops["cached"]) / 1e3)
    assert exit_code(monkeypatch, "inspect", class_bundle) == 0
    table = capsys.readouterr().out
    assert "highres_out" in table
    assert "Apple, Banana, Kiwi, Orange" in table
    assert "4 steps of dpmpp_2m, clock 2, guidance 2" in table


def test_inspect_shows_what_a_pipeline_consists_of(command: Command) -> None:
    folder = saved_once("xl", SAVE["xl"])
    shown = json.loads(command("inspect", folder, "--json").out)["components"]
    assert {entry["component"]: (entry["class"], entry["stage"]) for entry in shown} == {
        "text_encoder": ("CLIPTextModel", "prompt"),
        "text_encoder_2": ("CLIPTextModelWithProjection", "prompt"),
        "vae_decoder": ("AutoencoderKL", "decode"),
        "vae_encoder": ("AutoencoderKL", "image"),
    }
    loaded = pipeline_components(edgediff.load_model(folder))
    for entry in shown:
        part = loaded[entry["component"]].load()
        assert entry["parameters"] == sum(parameter.numel() for parameter in part.parameters())
    # 77 tokens through 3 layers: four projections and two layers of the feed-forward, twice as wide.
    assert shown[0]["gflops"] == pytest.approx(2e-9 * 77 * 3 * (4 + 4) * WIDTH**2)
    assert shown[0]["gflops_attention"] == pytest.approx(2e-9 * 3 * 2 * 77 * 77 * WIDTH)
    assert "text_encoder_2" in command("inspect", folder).out
    assert json.loads(command("inspect", "sd15", "--json").out)["components"] == []


def test_inspect_shows_what_a_bundle_has_of_each_component(command: Command, class_bundle: Path) -> None:
    (unet,) = json.loads(command("inspect", class_bundle, "--json").out)["components"]
    size = sum(file.stat().st_size for file in (class_bundle / "onnx" / "unet").iterdir())
    assert unet == {
        "target": "onnx", "component": "unet", "stage": "step", "dtype": "fp32", "batch": None, "bytes": size,
        "peak_bytes": None,
        "floors_db": {"graph": 100.0, "composed": 90.0, "trajectory": 70.0, "caching": None, "program": None},
    }  # fmt: skip
    assert f"{size / 1e6:.2f}" in command("inspect", class_bundle).out


# What a user chose to call things, and what a terminal can show.


def _on_terminal(*args: object) -> tuple[int, str]:
    parent, child = pty.openpty()
    done = subprocess.Popen([sys.executable, "-m", "edgediff", *map(str, args)], stdout=child, stderr=child)
    os.close(child)
    said = b""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed
        while data := os.read(parent, 1 << 16):
            said += data
    os.close(parent)
    return done.wait(60), said.decode()


NAMES = ("b[/x]", "m[red]", "m[v1]", ":smile:", "[link=x]y[/link]", "größe", "100%|{0}")


@pytest.mark.parametrize("command", ["run", "verify", "export", "inspect"])
def test_names_are_shown_as_they_are_on_a_terminal(command: str, tmp_path: Path) -> None:
    for name in NAMES[:2] if command == "inspect" else NAMES[:3]:
        code, said = _on_terminal(
            command, name, *(() if command in ("verify", "inspect") else ("-o", tmp_path / "o.png"))
        )
        assert code == 2
        assert f"at {name}: no such directory" in " ".join(said.split())


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_in_tables_and_progress(
    command: Command, class_bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((shutil.copytree(class_bundle, tmp_path / name) / "manifest.json").read_text())
    assert manifest["source"]["name"] == "tiny-class"
    seal_plain(tmp_path / name, lambda m: (m["source"].update(name=name), m["conditioning"]["labels"].insert(0, name),
                                           m["conditioning"]["labels"].pop()))  # fmt: skip
    shown = command("inspect", tmp_path / name)
    assert shown.code == 0, shown
    assert f"{name}, cut at level 1" in shown.out
    assert f"{name}, Apple" in " ".join(shown.out.split())
    said = command("run", tmp_path / name, "-o", tmp_path / f"{name}.png", "--num-images", 1, "--label", name)
    assert said.code == 0, said
    assert said.out.rstrip().endswith(f"1 image: {tmp_path / name}.png")
    monkeypatch.setattr(Console, "is_terminal", True)
    assert command("run", tmp_path / name, "-o", tmp_path / f"{name}.png", "--num-images", 1).code == 0
    assert_error(command("run", tmp_path / name, "-o", tmp_path / f"{name}.jpg"), f"{name}.jpg")


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"COLUMNS": "0"},
                                      {"COLUMNS": "7"}])  # fmt: skip
def test_nothing_is_lost_on_a_terminal_that_cannot_show_it(
    class_bundle: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    picture = tmp_path / "größe-→.png"
    args = ("run", class_bundle, "-o", picture, "--num-images", 1)
    done = subprocess.run([sys.executable, "-m", "edgediff", *map(str, args)], capture_output=True,
                          env={**os.environ, **settings})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert picture.is_file()
    encoding = settings.get("PYTHONIOENCODING", "utf-8")
    shown = "größe-→.png".encode(encoding, "backslashreplace")
    assert shown in done.stdout
    for word in (b"ledger, ms", b"highres_", b"cached", b"sum"):
        assert word in done.stdout


# Usage errors come before anything that takes long.


HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "coremltools", "openvino")
WRONG = [
    ["export", "nothing-there"], ["export", "grocery-32", "--clock", "0"], ["export", "grocery-32", "--target", "exe"],
    ["export", "grocery-32", "--config", "none"], ["export", "grocery-32", "-o", "mine.txt"], ["export"],
    ["export", "grocery-32", "--adaptor", "nowhere"], ["export", "grocery-32", "--adaptor", "mine.txt"],
    ["export", "sd15", "--conditioning", "nowhere.npz"], ["export", "sd15", "--conditioning", "nowhere.safetensors"],
    ["export", "sd15", "--conditioning", "bad.npz"], ["export", "--config", "recipe.yaml"],
    ["export", "grocery-32", "-o", "mine.txt/b"], ["export", "grocery-32", "--explode"],
    ["verify", "nothing-there"], ["run", "nothing-there"], ["run", "."], ["inspect", "nothing-there"], ["inspect"],
    ["inspect", "grocery-32", "--clock", "0"], ["inspect", "grocery-32", "--steps", "0"],
    ["inspect", "grocery-32", "--batch", "0"], ["inspect", "--compare", "nothing"],
    ["demo", "sd15"], ["demo", "-o", "mine.txt"], ["doctor", "--explode"], ["explode"], ["bench", "nothing-there"],
    ["plan", "nothing-there"], ["evaluate", "distance", "nothing-there", "--images", "."],
    ["evaluate", "spectrum", "nothing-there", "--images", "."], ["train", "adaptor", "nothing-there"],
]  # fmt: skip


def test_usage_errors_import_nothing_that_takes_long(tmp_path: Path) -> None:
    mine = {"mine.txt": "mine", "bad.npz": "no archive", "recipe.yaml": "model: grocery-32\nadaptor: nowhere\n"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    code = f"""
import sys
from edgediff.cli import main
for args in {WRONG!r}:
    sys.argv = ["edgediff", *args]
    try:
        main()
    except SystemExit as e:
        print(args, e.code, *sorted({{name for name in {HEAVY!r} if name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{args} 2" for args in WRONG]
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == len(WRONG)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine


@pytest.mark.parametrize("spec", ["identity", "resnet", "resnet-clock-2", "folder"])
def test_adaptors_that_are_there_get_past_the_first_check(spec: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if spec == "folder" else spec
    check_adaptor(folder, "grocery-32")
    for wrong in ("nowhere", "", str(tmp_path / "none")):
        with pytest.raises(UnsupportedError, match=r"beside grocery-32; choices: identity, .*, a folder"):
            check_adaptor(wrong, "grocery-32")


# The reader of a pipe that leaves early: no message, nothing lost.


def _unread(*args: object, stderr: bool = False, module: str = "edgediff") -> tuple[int, str]:
    """Exit code and standard error of a command whose output, or errors, nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    out, err = (subprocess.DEVNULL, writer) if stderr else (writer, subprocess.PIPE)
    command = [sys.executable, "-m", module, *map(str, args)]
    done = subprocess.run(command, text=True, check=False, stdout=out, stderr=err)
    os.close(writer)
    return done.returncode, done.stderr or ""


UNREAD = [["--help"], ["doctor"], ["inspect", "BUNDLE"], ["run", "BUNDLE", "-o", "OUTPUT"]]
UNREAD_TOO = [
    ["export", "--help"], ["--version"], ["doctor", "--json"], ["verify", "BUNDLE"], ["inspect", "BUNDLE", "--json"],
    ["run", "BUNDLE", "-o", "OUTPUT", "--json"],
]  # fmt: skip


@pytest.mark.parametrize(
    "args", [*UNREAD, *(pytest.param(args, marks=pytest.mark.long) for args in UNREAD_TOO)], ids=" ".join
)
def test_a_closed_pipe_ends_every_command_silently(args: list[str], class_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    names = {"BUNDLE": str(class_bundle), "OUTPUT": str(picture)}
    code, said = _unread(*(names.get(arg, arg) for arg in args))
    assert code == 141
    assert Said.of(code, "", said).errors == []
    assert picture.is_file() == ("OUTPUT" in args)


def test_a_closed_pipe_ends_the_runtimes_command_silently(class_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    assert _unread(class_bundle, "-o", picture, "--num-images", 1, module="edgediff_runtime") == (141, "")
    assert picture.is_file()


def test_an_error_that_nobody_reads_ends_silently_too(tmp_path: Path) -> None:
    assert _unread("inspect", tmp_path / "nothing", stderr=True) == (141, "")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"edgediff {metadata.version('edgediff')}\n"


def test_doctor_says_what_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["abilities"]["export to ONNX"] == "yes"
    assert found["versions"]["torch"]["tested"] == "2.13.0"


@pytest.mark.parametrize("command", ["export", "verify", "run", "inspect", "doctor", "demo", "serve", "site"])
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch, command, "--help") == 0
    assert f"edgediff {command}" in capsys.readouterr().out


def test_the_demo_shows_models_that_have_weights_and_a_recipe(command: Command, place: Path) -> None:
    for name in MODELS:
        assert load_config(find_recipe(name)).model == name
        assert edgediff.load_model(name).has_weights
    said = command("demo", "sd15", "-o", place / "demo")
    assert_error(said, "'sd15'", "choices: drawings-64-student, drawings-64-student-4-steps, drawings-64, ")
    assert not (place / "demo").exists()


def test_the_light_install_runs_verifies_and_inspects(class_bundle: Path, tmp_path: Path) -> None:
    code = "from edgediff.cli import main; main()"
    run = _light(code, "run", class_bundle, "-o", tmp_path / "a.png", "--num-images", 4)
    assert run.returncode == 0, run.stderr
    verify = _light(code, "verify", class_bundle, "--json")
    assert verify.returncode == 0, verify.stderr
    notes = {row["check"]: row for row in json.loads(verify.stdout)["rows"]}
    assert notes["trajectory"]["note"].endswith("torch is not installed")
    assert notes["trajectory"]["psnr_db"] > 80
    named = _light(code, "verify", class_bundle, "--model", "grocery-32")
    assert named.returncode == 2
    assert named.stderr.splitlines()[-1].endswith('pip install "edgediff[export]"')
    assert _light(code, "inspect", class_bundle).returncode == 0
    assert _light(code, "doctor").returncode == 0
    module = _light("import runpy; runpy.run_module('edgediff_runtime', run_name='__main__')",
                    class_bundle, "-o", tmp_path / "b.png", "--num-images", 4)  # fmt: skip
    assert module.returncode == 0, module.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "args", [(), ("b", "--strength", "half"), ("b", "--nope"), ("b", "-o"), ("none", "--seed", "1")]
)
def test_the_modules_usage_errors_are_one_line(args: tuple[str, ...], tmp_path: Path) -> None:
    module = [sys.executable, "-m", "edgediff_runtime"]
    done = subprocess.run([*module, *args], capture_output=True, text=True, cwd=tmp_path)
    assert_error(Said.of(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize("args", [("export", "grocery-32", "-o", "x"), ("demo",), ("inspect", "sd15")])
def test_the_light_install_names_the_extra_that_a_command_needs(args: tuple[str, ...], tmp_path: Path) -> None:
    done = _light(f"import os; os.chdir({str(tmp_path)!r}); from edgediff.cli import main; main()", *args)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith('pip install "edgediff[export]"')
    assert list(tmp_path.iterdir()) == []


def test_python_names_on_the_light_install() -> None:
    done = _light("import edgediff\ntry: edgediff.load_model\nexcept edgediff.EdgediffError as e: print(e)")
    assert done.stdout.strip() == "edgediff.load_model needs the 'export' extra: pip install \"edgediff[export]\""
