"""What float16 may do to a program on a device: too large a number, and too small a constant."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from edgediff.bundle.rows import Finding
from edgediff.mil.function import Function

LARGEST = 65504.0
# Below it float16 is subnormal, which an accelerator may take for zero.
SMALLEST_NORMAL = 2.0**-14
# A tensor that uses more than half of the range is a warning: another prompt or seed may double it.
HEADROOM = 0.5
# The largest are always reported.
SHOWN = 3


def findings(function: Function, inputs: Mapping[str, np.ndarray | Tensor]) -> tuple[Finding, ...]:
    """Runs a function once and reports what float16 may damage.

    Returns:
        Worst first: overflows as they arise, since what follows the first may be its fault; then by headroom, all that
        use half of the range and the `SHOWN` largest in any case; then constants, the smallest first. A constant of
        many numbers is reported only where all of them are small: single weights near zero are no loss.

    Raises:
        ProgramError: As `Function.run`.
    """
    overflows: list[Finding] = []
    full: list[Finding] = []

    def watch(op: str, name: str, value: Tensor, dtype: str) -> None:
        if dtype != "float16" or not value.numel():
            return
        # NaN and infinity show in the maximum, so most tensors need no second pass.
        share = float(value.abs().amax()) / LARGEST
        if not np.isfinite(share):
            overflows.append(Finding("overflow", function.name, name, op, float((~torch.isfinite(value)).sum())))
        else:
            full.append(Finding("headroom", function.name, name, op, share, warns=share >= HEADROOM))

    function.run(inputs, watch=watch)
    small = []
    for name, constant in function.constants.items():
        if constant.dtype == "float16" and not isinstance(constant.array, str):
            largest = float(np.abs(constant.array).max(initial=0.0))
            if 0 < largest < SMALLEST_NORMAL:
                small.append(Finding("small-constant", function.name, name, "const", largest))
    full.sort(key=lambda finding: -finding.value)
    small.sort(key=lambda finding: finding.value)
    kept = [finding for place, finding in enumerate(full) if place < SHOWN or finding.warns]
    return (*overflows, *kept, *small)
