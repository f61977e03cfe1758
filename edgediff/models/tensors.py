"""torch tensors as the runtime's `Session` hands them in and out."""

import numpy as np
import torch


class TorchTensors:
    """What sessions that compute in torch on the CPU share."""

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Wraps an array without a copy.

        Args:
            array: C-contiguous.

        Returns:
            A tensor on the array's memory.
        """
        return torch.from_numpy(array)

    def get(self, value: torch.Tensor) -> np.ndarray:
        """Gives a tensor back as an array.

        Args:
            value: A tensor on the CPU.

        Returns:
            An array on the tensor's memory; graphs make new outputs in every call.
        """
        return value.numpy()
