"""What does a device pay for importing the runtime, against importing torch? Fresh interpreters.

The bar: at most 0.4 of the time of ``import torch``.
"""

import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter

from measure import in_turns, machine, ratios, spread, verdict

from edgediff.bench.turns import Call, Said

ROUNDS = 15
BAR = 0.4
MODULES = ("sys", "edgediff_runtime", "torch")


def importing(module: str) -> Iterator[Said]:
    """A turn starts an interpreter that imports a module and ends."""
    yield Said()
    while True:
        start = perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        yield Said(parts={"import": [1e3 * (perf_counter() - start)]})


def main() -> None:
    """Prints each import, and the runtime's share of torch's without the interpreter's own time (``import sys``)."""
    print(machine())
    found = in_turns({module: Call.of(importing, module=module) for module in MODULES}, ROUNDS)
    taken = {module: found[module].parts["import"] for module in MODULES}
    for module, ms in taken.items():
        print(f"import {module}, ms: {spread(ms)}")
    runtime, torch = (
        [ms - empty for ms, empty in zip(taken[module], taken["sys"], strict=True)] for module in MODULES[1:]
    )
    share = ratios(runtime, torch)
    print(f"ratio without the interpreter: {spread(share)} (bar: {BAR}) {verdict(median(share) <= BAR)}")


if __name__ == "__main__":
    main()
