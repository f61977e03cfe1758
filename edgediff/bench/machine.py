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
from edgediff.targets import TARGETS

PACKAGES = dict.fromkeys([
    "edgediff", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "diffusers",
    *(package for target in TARGETS.values() for backend in target.backends for package in backend.packages),
])  # fmt: skip
# What decides how fast a CPU computes networks.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16", "i8mm")
PEAK_SIZE = 2048
PEAK_TIMES = 5


def describe_machine() -> Machine:
    """The machine that this process runs on, and the versions of its packages."""
    lines = _lines("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        cores=os.cpu_count() or 1,
        memory_mib=_all_memory() // 2**20,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={package: found for package in PACKAGES if (found := _version(package)) is not None},
    )


def free_memory() -> int | None:
    """Bytes that a process may still take without swapping; None where the system does not say."""
    found = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def peak_memory() -> float | None:
    """Peak memory of this process in MiB; None where the system does not say."""
    # Linux's getrusage would count what the parent held when it forked.
    if lines := _lines("/proc/self/status"):
        return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_gflops() -> float:
    """GFLOP/s of a large fp32 matmul, the fastest of a few; in torch if installed, since numpy's may be slower."""
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


def _lines(path: str) -> list[str]:
    """Lines of a file of /proc; none where the system has no such file."""
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _all_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows
        return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
