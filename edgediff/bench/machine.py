"""The machine that figures belong to: what it is, what memory is left, and how fast it multiplies."""

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.bench.ledger import Machine

TOOLS = (
    "edgediff",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "diffusers",
    "openvino",
    "executorch",
    "coremltools",
)
# What decides how fast a CPU computes networks.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16", "i8mm")
PEAK_SIZE = 2048
PEAK_TIMES = 5


def describe_machine() -> Machine:
    """Names the machine and the tools.

    Returns:
        What this process runs on.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        cores=os.cpu_count() or 1,
        memory_mib=_all_memory() // 2**20,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={tool: found for tool in TOOLS if (found := _version(tool)) is not None},
    )


def free_memory() -> int | None:
    """Bytes that a process may still take without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = info.read_text(encoding="utf-8").splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def peak_memory() -> float | None:
    """MiB that this process held at most; None where the system does not say."""
    # Linux's getrusage would count what the parent held when it forked.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_gflops() -> float:
    """Measures a large fp32 matrix product, in torch where it is there: numpy's own product may be a slower one.

    Returns:
        GFLOP/s of the fastest of a few.
    """
    numbers = np.random.default_rng(0).standard_normal((2, PEAK_SIZE, PEAK_SIZE), dtype=np.float32)
    factors: Any = numbers
    if find_spec("torch") is not None:
        import torch

        factors = torch.from_numpy(numbers)
    times = []
    for _ in range(PEAK_TIMES + 1):
        start = time.perf_counter()
        factors[0] @ factors[1]
        times.append(time.perf_counter() - start)
    return 2e-9 * PEAK_SIZE**3 / min(times[1:])


def _all_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        return 0


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
