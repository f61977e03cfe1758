import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgediff
from edgediff_runtime.manifest_json import manifest_schema

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "runtime" / "edgediff_runtime"
SOURCES = sorted([*(ROOT / "edgediff").rglob("*.py"), *RUNTIME.rglob("*.py")])

# The way of the data: a room may import itself and those before it.
STAGES = (
    ("edgediff.errors",),
    ("edgediff.extras", "edgediff.outputs", "edgediff.zoo"),
    ("edgediff.config", "edgediff.data"),
    ("edgediff.models", "edgediff.mil"),
    ("edgediff.bundle",),
    ("edgediff.targets",),
    ("edgediff.verify", "edgediff.train"),
    ("edgediff.export", "edgediff.evaluate", "edgediff.inspect", "edgediff.doctor", "edgediff.site"),
    ("edgediff.plan", "edgediff.bench"),
    ("edgediff.cli", "edgediff.__main__"),
)
BACKENDS = {"onnxruntime", "coremltools", "openvino", "executorch", "ai_edge_litert"}
OF_THE_RUNTIME = {"numpy", "msgspec"}
# Only where they are needed: a session, a PNG, a prompt.
LATE_OF_THE_RUNTIME = {"onnxruntime", "coremltools", "PIL", "openvino", "tokenizers", "ai_edge_litert"}


