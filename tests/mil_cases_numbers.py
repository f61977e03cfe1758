"""Cases of ops that compute: elementwise, activations, reductions, products, norms, convolutions, pools."""

import numpy as np
import torch
from mil_programs import Case, bools, floats, ints
from torch import Tensor
from torch.nn import functional as F

AB = floats(2, 3, 4)
POSITIVE = floats(2, 5, low=0.25, high=4.0)
WITHIN = floats(3, 4, low=-0.9, high=0.9)
UNARY = {
    "abs": (torch.abs, AB),
    "acos": (torch.acos, WITHIN),
    "asin": (torch.asin, WITHIN),
    "atan": (torch.atan, AB),
    "atanh": (torch.atanh, WITHIN),
    "ceil": (torch.ceil, AB),
    "cos": (torch.cos, floats(7, low=-30, high=30)),
    "cosh": (torch.cosh, AB),
    "erf": (torch.erf, AB),
    "exp": (torch.exp, floats(2, 3, low=-8, high=12)),
    "exp2": (torch.exp2, AB),
    "floor": (torch.floor, AB),
    "relu": (torch.relu, AB),
    "relu6": (F.relu6, floats(11, low=-9, high=9)),
    "round": (torch.round, np.array([0.5, 1.5, -0.5, 2.4, -2.6], dtype=np.float32)),
    "sigmoid": (torch.sigmoid, floats(3, 5, low=-20, high=20)),
    "sign": (torch.sign, AB),
    "silu": (F.silu, floats(3, 5, low=-20, high=20)),
    "sin": (torch.sin, floats(7, low=-30, high=30)),
    "sinh": (torch.sinh, AB),
    "softplus": (F.softplus, floats(3, 5, low=-9, high=9)),
    "softsign": (F.softsign, AB),
    "sqrt": (torch.sqrt, POSITIVE),
    "square": (torch.square, AB),
    "tan": (torch.tan, WITHIN),
    "tanh": (torch.tanh, AB),
}
BINARY = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": lambda x, y: torch.floor(x / y),
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": lambda x, y: x - y * torch.floor(x / y),
    "mul": torch.mul,
    "not_equal": torch.ne,
    "sub": torch.sub,
}
# Powers of two: a quotient that should be whole is whole in each dtype.
DIVISORS = np.array([[0.5], [-2.0], [0.25]], dtype=np.float32)
LOGICAL = {"logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor}


def _whole(x: Tensor, y: Tensor) -> Tensor:
    return torch.floor(x.double() / y.double()).int()


ELEMENTWISE = [
    *(Case(op, {"x": x}, reference) for op, (reference, x) in UNARY.items()),
    *(Case(op, {"x": AB.transpose(0, 2, 1).copy(), "y": DIVISORS[0]}, f) for op, f in BINARY.items()),
    *(Case(op, {"x": floats(3, 4), "y": DIVISORS}, f) for op, f in BINARY.items()),
    *(
        Case(op, {"x": ints(3, 4), "y": ints(4, low=1, high=5)}, f)
        for op, f in BINARY.items()
        if op not in ("floor_div", "mod")
    ),
    Case("floor_div", {"x": ints(3, 4), "y": ints(4, low=1, high=5)}, _whole),
    Case("floor_div", {"x": ints(3, 4), "y": ints(4, low=-5, high=-1)}, _whole),
    Case("mod", {"x": ints(3, 4), "y": ints(4, low=-5, high=-1)}, lambda x, y: x - y * _whole(x, y)),
    Case("real_div", {"x": AB, "y": floats(4, low=0.5, high=3)}, torch.true_divide),
    Case("real_div", {"x": ints(3, 4) * 12, "y": ints(4, low=1, high=4)}, lambda x, y: (x / y).int()),
    Case("pow", {"x": POSITIVE, "y": floats(5)}, torch.pow),
    Case("pow", {"x": ints(6), "y": ints(6, low=0, high=4)}, torch.pow),
    *(Case(op, {"x": bools(3, 4), "y": bools(4)}, f) for op, f in LOGICAL.items()),
    Case("logical_not", {"x": bools(9)}, torch.logical_not),
    Case("abs", {"x": ints(7)}, torch.abs),
    Case("square", {"x": ints(7)}, torch.square),
    Case("sign", {"x": ints(7)}, torch.sign),
    Case("exp2", {"x": ints(7, low=0, high=9)}, lambda x: 2**x),
    Case("clip", {"x": AB}, lambda x: x.clamp(-0.5, 1.25), {"alpha": np.float32(-0.5), "beta": np.float32(1.25)}),
    Case("threshold", {"x": AB}, lambda x: x.clamp(min=0.25), {"alpha": np.float32(0.25)}),
    Case("threshold", {"x": ints(9)}, lambda x: x.clamp(min=2), {"alpha": np.int32(2)}),
    Case("inverse", {"x": POSITIVE}, lambda x: 1 / (x + 0.5), {"epsilon": np.float32(0.5)}),
    Case("log", {"x": POSITIVE}, lambda x: torch.log(x + 0.125), {"epsilon": np.float32(0.125)}),
    Case("rsqrt", {"x": POSITIVE}, lambda x: 1 / torch.sqrt(x + 0.125), {"epsilon": np.float32(0.125)}),
    # The default is not one that float16 has.
    Case("inverse", {"x": POSITIVE}, lambda x: 1 / (x + float(np.float16(1e-4))), dtypes=("float16",)),
    Case("inverse", {"x": POSITIVE}, lambda x: 1 / (x + 1e-4), dtypes=("float32",)),
    Case("log", {"x": POSITIVE}, torch.log),
    Case("rsqrt", {"x": POSITIVE}, lambda x: 1 / torch.sqrt(x)),
    Case(
        "select",
        {"cond": bools(3, 4), "a": floats(3, 4), "b": floats(3, 4, low=5, high=6)},
        lambda cond, a, b: torch.where(cond, a, b),
    ),
    Case(
        "select",
        {"cond": bools(3, 4), "a": ints(3, 4), "b": ints(3, 4, low=5)},
        lambda cond, a, b: torch.where(cond, a, b),
    ),
    Case("cast", {"x": floats(9, low=-40, high=40)}, lambda x: x.trunc().int(), {"dtype": "int32"}),
    Case("cast", {"x": floats(9, low=-40, high=40)}, lambda x: x.trunc().int(), {"dtype": "int8"}, ("iOS17", "iOS18")),
    Case("cast", {"x": floats(9, low=0, high=200)}, lambda x: x.trunc().int(), {"dtype": "uint8"}, ("iOS17", "iOS18")),
    Case(
        "cast", {"x": floats(9, low=-400, high=400)}, lambda x: x.trunc().int(), {"dtype": "int16"}, ("iOS17", "iOS18")
    ),
    Case(
        "cast", {"x": floats(9, low=0, high=60000)}, lambda x: x.trunc().int(), {"dtype": "uint16"}, ("iOS17", "iOS18")
    ),
    Case("cast", {"x": np.array([0.0, 0.5, -2.0], dtype=np.float32)}, lambda x: x != 0, {"dtype": "bool"}),
    Case("cast", {"x": ints(9)}, lambda x: x.double(), {"dtype": "fp32"}, dtypes=("float32",)),
    Case("cast", {"x": ints(9)}, lambda x: x.double(), {"dtype": "fp16"}, dtypes=("float16",)),
    Case("cast", {"x": bools(5)}, lambda x: x.double(), {"dtype": "fp16"}, dtypes=("float16",)),
    Case("cast", {"x": floats(9)}, lambda x: x, {"dtype": "fp32"}, dtypes=("float32",)),
    # Beyond float16's largest number there is infinity.
    Case("mul", {"x": floats(9, low=200, high=500), "y": floats(9, low=-400, high=-100)}, torch.mul),
]

A = np.float32
PER_CHANNEL = {"alpha": floats(3, low=0.5, high=2), "beta": floats(3, low=0.5, high=1.5)}


def _channels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).double().reshape(1, -1, 1)


