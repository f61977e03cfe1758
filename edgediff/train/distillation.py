"""Spectrum-aware distillation: features of teacher and student compared, in two terms (Spectral Diffusion, 4.2).

A denoiser learns frequencies of little power last, mostly the high ones. The frequency term weighs each frequency by
the inverse of the clean image's magnitude there. README.md says what is reconstructed, since the paper does not say it.

The two UNets have the same levels, so features of one place have the same size; their widths differ, and a 1x1
convolution aligns the student's. These aligners are part of the training, not of the student that is saved.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from edgediff.errors import ConfigError
from edgediff.models.undivided import predict
from edgediff.train.settings import POINTS

OUT = POINTS[-1]
# Least magnitude, as a share of the image's mean magnitude over frequencies.
FLOOR = 0.01


def frequency_weights(x_0: torch.Tensor, size: tuple[int, int], alpha: float) -> torch.Tensor:
    """Weights of the frequencies, |F(x_0 resized)|^alpha, of clean images or latents [B, C, H, W].

    `size` is the features' height and width.

    Returns:
        [B, 1, h, w//2 + 1]: the half plane of a real signal's spectrum. Each frequency is counted with its mirror
        image, so that the weights of an image add up to h w.
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

    The features are [B, C, H, W], the weights those of `frequency_weights`; for an alpha of 0 it equals `spatial_term`.
    """
    teacher, student = teacher.float(), student.float()
    difference = torch.view_as_real(torch.fft.rfft2(teacher - student, norm="ortho"))
    weighted: torch.Tensor = (weights[..., None] * difference**2).sum() / teacher.numel()
    return weighted / _power(teacher)


def _power(feature: torch.Tensor) -> torch.Tensor:
    return feature.pow(2).mean().clamp_min(1e-12)


def predict_with_features(
    unet: Any, points: tuple[str, ...], x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs a UNet on noised images [B, C, H, W] at time steps [B].

    Returns:
        The prediction, and the features at some of `POINTS`, each [B, C', H', W']: ``down_0`` (the highest level),
        ``mid``, ``up_0`` (the lowest level) and so on, and ``out``, the prediction.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in _places(unet, points).items()]
    try:
        prediction = predict(unet, x_t, t, cond)
    finally:
        for handle in handles:
            handle.remove()
    return prediction, found | ({OUT: prediction} if OUT in points else {})


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
    """The module that runs last in a block; the block itself is not called by a UNet that runs layer by layer."""
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
    """The aligners and the two terms."""

    def __init__(self, teacher: Any, student: Any, points: tuple[str, ...], alpha: float) -> None:
        """Makes an aligner for each place; a ConfigError where teacher and student have different levels."""
        super().__init__()
        places = list(_places(student, points))
        theirs = list(_places(teacher, points))
        if places != theirs:
            raise ConfigError(f"the student has features {', '.join(places)}, the teacher {', '.join(theirs)}")
        self.points, self.alpha = points, alpha
        narrow, wide = _widths(student), _widths(teacher)
        self.aligners = nn.ModuleDict({name: nn.Conv2d(narrow[name], wide[name], 1) for name in places})

    def forward(
        self, teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], x_0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The spatial and the frequency term, each a sum over places; `x_0` are clean images."""
        spatial, frequency = [], []
        weights: dict[tuple[int, int], torch.Tensor] = {}
        for name in (*self.aligners, *((OUT,) if OUT in self.points else ())):
            aligned = student[name] if name == OUT else self.aligners[name](student[name])
            size = (aligned.shape[2], aligned.shape[3])
            if size not in weights:
                weights[size] = frequency_weights(x_0, size, self.alpha)
            with torch.autocast(aligned.device.type, enabled=False):  # which would round the spectra
                spatial.append(spatial_term(teacher[name], aligned))
                frequency.append(frequency_term(teacher[name], aligned, weights[size]))
        return torch.stack(spatial).sum(), torch.stack(frequency).sum()
