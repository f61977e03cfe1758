"""Spectrum-aware distillation: the spatial and the frequency term (Spectral Diffusion, section 4.2).

A denoiser's error is largest where images have most power, so what is small in power, mostly what is high in frequency,
is learnt last. The frequency term weighs each frequency by the inverse of the clean image's magnitude there.

Rebuilt, as the paper does not say: the DFT is orthonormal, so that both terms are of one size; magnitudes are averaged
over channels and kept away from 0; weights have a mean of 1; and each term is divided by the power of the teacher's
feature, so that features of any scale count alike.
"""

import torch
from torch.nn import functional as F

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
    """Mean squared difference of two features, relative to the teacher's power.

    Args:
        teacher: [B, C, H, W].
        student: [B, C, H, W].

    Returns:
        A scalar.
    """
    teacher, student = teacher.float(), student.float()
    return (teacher - student).pow(2).mean() / _power(teacher)


def frequency_term(teacher: torch.Tensor, student: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared difference of two features' spectra, relative to the teacher's power.

    Args:
        teacher: [B, C, H, W].
        student: [B, C, H, W].
        weights: [B, 1, H, W//2 + 1], what `frequency_weights` gave.

    Returns:
        A scalar; with an alpha of 0 it is `spatial_term`, by Parseval.
    """
    teacher, student = teacher.float(), student.float()
    difference = torch.view_as_real(torch.fft.rfft2(teacher - student, norm="ortho"))
    weighted: torch.Tensor = (weights[..., None] * difference**2).sum() / teacher.numel()
    return weighted / _power(teacher)


def _power(feature: torch.Tensor) -> torch.Tensor:
    return feature.pow(2).mean().clamp_min(1e-12)
