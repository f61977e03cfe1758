"""What the gates of a wavelet-gated model let pass, by band, module and time step (Spectral Diffusion, section 4.1)."""

from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgediff.models.spectral import BANDS, BandGate


class GateRecorder:
    """Listens to the gates of a network while it runs; `with` begins and ends it.

    Attributes:
        modules: The gates by their module's name; empty where the network has none.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.modules = {name: module for name, module in unet.named_modules() if isinstance(module, BandGate)}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._rows: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "GateRecorder":
        self._hooks = [module.register_forward_hook(self._listener(name)) for name, module in self.modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, NDArray[np.float64]]:
        """The mean gates since the last time.

        Returns:
            float64 [4] by module, over images and channels, in the order of the bands: LL, LH, HL, HH. A gate that did
            not run is missing.
        """
        means = {name: self._sums[name] / self._rows[name] for name in self.modules if name in self._sums}
        self._sums.clear()
        self._rows.clear()
        return means

    def _listener(self, name: str) -> Any:
        def listen(module: nn.Module, given: Any, gates: torch.Tensor) -> None:
            rows = gates.detach().cpu().double().reshape(len(gates), len(BANDS), -1).mean(dim=2)
            self._sums[name] = self._sums.get(name, np.zeros(len(BANDS))) + rows.sum(dim=0).numpy()
            self._rows[name] = self._rows.get(name, 0) + len(rows)

        return listen
