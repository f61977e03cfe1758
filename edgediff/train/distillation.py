"""Spectrum-aware distillation: features of teacher and student side by side, and two terms (Spectral Diffusion, 4.2).

A denoiser's error is largest where images have most power, so what is small in power, mostly what is high in frequency,
is learnt last. The frequency term weighs each frequency by the inverse of the clean image's magnitude there.

Rebuilt, as the paper does not say: the DFT is orthonormal, so that both terms are of one size; magnitudes are averaged
over channels and kept away from 0; weights have a mean of 1; and each term is divided by the power of the teacher's
feature, so that features of any scale count alike.

The two UNets have the same levels, so features of one place are of one size; their widths differ, and a 1x1 convolution
aligns the student's. Aligners belong to the training: they are not part of the student that is saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgediff.errors import ConfigError
from edgediff.train.settings import POINTS

OUT = POINTS[-1]
# Mixed precision must not round the spectra.
_FULL = torch.float32
# Least magnitude, as a share of the image's mean magnitude over frequencies.
FLOOR = 0.01


def frequency_weights(x_0: torch.Tensor, size: tuple[int, int], alpha: float) -> torch.Tensor:
    """Weights of the frequencies: |F(x_0 resized)|^alpha.

    Args:
        x_0: Clean images (or latents), [B, C, H, W].
        size: Height and width of the features to weigh; divisors of H and W.
        alpha: -1 is the paper's; 0 weighs all alike.

    Returns:
        [B, 1, h, w//2 + 1]: of the half plane that a real signal's spectrum has, each frequency counted with its mirror
        image, so that they add up to h w for each image.

    >>> frequency_weights(torch.ones(1, 3, 4, 4), (2, 4), alpha=0.0)[0, 0].tolist()
    [[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]
    """
    height, width = size
    resized = F.interpolate(x_0.float(), size=size, mode="area")
    magnitude = torch.fft.rfft2(resized, norm="ortho").abs().mean(dim=1, keepdim=True)
    counts = torch.full((width // 2 + 1,), 2.0, device=x_0.device)
    counts[0] = 1.0
    if width % 2 == 0:
        counts[-1] = 1.0
    mean = (counts * magnitude).sum(dim=(2, 3), keepdim=True) / (height * width)
    least = (FLOOR * mean).clamp_min(torch.finfo(torch.float32).tiny)
    weights: torch.Tensor = counts * torch.maximum(magnitude, least) ** alpha
    return weights * (height * width / weights.sum(dim=(2, 3), keepdim=True))


def spatial_term(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two features [B, C, H, W], relative to the teacher's power."""
    teacher, student = teacher.float(), student.float()
    return (teacher - student).pow(2).mean() / _power(teacher)


def frequency_term(teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared difference of two features' spectra, relative to the teacher's power.

    With weights of an alpha of 0 it is `spatial_term`, by Parseval.

    Args:
        teacher: [B, C, H, W].
        student: [B, C, H, W].
        weights: [B, 1, H, W//2 + 1], what `frequency_weights` gave.
    """
    teacher, student = teacher.float(), student.float()
    difference = torch.view_as_real(torch.fft.rfft2(teacher - student, norm="ortho"))
    weighted: torch.Tensor = (weights[..., None] * difference**2).sum() / teacher.numel()
    return weighted / _power(teacher)


def _power(feature: torch.Tensor) -> torch.Tensor:
    return feature.pow(2).mean().clamp_min(1e-12)


@contextmanager
def tapped(unet: Any, points: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects a UNet's features at some of `POINTS` while it runs.

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
        """Makes an aligner for each place; the teacher's UNet is not kept.

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
