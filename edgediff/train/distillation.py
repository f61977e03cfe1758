"""Features of teacher and student side by side, and the terms of the distillation (Spectral Diffusion, section 4.2).

The two UNets have the same levels, so features of one place are of one size; their widths differ, and a 1x1 convolution
aligns the student's. Aligners belong to the training: they are not part of the student and vanish with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgediff.errors import ConfigError
from edgediff.train.spectrum_terms import frequency_term, frequency_weights, spatial_term
from edgediff.train.unet_settings import POINTS

OUT = POINTS[-1]
# Mixed precision must not round the spectra.
_FULL = torch.float32


@contextmanager
def tapped(unet: Any, points: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects a UNet's features while it runs.

    Args:
        unet: A diffusers UNet.
        points: Which of `POINTS`.

    Yields:
        Filled by the UNet's run: ``down_0`` (the highest level), ``mid``, ``up_0`` (the lowest level) and so on, each
        [B, C, H, W]; not ``out``.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in _places(unet, points).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _places(unet: Any, points: tuple[str, ...]) -> dict[str, nn.Module]:
    places: dict[str, nn.Module] = {}
    if "down" in points:
        places |= {f"down_{i}": _last_module(block, "downsamplers") for i, block in enumerate(unet.down_blocks)}
    if "mid" in points and unet.mid_block is not None:
        places["mid"] = unet.mid_block
    if "up" in points:
        places |= {f"up_{i}": _last_module(block) for i, block in enumerate(unet.up_blocks)}
    return places


def _last_module(block: Any, resamplers: str = "") -> nn.Module:
    """What runs last in a block: not the block itself, which a UNet that runs layer by layer never calls."""
    for name in (resamplers, "attentions"):
        modules = getattr(block, name, None) if name else None
        if modules and modules[-1] is not None:
            return modules[-1]  # type: ignore[no-any-return]
    return block.resnets[-1]  # type: ignore[no-any-return]


def _widths(unet: Any) -> dict[str, int]:
    """Channels of each place's feature."""
    widths = tuple(unet.config.block_out_channels)
    found = {f"down_{i}": width for i, width in enumerate(widths)}
    found |= {f"up_{i}": width for i, width in enumerate(reversed(widths))}
    return found | {"mid": widths[-1]}


class Distillation(nn.Module):
    """The aligners and the two terms.

    Attributes:
        points: Where features are compared.
        alpha: Exponent of the frequency weights.
    """

    def __init__(self, teacher: Any, student: Any, points: tuple[str, ...], alpha: float) -> None:
        """Makes an aligner for each place.

        Args:
            teacher: The teacher's UNet; not kept.
            student: The student's.
            points: Which of `POINTS`.
            alpha: Exponent of the frequency weights; -1 is the paper's.

        Raises:
            ConfigError: The two have other levels.
        """
        super().__init__()
        places = list(_places(student, points))
        theirs = list(_places(teacher, points))
        if places != theirs:
            raise ConfigError(f"the student has features {', '.join(places)}, the teacher {', '.join(theirs)}")
        self.points, self.alpha = points, alpha
        narrow, wide = _widths(student), _widths(teacher)
        self.aligners = nn.ModuleDict({name: nn.Conv2d(narrow[name], wide[name], 1) for name in places})

    def forward(
        self,
        teacher: dict[str, torch.Tensor],
        student: dict[str, torch.Tensor],
        x_0: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compares features.

        Args:
            teacher: By place, [B, C, H, W].
            student: By place, [B, C', H, W]; ``out`` where the predictions are compared too.
            x_0: Clean images, [B, C0, H0, W0].

        Returns:
            The spatial and the frequency term, each a sum over places.
        """
        spatial, frequency = [], []
        weights: dict[tuple[int, int], torch.Tensor] = {}
        for name in (*self.aligners, *((OUT,) if OUT in self.points else ())):
            aligned = student[name] if name == OUT else self.aligners[name](student[name])
            size = (aligned.shape[2], aligned.shape[3])
            if size not in weights:
                weights[size] = frequency_weights(x_0, size, self.alpha)
            with torch.autocast(aligned.device.type, enabled=False):
                spatial.append(spatial_term(teacher[name].to(_FULL), aligned.to(_FULL)))
                frequency.append(frequency_term(teacher[name].to(_FULL), aligned.to(_FULL), weights[size]))
        return torch.stack(spatial).sum(), torch.stack(frequency).sum()