ACTIVATIONS = [
    Case(
        "clamped_relu",
        {"x": AB},
        lambda x: torch.where(x >= 0, x.clamp(max=0.5), (x * 0.25).clamp(max=0.5)),
        {"alpha": A(0.25), "beta": A(0.5)},
    ),
    Case("elu", {"x": AB}, lambda x: torch.where(x > 0, x, 0.5 * (x.exp() - 1)), {"alpha": A(0.5)}),
    *(
        Case("gelu", {"x": floats(40, low=-6, high=6)}, f, {"mode": mode})
        for mode, f in {
            "EXACT": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
            "TANH_APPROXIMATION": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
            "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
        }.items()
    ),
    Case("gelu", {"x": AB}, F.gelu),
    Case("leaky_relu", {"x": AB}, lambda x: torch.where(x >= 0, x, 0.125 * x), {"alpha": A(0.125)}),
    Case("linear_activation", {"x": AB}, lambda x: 0.5 * x - 1.5, {"alpha": A(0.5), "beta": A(-1.5)}),
    Case(
        "prelu",
        {"x": floats(2, 3, 4, 5)},
        lambda x: torch.where(x > 0, x, x * _channels(PER_CHANNEL["alpha"])[..., None]),
        {"alpha": PER_CHANNEL["alpha"]},
    ),
    Case("scaled_tanh", {"x": AB}, lambda x: 0.5 * torch.tanh(1.5 * x), {"alpha": A(0.5), "beta": A(1.5)}),
    Case("sigmoid_hard", {"x": AB}, lambda x: (0.5 * x + 0.25).clamp(0, 1), {"alpha": A(0.5), "beta": A(0.25)}),
    Case("softmax", {"x": floats(2, 3, 5, low=-9, high=9)}, lambda x: torch.softmax(x, -1)),
    Case("softmax", {"x": floats(2, 3, 5, low=-9, high=9)}, lambda x: torch.softmax(x, 1), {"axis": 1}),
    Case(
        "softplus_parametric",
        {"x": AB},
        lambda x: _channels(PER_CHANNEL["alpha"]) * torch.log(1 + torch.exp(_channels(PER_CHANNEL["beta"]) * x)),
        PER_CHANNEL,
    ),
    Case("thresholded_relu", {"x": AB}, lambda x: torch.where(x >= 0.5, x, 0.0), {"alpha": A(0.5)}),
]

