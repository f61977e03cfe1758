"""Resizing of the last axes, by factors or to sizes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edgediff.errors import ProgramError

# How places of the result map to places of the operand, n elements to m.
GRIDS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "STRICT_ALIGN_CORNERS": lambda i, n, m: i * ((n - 1) / max(m - 1, 1)),
    "ALIGN_CORNERS": lambda i, n, m: i * ((n - 1) / (m - 1)) if m > 1 else torch.full_like(i, (n - 1) / 2),
    "DEFAULT": lambda i, n, m: i * (n / m),
    "OFFSET_CORNERS": lambda i, n, m: (i + 0.5) * (max(1, n - 1) / m),
    "UNALIGN_CORNERS": lambda i, n, m: (i + 0.5) * (n / m) - 0.5,
}


def _linear(x: Tensor, axis: int, size: int, mode: str) -> Tensor:
    if mode not in GRIDS:
        raise ProgramError(f"sampling_mode {mode!r}; choices: {', '.join(GRIDS)}")
    last = x.shape[axis] - 1
    places = GRIDS[mode](torch.arange(size, dtype=torch.float64), x.shape[axis], size).clamp(0, last)
    low = places.floor().long()
    shape = (-1, *[1] * (-axis - 1))
    far = (places - low).to(x.dtype).reshape(shape)
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=last)), far)


def _nearest(x: Tensor, axis: int, size: int) -> Tensor:
    n = x.shape[axis]
    return x.index_select(axis, torch.arange(size) * n // size)


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    """[..., H, W] by two factors, each pixel that of the operand at or before it."""
    height, width = x.shape[-2:]
    return resize_nearest_neighbor(x, math.floor(height * scale_factor_height), math.floor(width * scale_factor_width))


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """[..., H, W] to a size, each pixel that of the operand at or before it."""
    return _nearest(_nearest(x, -2, target_size_height), -1, target_size_width)


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """[..., H, W] by two factors, linear between pixels."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half:
        raise ProgramError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = x.shape[-2:]
    x = _linear(x, -2, math.floor(height * scale_factor_height), mode)
    return _linear(x, -1, math.floor(width * scale_factor_width), mode)


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """[..., H, W] to a size, linear between pixels."""
    return _linear(_linear(x, -2, target_size_height, sampling_mode), -1, target_size_width, sampling_mode)


def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last axes to the last sizes of `shape`; 0 leaves an axis as it is."""
    for axis in range(-resized_dims, 0):
        size = shape[axis]
        if size in (0, x.shape[axis]):
            continue
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, size, sampling_mode)
        elif interpolation_mode == "NEAREST_NEIGHBOR" and sampling_mode == "DEFAULT":
            x = _nearest(x, axis, size)
        else:
            # How the others round halfway between two elements is not documented.
            raise ProgramError(
                f"{interpolation_mode} with {sampling_mode}; supported: LINEAR; NEAREST_NEIGHBOR with DEFAULT"
            )
    return x