def module_name(file: Path) -> str:
    base = RUNTIME.parent if RUNTIME in file.parents else ROOT
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """The modules that a source imports, and whether it does so when it is itself imported."""

    def walk(node: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "house style: absolute imports"
            yield from ((f"{node.module}.{alias.name}", early) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield from ((a.value, early) for a in node.args[:1] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, early and not inside)

    return walk(ast.parse(source), True)


def stage(module: str) -> int | None:
    found = [i for i, names in enumerate(STAGES) for n in names if module == n or module.startswith(f"{n}.")]
    return found[0] if found else None


def import_faults(module: str, source: str) -> list[str]:
    """What a source imports against the rule of design.md."""
    faults = []
    of_runtime = module.partition(".")[0] == "edgediff_runtime"
    mine = stage(module)
    if not of_runtime and mine is None and module != "edgediff":
        faults.append(f"{module} has no stage")
    for name, early in imports(source):
        top = name.partition(".")[0]
        if top in BACKENDS and early:
            faults.append(f"{module} imports {top} outside of a function or class")
        if of_runtime:
            allowed = {"edgediff_runtime", *OF_THE_RUNTIME, *sys.stdlib_module_names}
            if top not in allowed and (early or top not in LATE_OF_THE_RUNTIME):
                faults.append(f"{module} imports {top}")
            continue
        if module.startswith("edgediff.models") and top in {"onnx", "onnxsim", "onnxscript", *BACKENDS}:
            faults.append(f"{module} imports {top}")
        theirs = stage(name)
        if mine is not None and theirs is not None and theirs > mine:
            faults.append(f"{module} imports {name}, which comes after it")
    return faults


def exit_faults(source: str) -> list[str]:
    """Where a source prints or ends the program."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "sys.stdout.write", "sys.stderr.write"}
    return [f"line {call.lineno}: {ast.unparse(call.func)}" for call in calls if ast.unparse(call.func) in names]


# The one-way rule


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_imports_go_one_way(file: Path) -> None:
    assert import_faults(module_name(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("edgediff.errors", "import edgediff.config.choices", "edgediff.config.choices, which comes after it"),
        (
            "edgediff.config.choices",
            "from edgediff.models.load import Model",
            "models.load.Model, which comes",
        ),
        ("edgediff.config.choices", "from edgediff import models", "edgediff.models, which comes after it"),
        ("edgediff.verify.parity", "def f():\n    from edgediff.export import onnx", "which comes after it"),
        ("edgediff.targets.onnx.write_onnx", "from edgediff.cli import app", "edgediff.cli.app, which comes after it"),
        ("edgediff.models.load", "import importlib\nimportlib.import_module('edgediff.cli')", "which comes after it"),
        ("edgediff.models.load", "import onnx.helper", "imports onnx"),
        ("edgediff.models.torch_session", "def f():\n    import onnxruntime", "imports onnxruntime"),
        ("edgediff.targets.onnx.write_onnx", "import onnxruntime as ort", "onnxruntime outside of a function or class"),
        (
            "edgediff.targets.onnx.write_onnx",
            "try:\n    from openvino import Core\nexcept ImportError:\n    pass",
            "openvino outside",
        ),
        ("edgediff_runtime.loop", "import torch", "imports torch"),
        ("edgediff_runtime.loop", "def f():\n    from edgediff.config.choices import Cut", "imports edgediff"),
        ("edgediff_runtime.image", "from PIL import Image", "imports PIL"),
        ("edgediff_runtime.sessions", "import onnxruntime", "onnxruntime outside of a function or class"),
        ("edgediff.novelty", "", "edgediff.novelty has no stage"),
    ],
)
def test_the_rule_finds_what_breaks_it(module: str, source: str, fault: str) -> None:
    faults = import_faults(module, source)
    assert any(fault in found for found in faults), faults


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "edgediff.targets.onnx.write_onnx",
            "import onnx\nfrom edgediff.bundle.psnr import psnr_db\nfrom edgediff_runtime import noise",
        ),
        ("edgediff.targets.onnx.write_onnx", "def f():\n    import onnxruntime"),
        ("edgediff.models.load", "import torch\nfrom edgediff.errors import ModelError\nfrom edgediff.zoo import ZOO"),
        ("edgediff.cli.render.tables", "if TYPE_CHECKING:\n    from edgediff.cli import app"),
        ("edgediff_runtime.sessions", "class OrtSession:\n    import onnxruntime"),
        ("edgediff_runtime.image", "import numpy as np\ndef f():\n    from PIL import Image"),
    ],
)
def test_the_rule_lets_the_rest_be(module: str, source: str) -> None:
    assert import_faults(module, source) == []


def test_every_source_is_looked_at() -> None:
    names = {module_name(file) for file in SOURCES}
    assert {
        "edgediff",
        "edgediff.cli",
        "edgediff.models.load",
        "edgediff_runtime",
        "edgediff_runtime.__main__",
    } <= names
    assert {stage(name) for name in names if name.startswith("edgediff.")} == {*range(len(STAGES))}


# What is loaded by an import


def loaded(program: str) -> set[str]:
    """Packages that a program loads, the standard library left out, in a fresh interpreter."""
    program = f"import sys\nbefore = {{*sys.modules}}\n{program}\nprint(*({{*sys.modules}} - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names


def test_the_runtime_loads_numpy_and_msgspec() -> None:
    # typing_extensions comes with msgspec where it is installed.
    found = loaded("import edgediff_runtime")
    assert found - {"typing_extensions"} == {"edgediff_runtime", *OF_THE_RUNTIME}


def test_pillow_is_loaded_when_a_png_is_written(tmp_path: Path) -> None:
    program = (
        "import numpy as np\nfrom edgediff_runtime.image import grid, write_png\n"
        "image = grid(np.zeros((4, 8, 8, 3), np.uint8))\nassert 'PIL' not in sys.modules"
    )
    assert "PIL" not in loaded(program)
    assert "PIL" in loaded(f"{program}\nwrite_png({str(tmp_path / 'a.png')!r}, image)")
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_edgediff_itself_loads_nothing() -> None:
    assert loaded("import edgediff\ndir(edgediff)") == {"edgediff"}


LIGHT = (
    "edgediff.cli",
    "edgediff.export.export_config",
    "edgediff.doctor",
    "edgediff.inspect.survey",
    "edgediff.cli.render.tables",
    "edgediff.verify.parity",
    "edgediff.site.server",
    "edgediff.site.folder",
)


@pytest.mark.parametrize("module", LIGHT)
def test_what_the_light_install_has_loads_no_toolchain(module: str) -> None:
    assert loaded(f"import {module}") & {"torch", "diffusers", "onnx", "onnxscript", "onnxsim", "coremltools"} == set()


def test_the_rule_on_loading_can_fail() -> None:
    assert "msgspec" in loaded("import edgediff.export.export_config")


# Names, printing, lengths, the schema


@pytest.mark.parametrize("name", edgediff.__all__)
def test_every_public_name_resolves(name: str) -> None:
    found = getattr(edgediff, name)
    assert found.__name__ == name
    assert getattr(importlib.import_module(found.__module__), name) is found


def test_public_names_are_sorted_and_others_are_refused() -> None:
    assert edgediff.__all__ == sorted(edgediff._HOME)
    assert dir(edgediff) == edgediff.__all__
    with pytest.raises(AttributeError, match="module 'edgediff' has no attribute 'exprot_bundle'"):
        edgediff.exprot_bundle  # noqa: B018


def test_only_the_command_lines_print_and_exit() -> None:
    found = {module_name(file): exit_faults(file.read_text()) for file in SOURCES}
    assert {name for name, faults in found.items() if faults} == {
        "edgediff.__main__",
        "edgediff.cli.app",
        "edgediff_runtime.__main__",
    }, found


def test_printing_and_exiting_is_found() -> None:
    source = "import sys\n\ndef f():\n    print(1)\n    sys.exit(2)\n    raise SystemExit(3)\n"
    assert exit_faults(source) == ["line 4: print", "line 5: sys.exit", "line 6: SystemExit"]
    assert exit_faults("out.print(1)\nlog.exit()\npprint(2)\n") == []


def test_the_schema_on_disk_is_the_one_that_the_structs_give() -> None:
    text = (ROOT / "runtime/manifest.schema.json").read_text(encoding="utf-8")
    assert text == json.dumps(manifest_schema(), indent=1) + "\n", "write runtime/manifest.schema.json anew"
