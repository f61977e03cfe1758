"""What every benchmark prints beside its figures: the machine, the versions, medians with their spread."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles


def machine() -> str:
    """Names the processor, the cores and the versions that the figures belong to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "onnxruntime", "coremltools", "diffusers", "numpy")
    )
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}"


def spread(samples: Sequence[float]) -> str:
    """Spells samples as their median and, in brackets, their 10th and 90th percentile."""
    tenths = quantiles(samples, n=10)
    return f"{median(samples):.4g} [{tenths[0]:.4g}, {tenths[-1]:.4g}]"
