"""Cases of ops over spatial axes: convolutions, pools, norms, resizing."""

from typing import Any

import numpy as np
import torch
from mil_programs import Case, floats
from torch import Tensor
from torch.nn import functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(
    shape: tuple[int, ...], kernel: tuple[int, ...], pads: list[int] | None, bias: bool = True, **params: Any
) -> Case:
    """A convolution; `pads` is what its pad_type comes to, before and after each axis."""
    weight = floats(6, shape[1] // params.get("groups", 1), *kernel)
    held = {"weight": weight, **({"bias": floats(6)} if bias else {}), **params}

    def reference(x: Tensor) -> Tensor:
        flat = [size for i in range(len(kernel))[::-1] for size in (pads or [0, 0] * 3)[2 * i : 2 * i + 2]]
        return CONV[len(kernel)](
            F.pad(x, flat),
            torch.from_numpy(weight).double(),
            torch.from_numpy(floats(6)).double() if bias else None,
            params.get("strides", 1),
            0,
            params.get("dilations", 1),
            params.get("groups", 1),
        )

    return Case("conv", {"x": floats(*shape)}, reference, held)


def conv_transpose(
    shape: tuple[int, ...], kernel: tuple[int, ...], crop: list[int], size: tuple[int, ...], **params: Any
) -> Case:
    """A transposed convolution; `crop` is taken off the beginning of each axis, and so much is left as `size` says."""
    groups = params.get("groups", 1)
    weight = floats(shape[1], 6 // groups, *kernel)

    def reference(x: Tensor) -> Tensor:
        strides, dilations = params.get("strides", 1), params.get("dilations", 1)
        full = CONV_TRANSPOSE[len(kernel)](x, torch.from_numpy(weight).double(), None, strides, 0, 0, groups, dilations)
        wanted = torch.zeros(*full.shape[:2], *size, dtype=torch.float64)
        part = full[(..., *(slice(first, first + n) for first, n in zip(crop, size, strict=True)))]
        wanted[(..., *(slice(0, n) for n in part.shape[2:]))] = part
        return wanted + torch.from_numpy(floats(6)).double().reshape(1, -1, *[1] * len(kernel))

    return Case("conv_transpose", {"x": floats(*shape)}, reference, {"weight": weight, "bias": floats(6), **params})


# Worked by hand from MIL's text: same puts the odd one after, same_lower before.
CONVOLUTIONS = [
    conv((2, 4, 9), (3,), None, strides=[2], pad_type="valid"),
    conv((2, 4, 9, 8), (3, 3), [1, 1, 1, 1], pad_type="custom", pad=[1, 1, 1, 1], strides=[1, 1]),
    conv((2, 4, 9, 8), (3, 3), [0, 1, 2, 1], pad_type="custom", pad=[0, 1, 2, 1], strides=[2, 1]),
    conv((2, 4, 9, 8), (3, 2), [1, 1, 0, 1], pad_type="same", bias=False),
    conv((2, 4, 9, 8), (3, 3), [1, 1, 0, 1], pad_type="same", strides=[2, 2]),
    conv((2, 4, 9, 8), (3, 3), [1, 1, 1, 0], pad_type="same_lower", strides=[2, 2]),
    conv((2, 4, 9, 8), (3, 3), [2, 2, 1, 1], pad_type="same", dilations=[2, 1]),
    conv((2, 4, 9, 8), (3, 3), None, groups=2, pad_type="valid"),
    conv((1, 6, 5, 5), (1, 1), None, groups=6, pad_type="valid", bias=False),
    conv((1, 2, 4, 5, 6), (2, 3, 1), [1, 0, 1, 1, 0, 2], pad_type="custom", pad=[1, 0, 1, 1, 0, 2]),
]
TRANSPOSED = [
    conv_transpose((2, 4, 5), (3,), [0], (11,), strides=[2], pad_type="valid"),
    conv_transpose((2, 4, 5, 6), (4, 3), [1, 0], (8, 6), pad_type="custom", pad=[1, 3, 0, 2], strides=[2, 1]),
    conv_transpose((2, 4, 5, 6), (3, 3), [0, 0], (10, 12), pad_type="same", strides=[2, 2]),
    conv_transpose((2, 4, 5, 6), (4, 4), [1, 1], (10, 12), pad_type="same", strides=[2, 2]),
    conv_transpose(
        (2, 4, 5, 6),
        (3, 3),
        [1, 1],
        (10, 12),
        pad_type="custom",
        pad=[1, 1, 1, 1],
        strides=[2, 2],
        output_shape=[2, 6, 10, 12],
    ),
    conv_transpose(
        (2, 4, 5, 6),
        (1, 1),
        [0, 0],
        (10, 12),
        pad_type="custom",
        pad=[0, 0, 0, 0],
        strides=[2, 2],
        output_shape=[2, 6, 10, 12],
    ),
    conv_transpose((2, 4, 5, 6), (3, 3), [0, 0], (9, 8), groups=2, dilations=[2, 1], pad_type="valid"),
]

P = {"x": floats(2, 3, 7, 6)}
AVERAGES = [
    Case("avg_pool", P, lambda x: F.avg_pool2d(x, 2), {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid"}),
    Case("avg_pool", P, lambda x: F.avg_pool2d(x, (3, 2), 1), {"kernel_sizes": [3, 2], "pad_type": "valid"}),
    *(
        Case(
            "avg_pool",
            P,
            lambda x, out=out: F.avg_pool2d(x, 3, 2, 1, count_include_pad=not out),
            {
                "kernel_sizes": [3, 3],
                "strides": [2, 2],
                "pad_type": "custom",
                "pad": [1] * 4,
                "exclude_padding_from_average": out,
            },
        )
        for out in (False, True)
    ),
    *(
        Case(
            "avg_pool",
            P,
            lambda x, out=out: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=not out),
            {
                "kernel_sizes": [3, 3],
                "strides": [2, 2],
                "pad_type": "custom",
                "pad": [1] * 4,
                "ceil_mode": True,
                "exclude_padding_from_average": out,
            },
        )
        for out in (False, True)
    ),
    Case(
        "avg_pool",
        P,
        lambda x: F.avg_pool2d(F.pad(x, (0, 1, 1, 1)), 3, (2, 2)),
        {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "same"},
    ),
    Case(
        "avg_pool",
        {"x": floats(1, 2, 9)},
        lambda x: F.avg_pool1d(x, 3, 3),
        {"kernel_sizes": [3], "strides": [3], "pad_type": "valid"},
    ),
    Case(
        "avg_pool",
        {"x": floats(1, 2, 4, 4, 4)},
        lambda x: F.avg_pool3d(x, 2),
        {"kernel_sizes": [2] * 3, "strides": [2] * 3, "pad_type": "valid"},
    ),
]
MAXIMA = [
    Case(
        "max_pool",
        P,
        lambda x: F.max_pool2d(x, 3, 2, 1),
        {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1] * 4},
    ),
    Case(
        "max_pool",
        P,
        lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
        {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid", "ceil_mode": True},
    ),
    Case(
        "max_pool", {"x": floats(1, 2, 9)}, lambda x: F.max_pool1d(x, 3, 1), {"kernel_sizes": [3], "pad_type": "valid"}
    ),
    Case(
        "max_pool",
        P,
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 1), value=-9.0), 3, 2),
        {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "same_lower"},
    ),
]

