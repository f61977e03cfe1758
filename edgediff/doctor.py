"""What is installed, what this machine can do, and which versions are known not to go together."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# What the tests ran with; a test compares it with constraints.txt.
TESTED = {
    "numpy": "2.4.6",
    "onnxruntime": "1.31.1",
    "msgspec": "0.22.0",
    "safetensors": "0.8.0",
    "pillow": "13.0.0",
    "rich": "15.0.0",
    "typer": "0.29.2",
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "onnx": "1.23.2",
    "onnxscript": "0.7.2",
    "onnxsim": "0.8.1",
    "coremltools": "9.0",
    "openvino": "2026.4.0",
    "executorch": "1.5.1",
    "PyWavelets": "1.9.0",
    "pyyaml": "6.0.3",
    "accelerate": "1.15.0",
    "matplotlib": "3.11.2",
}
ONNX = ("torch", "diffusers", "onnx", "onnxscript", "onnxsim", "pyyaml")
COREML = ("torch", "diffusers", "coremltools", "pyyaml")
EXECUTORCH = ("torch", "diffusers", "executorch", "pyyaml")
OPENVINO = (*ONNX, "openvino")
TRAIN = ("torch", "diffusers", "pyyaml", "accelerate", "matplotlib")
EXPORT = tuple(dict.fromkeys((*ONNX, *COREML)))


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
    def needs(*names: str, extra: str = "export") -> str:
        missing = [name for name in names if installed[name] is None]
        return f'no: pip install "edgediff[{extra}]" ({", ".join(missing)} missing)' if missing else "yes"

    mac = platform.system() == "Darwin"
    return {
        "run and verify ONNX bundles": "yes" if installed["onnxruntime"] else "no: onnxruntime is not installed",
        "export to ONNX": needs(*ONNX),
        "export to Core ML": needs(*COREML),
        "verify Core ML packages (mil-reference)": needs("torch", "coremltools"),
        "run Core ML packages on Apple's runtime": needs("coremltools") if mac else "no: it needs macOS",
        "recompute trajectories in torch": needs("torch"),
        "train adaptors": needs(*TRAIN, extra="train"),
        "export to OpenVINO": needs(*OPENVINO, extra="openvino"),
        "run ONNX and OpenVINO bundles in OpenVINO": needs("openvino", extra="openvino"),
        "export to ExecuTorch and run it": needs(*EXECUTORCH, extra="executorch"),
        "plan clocks": needs("matplotlib", extra="train"),
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
