"""What is installed, what this machine can do, and which versions are known not to go together."""

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgediff.targets import TARGETS
from edgediff.targets.base import Backend

# What the tests ran with; a test compares it with constraints.txt.
TESTED = {
    "numpy": "2.4.6",
    "msgspec": "0.22.0",
    "safetensors": "0.8.0",
    "pillow": "13.0.0",
    "rich": "15.0.0",
    "typer": "0.29.2",
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    **{package: tested for target in TARGETS.values() for package, tested in target.packages.items()},
    "PyWavelets": "1.9.0",
    "pyyaml": "6.0.3",
    "accelerate": "1.15.0",
    "matplotlib": "3.11.2",
    "starlette": "1.10.0",
    "uvicorn": "0.54.0",
    "trustme": "1.2.1",
    "segno": "1.6.6",
}
EXPORT = ("torch", "diffusers", "pyyaml")
TRAIN = (*EXPORT, "accelerate", "matplotlib")
WEB = ("starlette", "uvicorn", "trustme", "segno")


@dataclass(frozen=True)
class BadPair:
    """Versions known to fail: `package` below a version with `needs` from a version on; why, and who says so."""

    package: str
    below: tuple[int, ...]
    needs: str
    from_version: tuple[int, ...]
    why: str
    source: str


KNOWN_BAD = (
    BadPair(
        package="onnxscript",
        below=(0, 6),
        needs="torch",
        from_version=(2, 9),
        why="every dynamo export fails: onnxscript's version converter refuses models with local functions",
        source="ray-project/ray#64410",
    ),
    BadPair(
        package="onnxruntime",
        below=(1, 19),
        needs="numpy",
        from_version=(2,),
        why="import fails, the wheel was built for NumPy 1",
        source="microsoft/onnxruntime#21063",
    ),
)


@dataclass(frozen=True)
class Examination:
    """What doctor found.

    Attributes:
        machine: System, processor, cores, Python.
        versions: For each package the installed and the tested version; None where it is not installed.
        abilities: What this machine can do; where it cannot, the reason.
        known_bad: Pairs of installed versions that are known to fail, in words.
    """

    machine: dict[str, str]
    versions: dict[str, dict[str, str | None]]
    abilities: dict[str, str]
    known_bad: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The examination as plain data."""
        return asdict(self)


def examine() -> Examination:
    """Looks at this machine."""
    installed = {name: _installed(name) for name in TESTED}
    # The one for GPUs has another name and replaces this one.
    installed["onnxruntime"] = installed["onnxruntime"] or _installed("onnxruntime-gpu")
    return Examination(
        machine={
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": str(os.cpu_count()),
            "python": platform.python_version(),
        },
        versions={name: {"installed": installed[name], "tested": TESTED[name]} for name in TESTED},
        abilities=_abilities(installed),
        known_bad=find_known_bad(installed),
    )


def find_known_bad(installed: Mapping[str, str | None]) -> tuple[str, ...]:
    """A sentence for each pair of versions that is known to fail; `installed` has None for what is not installed.

    >>> find_known_bad({"onnxruntime": "1.18.1", "numpy": "2.1.0"})[0][:32]
    'onnxruntime 1.18.1 with numpy 2.'
    """
    found = []
    for pair in KNOWN_BAD:
        mine, other = installed.get(pair.package), installed.get(pair.needs)
        if (
            mine is not None
            and other is not None
            and _numbers(mine) < pair.below
            and _numbers(other) >= pair.from_version
        ):
            wanted = ".".join(str(n) for n in pair.below)
            found.append(
                f"{pair.package} {mine} with {pair.needs} {other}: {pair.why}; "
                f"install {pair.package}>={wanted} ({pair.source})"
            )
    return tuple(found)


def _abilities(installed: Mapping[str, str | None]) -> dict[str, str]:
    def needs(names: Iterable[str], install: str) -> str:
        missing = [name for name in names if installed.get(name) is None]
        return f"no: {install} ({', '.join(missing)} missing)" if missing else "yes"

    def runs(backend: Backend) -> str:
        if backend.only_mac and platform.system() != "Darwin":
            return "no: it needs macOS"
        found = needs(backend.packages, backend.install)
        return f"no: {backend.install}" if found == "yes" and not backend.has_provider else found

    abilities = {}
    for target in TARGETS.values():
        install = f'pip install "edgediff[{target.extra}]"'
        abilities[f"export to {target.title}"] = needs((*EXPORT, *target.packages), install)
        for backend in target.backends:
            abilities[backend.does or f"run {target.files} in {backend.name}"] = runs(backend)
    return abilities | {
        "recompute trajectories in torch": needs(["torch"], 'pip install "edgediff[export]"'),
        "train adaptors": needs(TRAIN, 'pip install "edgediff[train]"'),
        "plan clocks": needs(["matplotlib"], 'pip install "edgediff[train]"'),
        "serve bundles to browsers": needs(WEB, 'pip install "edgediff[web]"'),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for piece in text.split("+")[0].split("."):
        digits = re.match(r"[0-9]*", piece)
        if not digits or not digits[0]:
            break
        numbers.append(int(digits[0]))
        if digits[0] != piece:  # 19rc1 counts as 19, and nothing after it
            break
    return tuple(numbers)