EPS = np.float32(2.0**-10)
MEAN, VARIANCE, GAMMA, BETA = floats(3), floats(3, low=0.5, high=2), floats(3, low=1, high=3), floats(3, low=2, high=4)


def _normed(x: Tensor, axes: tuple[int, ...], eps: float = float(EPS)) -> Tensor:
    return (x - x.mean(axes, True)) / torch.sqrt(x.var(axes, correction=0, keepdim=True) + eps)


def _at(values: np.ndarray, *shape: int) -> Tensor:
    return torch.from_numpy(values).double().reshape(shape)


def _batch_normed(x: Tensor, affine: bool) -> Tensor:
    shape = (1, 3, *[1] * (x.ndim - 2))
    y = (x - _at(MEAN, *shape)) / torch.sqrt(_at(VARIANCE, *shape) + float(EPS))
    return y * _at(GAMMA, *shape) + _at(BETA, *shape) if affine else y


NORMS = [
    *(
        Case(
            "batch_norm",
            {"x": floats(*shape)},
            lambda x: _batch_normed(x, True),
            {"mean": MEAN, "variance": VARIANCE, "gamma": GAMMA, "beta": BETA, "epsilon": EPS},
        )
        for shape in ((2, 3, 5), (2, 3, 5, 4), (2, 3, 2, 3, 4))
    ),
    Case(
        "batch_norm",
        {"x": floats(2, 3, 5)},
        lambda x: _batch_normed(x, False),
        {"mean": MEAN, "variance": VARIANCE, "epsilon": EPS},
    ),
    Case("instance_norm", {"x": floats(2, 3, 5, 4)}, lambda x: _normed(x, (2, 3)), {"epsilon": EPS}),
    Case(
        "instance_norm",
        {"x": floats(2, 3, 7)},
        lambda x: _normed(x, (2,)) * _at(GAMMA, 3, 1) + _at(BETA, 3, 1),
        {"gamma": GAMMA, "beta": BETA, "epsilon": EPS},
    ),
    Case(
        "layer_norm",
        {"x": floats(2, 5, 3)},
        lambda x: _normed(x, (2,)) * _at(GAMMA, 3) + _at(BETA, 3),
        {"axes": [-1], "gamma": GAMMA, "beta": BETA, "epsilon": EPS},
    ),
    Case(
        "layer_norm",
        {"x": floats(2, 3, 5)},
        lambda x: _normed(x, (1,)) * _at(GAMMA, 3, 1) + _at(BETA, 3, 1),
        {"axes": [1], "gamma": GAMMA, "beta": BETA, "epsilon": EPS},
    ),
    Case("layer_norm", {"x": floats(2, 3, 4, 5)}, lambda x: _normed(x, (2, 3)), {"axes": [2, 3], "epsilon": EPS}),
    Case("layer_norm", {"x": floats(4, 5)}, lambda x: _normed(x, (0, 1)), {"axes": [0, 1], "epsilon": EPS}),
    Case(
        "l2_norm",
        {"x": floats(2, 3, 4, 5)},
        lambda x: x / torch.sqrt((x**2).sum((1, 2, 3), True) + float(EPS)),
        {"epsilon": EPS},
    ),
    Case("l2_norm", {"x": floats(3, 4, 5)}, lambda x: x / torch.sqrt((x**2).sum() + float(EPS)), {"epsilon": EPS}),
]


