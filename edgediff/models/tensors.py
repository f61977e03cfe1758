"""torch tensors as the runtime's `Session` hands them in and out."""

import numpy as np
import torch


class TorchTensors:
    """What sessions that compute in torch share.

    Attributes:
        device: Where tensors live.
    """

    device = torch.device("cpu")

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Takes an array to the session's device; on the CPU it is wrapped without a copy.

        Args:
            array: C-contiguous.

        Returns:
            A tensor.
        """
        return torch.from_numpy(array).to(self.device)

    def get(self, value: torch.Tensor) -> np.ndarray:
        """Gives a tensor back as an array.

        Args:
            value: A tensor.

        Returns:
            An array, on the CPU on the tensor's memory; graphs make new outputs in every call.
        """
        return value.cpu().numpy()