REDUCE = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: (x**2).sum(axes, keep) ** 0.5,
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.exp().sum(axes, keep).log(),
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: (x**2).sum(axes, keep),
}
R = floats(2, 3, 4, 5, low=0.1, high=2)
REDUCTIONS = [
    *(
        Case(op, {"x": R}, lambda x, f=f, axes=axes, keep=keep: f(x, axes, keep), {"axes": axes, "keep_dims": keep})
        for op, f in REDUCE.items()
        for axes, keep in (([1], False), ([2, 3], True), ([-1, 0], False))
    ),
    *(Case(op, {"x": R}, lambda x, f=f: f(x, [0, 1, 2, 3], True), {"keep_dims": True}) for op, f in REDUCE.items()),
    Case("reduce_prod", {"x": R}, lambda x: x.prod(1), {"axes": [1]}),
    Case("reduce_prod", {"x": R}, lambda x: x.prod(3, True).prod(1, True), {"axes": [-1, 1], "keep_dims": True}),
    *(
        Case(op, {"x": ints(3, 4)}, lambda x, f=REDUCE[op]: f(x, [1], False).int(), {"axes": [1]})
        for op in ("reduce_sum", "reduce_max", "reduce_min", "reduce_sum_square")
    ),
    *(
        Case(
            op,
            {"x": floats(3, 4, 5)},
            lambda x, f=f, axis=axis, keep=keep: f(x, axis, keep),
            {"axis": axis, "keep_dims": keep},
        )
        for op, f in {"reduce_argmax": torch.argmax, "reduce_argmin": torch.argmin}.items()
        for axis, keep in ((-1, False), (1, True))
    ),
    Case("cumsum", {"x": floats(3, 4)}, lambda x: x.cumsum(0)),
    Case("cumsum", {"x": floats(3, 4)}, lambda x: x.cumsum(1) - x, {"axis": 1, "exclusive": True}),
    Case("cumsum", {"x": floats(3, 4)}, lambda x: x.flip(1).cumsum(1).flip(1), {"axis": -1, "reverse": True}),
    Case(
        "cumsum",
        {"x": ints(3, 4)},
        lambda x: (x.flip(1).cumsum(1).flip(1) - x).int(),
        {"axis": 1, "exclusive": True, "reverse": True},
    ),
]