def _sampled(x: Tensor, axis: int, places: list[float]) -> Tensor:
    """Linear between elements, one place after the other."""
    n = x.shape[axis]
    columns = []
    for place in places:
        place = min(max(place, 0.0), n - 1.0)
        low = int(place)
        far = place - low
        columns.append(x.select(axis, low) * (1 - far) + x.select(axis, min(low + 1, n - 1)) * far)
    return torch.stack(columns, axis)


# From MIL's text, n elements to m.
PLACES = {
    "STRICT_ALIGN_CORNERS": lambda n, m: [i * (n - 1) / (m - 1) for i in range(m)],
    "ALIGN_CORNERS": lambda n, m: [i * (n - 1) / (m - 1) for i in range(m)],
    "DEFAULT": lambda n, m: [i * (n - n / m) / (m - 1) for i in range(m)],
    "OFFSET_CORNERS": lambda n, m: [0.5 * max(1, n - 1) / m + i * max(1, n - 1) / m for i in range(m)],
    "UNALIGN_CORNERS": lambda n, m: [i * n / m + 0.5 * n / m - 0.5 for i in range(m)],
}
X = {"x": floats(1, 2, 4, 6)}
RESIZES = [
    Case(
        "upsample_nearest_neighbor",
        X,
        lambda x: x.repeat_interleave(2, -2).repeat_interleave(3, -1),
        {"scale_factor_height": 2, "scale_factor_width": 3},
    ),
    Case(
        "upsample_nearest_neighbor",
        X,
        lambda x: F.interpolate(x, size=(6, 6)),
        {"scale_factor_height": np.float32(1.5), "scale_factor_width": np.float32(1.0)},
        dtypes=("float32",),
    ),
    Case(
        "upsample_nearest_neighbor",
        {"x": floats(2, 3, 4)},
        lambda x: x.repeat_interleave(2, -1),
        {"scale_factor_width": 2},
    ),
    Case(
        "resize_nearest_neighbor",
        X,
        lambda x: F.interpolate(x, size=(7, 3)),
        {"target_size_height": 7, "target_size_width": 3},
    ),
    Case(
        "upsample_bilinear",
        X,
        lambda x: F.interpolate(x, size=(8, 18), mode="bilinear", align_corners=True),
        {"scale_factor_height": 2, "scale_factor_width": 3},
    ),
    Case(
        "upsample_bilinear",
        X,
        lambda x: F.interpolate(x, size=(8, 18), mode="bilinear", align_corners=False),
        {"scale_factor_height": 2, "scale_factor_width": 3, "align_corners": False},
    ),
    Case(
        "upsample_bilinear",
        X,
        lambda x: _sampled(_sampled(x, -2, PLACES["DEFAULT"](4, 8)), -1, PLACES["DEFAULT"](6, 12)),
        {"scale_factor_height": 2, "scale_factor_width": 2, "align_corners": False, "half_pixel_centers": False},
    ),
    *(
        Case(
            "resize_bilinear",
            X,
            lambda x, mode=mode: _sampled(_sampled(x, -2, PLACES[mode](4, 7)), -1, PLACES[mode](6, 5)),
            {"target_size_height": 7, "target_size_width": 5, "sampling_mode": mode},
        )
        for mode in PLACES
    ),
    Case("resize_bilinear", X, lambda x: x[..., 1:3, 2:4].mean((-1, -2), True), {"sampling_mode": "ALIGN_CORNERS"}),
    Case(
        "resize",
        X,
        lambda x: _sampled(x, -1, PLACES["UNALIGN_CORNERS"](6, 9)),
        {
            "shape": np.array([1, 0, 9], dtype=np.int32),
            "resized_dims": np.uint32(2),
            "sampling_mode": "UNALIGN_CORNERS",
        },
        ("iOS17", "iOS18"),
    ),
    Case(
        "resize",
        X,
        lambda x: F.interpolate(x, size=(8, 9)),
        {
            "shape": np.array([8, 9], dtype=np.int32),
            "resized_dims": np.uint32(2),
            "interpolation_mode": "NEAREST_NEIGHBOR",
        },
        ("iOS17", "iOS18"),
    ),
]
SPATIAL = [*CONVOLUTIONS, *TRANSPOSED, *AVERAGES, *MAXIMA, *NORMS, *RESIZES]
