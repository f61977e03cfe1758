"""Each op that the evaluator knows against torch, in saved programs of each opset and dtype."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mil_cases_layout import LAYOUT
from mil_cases_numbers import NUMBERS
from mil_cases_spatial import SPATIAL
from mil_programs import OPSETS, Case, build, floats, misses
from test_mil_weights import COMPRESSIONS

from edgediff.mil import evaluate, open_program
from edgediff.mil.ops import OPS

CASES = [*NUMBERS, *SPATIAL, *LAYOUT]


def _labelled() -> Iterator[tuple[str, Case, str]]:
    seen: Counter[str] = Counter()
    for case in CASES:
        seen[case.op] += 1
        yield from ((f"{case.op}_case{seen[case.op]}_{dtype}", case, dtype) for dtype in case.floats)


TABLE = list(_labelled())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], np.ndarray]:
    """Every output of every case, by opset and name: one program for each opset, since converting is what costs."""
    results = {}
    for opset in OPSETS:
        path = tmp_path_factory.mktemp("programs") / f"{opset}.mlpackage"
        feeds = build([row for row in TABLE if opset in row[1].opsets], opset, path)
        results.update({(opset, name): array for name, array in evaluate(path, feeds).items()})
    return results


@pytest.mark.parametrize(("label", "case", "dtype"), TABLE, ids=[row[0] for row in TABLE])
def test_op(label: str, case: Case, dtype: str, evaluated: dict[tuple[str, str], np.ndarray]) -> None:
    expected = case.expected(dtype)
    for opset in case.opsets:
        for i, array in enumerate(expected):
            got = evaluated[opset, f"{label}_{i}"]
            assert got.dtype == (dtype if array.dtype.kind == "f" else np.int32)
            assert (fault := misses(got, array, dtype)) is None, f"{opset}: {fault}"
        assert (opset, f"{label}_{len(expected)}") not in evaluated


def test_table_covers_every_op() -> None:
    assert {case.op for case in CASES} | COMPRESSIONS == set(OPS)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("float32", lambda a: a * (1 + 3e-5)),
        ("float16", lambda a: a * (1 + 3e-3)),
        ("float32", lambda a: a[:-1]),
        ("float32", lambda a: np.where(a == a.max(), np.nan, a)),
        ("int32", lambda a: a + 1),
    ],
)
def test_comparison_sees_a_difference(dtype: str, change) -> None:
    array = floats(4, 5).astype(dtype)
    assert misses(array, array.astype(np.float64 if dtype != "int32" else dtype), dtype) is None
    assert misses(change(array), array.astype(np.float64 if dtype != "int32" else dtype), dtype)


def test_unrounded_run_keeps_what_float16_loses(tmp_path) -> None:
    case = Case("mul", {"x": floats(9, low=200, high=500), "y": floats(9, low=300, high=400)}, torch.mul)
    feeds = build([("product", case, "float16")], "iOS17", tmp_path / "a.mlpackage")
    function = open_program(tmp_path / "a.mlpackage").function()
    assert function.run(feeds)["product_0"].isinf().any()
    exact = function.run(feeds, rounded=False)["product_0"].numpy()
    np.testing.assert_allclose(exact, feeds["product_in0"].astype(np.float64) * feeds["product_in1"], rtol=1e-6)
