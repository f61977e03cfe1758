"""The README: every line of its examples runs, every command in it parses, every link leads somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import SCRIPT, exit_code

from edgediff.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)#:]+)\)")
(SHELL,) = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
LINES = [shlex.split(line, comments=True) for line in SHELL.splitlines() if line.strip()]


@pytest.mark.long
def test_every_line_of_the_shell_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edgediff").symlink_to(ROOT / "edgediff")  # a checkout, for the files that the lines name
    for program, *args in LINES:
        if program == "edgediff":  # in this process: each of its own would import torch again
            assert exit_code(monkeypatch, *args) == 0, (args, capsys.readouterr().err)
        else:
            assert program == "python"
            done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert (tmp_path / "cat.png").stat().st_size > 1000
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert "every number is above its floor" in capsys.readouterr().out


@pytest.mark.long
def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("(2, 64, 64, 3) (1, 0, 1, 0, 1, 0, 1, 0) ")


COMMANDS = [args for program, *args in LINES if program == "edgediff"]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_every_command_parses(args: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *args = args
        command = command.commands[name]
    command.make_context(name, args)


def test_the_script_is_there_and_the_python_compiles() -> None:
    assert subprocess.run([SCRIPT, "--version"], capture_output=True, check=True).stdout.startswith(b"edgediff ")
    compile(PYTHON, "README.md", "exec")


FOLDERS = ("", "edgediff/**/", "runtime/**/", "export_configs/", "benchmarks/**/")
FOUND = (page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))
PAGES = sorted(page for page in FOUND if "node_modules" not in page.parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []
