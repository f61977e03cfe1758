"""Cases of ops that move numbers about: shapes, slices, gathers, fills; and quantization."""

import numpy as np
import torch
from mil_programs import Case, bools, floats, ints
from torch import Tensor
from torch.nn import functional as F

X4 = floats(2, 8, 4, 6)
IOS17 = ("iOS17", "iOS18")
Q = np.float32


def _depth_to_space(x: Tensor, b: int) -> Tensor:
    n, c, h, w = x.shape
    out = torch.empty(n, c // b**2, h * b, w * b, dtype=x.dtype)
    for i in range(b):
        for j in range(b):
            first = (i * b + j) * (c // b**2)
            out[:, :, i::b, j::b] = x[:, first : first + c // b**2]
    return out


SHAPES = [
    Case(
        "concat",
        {"values": [floats(2, 3), floats(2, 1), floats(2, 4)]},
        lambda values: torch.cat(values, 1),
        {"axis": 1},
    ),
    Case("concat", {"values": [ints(2, 3), ints(1, 3)]}, lambda values: torch.cat(values, 0), {"axis": -2}),
    Case(
        "concat",
        {"values": [floats(3, 2), floats(3, 2, low=5, high=6)]},
        lambda values: torch.stack(values, 1).reshape(6, 2),
        {"axis": 0, "interleave": True},
    ),
    Case("depth_to_space", {"x": X4}, lambda x: _depth_to_space(x, 2), {"block_size": 2}),
    Case(
        "space_to_depth",
        {"x": X4},
        lambda x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        {"block_size": 2},
    ),
    Case("expand_dims", {"x": floats(3, 4)}, lambda x: x[None, :, None, :], {"axes": [0, 2]}),
    Case("expand_dims", {"x": floats(3, 4)}, lambda x: x[:, :, None], {"axes": [-1]}),
    Case("flatten2d", {"x": floats(2, 3, 4)}, lambda x: x.reshape(2, 12)),
    Case("flatten2d", {"x": floats(2, 3, 4)}, lambda x: x.reshape(6, 4), {"axis": -1}),
    Case("identity", {"x": floats(2, 3)}, lambda x: x),
    Case("identity", {"x": bools(5)}, lambda x: x),
    Case("pixel_shuffle", {"x": X4}, lambda x: F.pixel_shuffle(x, 2), {"upscale_factor": 2}),
    Case("pixel_unshuffle", {"x": X4}, lambda x: F.pixel_unshuffle(x, 2), {"downscale_factor": np.uint32(2)}),
    Case("reshape", {"x": floats(2, 3, 4)}, lambda x: x.reshape(6, 4), {"shape": [6, 4]}),
    Case("reshape", {"x": floats(2, 3, 4)}, lambda x: x.reshape(4, -1), {"shape": [4, -1]}),
    Case("reshape", {"x": floats(2, 3, 4)}, lambda x: x, {"shape": [0, -1, 0]}),
    Case(
        "reshape_like",
        {"x": floats(6, 5), "ref_tensors": [floats(2, 3, 4), ints(1, 5)]},
        lambda x, ref_tensors: x.reshape(2, 3, 5),
        {"begins": (0, 1), "ends": (2, 0), "end_masks": (False, True)},
    ),
    Case("reverse", {"x": floats(2, 3, 4)}, lambda x: x.flip(0, 2), {"axes": [0, -1]}),
    Case("reverse", {"x": floats(2, 3)}, lambda x: x.flip(0, 1)),
    Case("split", {"x": floats(2, 6)}, lambda x: torch.chunk(x, 3, 1), {"num_splits": 3, "axis": 1}),
    Case("split", {"x": floats(2, 6)}, lambda x: torch.split(x, [1, 3, 2], 1), {"split_sizes": [1, 3, 2], "axis": -1}),
    Case("squeeze", {"x": floats(1, 3, 1, 2)}, lambda x: x.reshape(3, 2)),
    Case("squeeze", {"x": floats(1, 3, 1, 2)}, lambda x: x.reshape(1, 3, 2), {"axes": [-2, 1]}),
    Case(
        "stack",
        {"values": [floats(2, 3), floats(2, 3, low=4, high=5)]},
        lambda values: torch.stack(values, 1),
        {"axis": 1},
    ),
    Case("stack", {"values": [ints(3), ints(3, low=4)]}, lambda values: torch.stack(values, -1), {"axis": -1}),
    Case("tile", {"x": floats(2, 3)}, lambda x: x.repeat(2, 3), {"reps": [2, 3]}),
    Case("transpose", {"x": floats(2, 3, 4)}, lambda x: x.permute(2, 0, 1), {"perm": [2, 0, 1]}),
    Case("transpose", {"x": floats(2, 3, 4)}, lambda x: x.permute(0, 2, 1), {"perm": [0, -1, -2]}),
]

S = floats(5, 6, 7)


def _mask(*places: int) -> list[bool]:
    return [i in places for i in range(3)]


SLICES = [
    Case("band_part", {"x": floats(2, 4, 5)}, torch.triu, {"lower": 0, "upper": -1}),
    Case("band_part", {"x": floats(2, 4, 5)}, lambda x: torch.tril(torch.triu(x, -1), 2), {"lower": 1, "upper": 2}),
    Case("band_part", {"x": ints(4, 4)}, lambda x: x),
    Case("crop", {"x": floats(2, 6, 7)}, lambda x: x[:, 1:4, 0:5], {"crop_height": [1, 2], "crop_width": [0, 2]}),
    Case(
        "slice_by_index",
        {"x": S},
        lambda x: x[1:4, 0:6:2, -3:-1],
        {"begin": [1, 0, -3], "end": [4, 6, -1], "stride": [1, 2, 1]},
    ),
    Case(
        "slice_by_index",
        {"x": S},
        lambda x: x[:, 1::2, :5],
        {"begin": [3, 1, 0], "end": [4, 0, 5], "stride": [1, 2, 1], "begin_mask": _mask(0), "end_mask": _mask(0, 1)},
    ),
    Case(
        "slice_by_index",
        {"x": S},
        lambda x: x.flip(1)[2, :, 1:3],
        {
            "begin": [2, 0, 1],
            "end": [0, 0, 3],
            "stride": [1, -1, 1],
            "begin_mask": _mask(1),
            "end_mask": _mask(1),
            "squeeze_mask": _mask(0),
        },
    ),
    Case(
        "slice_by_index",
        {"x": S},
        lambda x: x[:, [5, 3, 1]],
        {"begin": [0, 5, 0], "end": [5, 0, 7], "stride": [1, -2, 1]},
    ),
    Case(
        "slice_by_index",
        {"x": S},
        lambda x: x[-1, 2],
        {"begin": [-1, 2, 0], "end": [0, 0, 0], "end_mask": _mask(2), "squeeze_mask": _mask(0, 1)},
    ),
    Case("slice_by_index", {"x": ints(6)}, lambda x: x[2:5], {"begin": [2], "end": [5]}),
    Case("slice_by_size", {"x": S}, lambda x: x[1:3, 2:, 3:7], {"begin": [1, 2, -4], "size": [2, -1, 4]}),
    Case(
        "pad",
        {"x": floats(3, 4)},
        lambda x: F.pad(x, (2, 0, 1, 3), value=0.5),
        {"pad": [1, 3, 2, 0], "mode": "constant", "constant_val": Q(0.5)},
    ),
    Case("pad", {"x": floats(2, 3, 4)}, lambda x: F.pad(x, (1, 2)), {"pad": [1, 2]}),
    Case(
        "pad",
        {"x": floats(1, 2, 4, 5)},
        lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect"),
        {"pad": [0, 3, 2, 1], "mode": "reflect"},
    ),
    Case(
        "pad",
        {"x": floats(1, 2, 4, 5)},
        lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
        {"pad": [0, 3, 2, 1], "mode": "replicate"},
    ),
]

PLACES = ints(2, 3, low=0, high=4)
GATHERS = [
    Case("gather", {"x": floats(4, 5), "indices": PLACES}, lambda x, indices: x[indices]),
    Case("gather", {"x": floats(2, 4, 3), "indices": PLACES}, lambda x, indices: x[:, indices], {"axis": -2}),
    Case(
        "gather",
        {"x": floats(2, 4, 3), "indices": PLACES},
        lambda x, indices: torch.stack([a[i] for a, i in zip(x, indices, strict=True)]),
        {"axis": 1, "batch_dims": 1},
    ),
    Case(
        "gather",
        {"x": floats(4, 5), "indices": ints(3, low=-4, high=-1)},
        lambda x, indices: x[indices],
        opsets=("iOS16",),
    ),
    Case("gather", {"x": floats(4, 5)}, lambda x: x[2], {"indices": np.int32(2)}),
    Case(
        "gather_along_axis",
        {"x": floats(2, 4), "indices": PLACES},
        lambda x, indices: x.gather(1, indices.long()),
        {"axis": 1},
    ),
    Case(
        "gather_nd",
        {"x": floats(4, 4, 3), "indices": ints(5, 2, low=0, high=4)},
        lambda x, indices: x[indices[:, 0], indices[:, 1]],
    ),
    Case(
        "gather_nd",
        {"x": floats(2, 4, 4, 3), "indices": ints(2, 5, 2, low=0, high=4)},
        lambda x, indices: torch.stack([a[i[:, 0], i[:, 1]] for a, i in zip(x, indices, strict=True)]),
        {"batch_dims": 1},
    ),
]

ZERO, SCALE = np.array([3, -2, 5], dtype=np.int8), np.array([0.5, 0.25, 0.125], dtype=np.float32)
FILLS = [
    Case("fill", {}, lambda: torch.full((2, 3), 1.5, dtype=torch.float64), {"shape": [2, 3], "value": Q(1.5)}),
    Case("fill", {}, lambda: torch.full((2,), 7), {"shape": [2], "value": np.int32(7)}),
    Case(
        "fill_like",
        {"ref_tensor": ints(2, 3)},
        lambda ref_tensor: torch.full((2, 3), 0.5, dtype=torch.float64),
        {"value": Q(0.5)},
    ),
    Case(
        "range_1d", {}, lambda: torch.arange(2, 11, 3), {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}
    ),
    Case(
        "range_1d",
        {},
        lambda: torch.arange(0, 2, 0.25, dtype=torch.float64),
        {"start": Q(0), "end": Q(2), "step": Q(0.25)},
    ),
    Case("shape", {"x": floats(2, 3, 4)}, lambda x: torch.tensor([2, 3, 4])),
    Case(
        "quantize",
        {"input": floats(9, low=-9, high=9)},
        lambda input: (input / 0.25).round().clamp(-128, 127).int(),
        {"scale": Q(0.25), "output_dtype": "int8"},
        IOS17,
    ),
    Case(
        "quantize",
        {"input": floats(2, 3, 4, low=-40, high=40)},
        lambda input: (
            ((input / torch.from_numpy(SCALE)[:, None]).round() + torch.from_numpy(ZERO)[:, None])
            .clamp(-128, 127)
            .int()
        ),
        {"scale": SCALE, "zero_point": ZERO, "axis": 1, "output_dtype": "int8"},
        IOS17,
    ),
    Case(
        "dequantize",
        {"input": ints(2, 3, 4, dtype="int8")},
        lambda input: torch.from_numpy(SCALE)[:, None].double() * (input.double() - torch.from_numpy(ZERO)[:, None]),
        {"scale": SCALE, "zero_point": ZERO, "axis": 1},
        IOS17,
    ),
    Case(
        "dequantize",
        {"input": ints(9, low=0, dtype="uint8")},
        lambda input: 0.25 * input.double(),
        {"scale": Q(0.25)},
        IOS17,
    ),
]
LAYOUT = [*SHAPES, *SLICES, *GATHERS, *FILLS]
