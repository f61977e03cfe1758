import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)#:]+)\)")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("language", ["sh", "python"])
def test_what_the_readme_shows_runs(language: str, tmp_path: Path) -> None:
    (block,) = _blocks(language)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euc", block] if language == "sh" else [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if language == "sh":
        assert (tmp_path / "orange.png").stat().st_size > 1000
        assert (tmp_path / "grid.png").stat().st_size > 1000
        assert "everything holds" in done.stdout


FOLDERS = ("", "edgediff/**/", "runtime/**/", "export_configs/", "benchmarks/**/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []
