"""What does a device pay for importing the runtime, against importing torch? Fresh processes, interleaved.

The bar: at most 0.4 of the time of ``import torch``.
"""

import subprocess
import sys
from statistics import median
from time import perf_counter

from measure import machine, spread

ROUNDS = 15
BAR = 0.4


def main() -> None:
    """Times ``import edgediff_runtime`` and ``import torch`` in turn."""
    print(machine())
    times: dict[str, list[float]] = {"edgediff_runtime": [], "torch": [], "sys": []}
    for _ in range(ROUNDS):
        for module, samples in times.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            samples.append(perf_counter() - start)
    for module, samples in times.items():
        name = "an empty interpreter" if module == "sys" else f"import {module}"
        print(f"{name}, s (median [p10, p90], {ROUNDS} rounds): {spread(samples)}")
    empty = median(times["sys"])
    share = (median(times["edgediff_runtime"]) - empty) / (median(times["torch"]) - empty)
    print(f"ratio without the interpreter: {share:.2f} (bar: {BAR}) {'ok' if share <= BAR else 'MISSED'}")


if __name__ == "__main__":
    main()
