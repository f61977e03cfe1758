"""Adaptors: what stands in for the low-resolution part on a cached step (Clockwork Diffusion, section 3.1)."""

import torch

from edgediff.models.part import Part


class IdentityAdaptor(Part):
    """The cached feature as it is: no parameters, no operations, and no graph in a bundle."""

    def __init__(self) -> None:
        super().__init__(("lowres_feature",), ("lowres_feature",))

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the cache.

        Args:
            tensors: ``lowres_feature`` [B, C, H, W].

        Returns:
            The same.
        """
        return tensors