W, BIAS = floats(5, 4), floats(5)
BATCHED = {"x": floats(2, 3, 4), "y": floats(2, 4, 5)}
ATTENTION = {"query": floats(2, 3, 7, 4), "key": floats(2, 3, 6, 4), "value": floats(2, 3, 6, 5)}
MASK = floats(7, 6, low=-9, high=0)
SEEN = np.tril(np.ones((7, 6), dtype=bool))


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores + (
            torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else attn_mask
        )
    return torch.softmax(scores, -1) @ value


PRODUCTS = [
    Case(
        "linear",
        {"x": floats(2, 3, 4)},
        lambda x: x @ torch.from_numpy(W.T.copy()).double() + torch.from_numpy(BIAS).double(),
        {"weight": W, "bias": BIAS},
    ),
    Case("linear", {"x": floats(3, 4)}, lambda x: x @ torch.from_numpy(W.T.copy()).double(), {"weight": W}),
    Case("matmul", BATCHED, torch.matmul),
    Case("matmul", {"x": floats(3, 2, 4, 3), "y": floats(2, 4, 5)}, lambda x, y: x.mT @ y, {"transpose_x": True}),
    Case("matmul", {"x": floats(3, 4), "y": floats(2, 5, 4)}, lambda x, y: x @ y.mT, {"transpose_y": True}),
    Case("matmul", {"x": floats(4), "y": floats(4, 5)}, torch.matmul),
    Case("matmul", {"x": ints(3, 4), "y": ints(4, 2)}, torch.matmul),
    Case(
        "einsum",
        {"values": [floats(2, 3, 4, 5), floats(2, 5, 4, 6)]},
        lambda values: torch.einsum("nchw,nwhu->nchu", *values),
        {"equation": "nchw,nwhu->nchu"},
    ),
    Case(
        "einsum",
        {"values": [floats(3, 1, 5), floats(5, 4, 6)]},
        lambda values: torch.einsum("cw,whr->chr", values[0][:, 0], values[1]),
        {"equation": "chw,whr->chr"},
    ),
    Case("scaled_dot_product_attention", ATTENTION, _attend, opsets=("iOS18",)),
    Case("scaled_dot_product_attention", {**ATTENTION, "attn_mask": MASK}, _attend, opsets=("iOS18",)),
    Case("scaled_dot_product_attention", {**ATTENTION, "attn_mask": SEEN}, _attend, opsets=("iOS18",)),
    Case(
        "scaled_dot_product_attention",
        {"query": floats(2, 7, 4), "key": floats(2, 6, 4), "value": floats(2, 6, 5)},
        _attend,
        opsets=("iOS18",),
    ),
]
NUMBERS = [*ELEMENTWISE, *ACTIVATIONS, *REDUCTIONS, *PRODUCTS]
