"""Precision and recall: against brute force, and for sets whose answer is known."""

import numpy as np
import pytest

from edgediff.errors import DataError
from edgediff.evaluate import distances, precision
from edgediff.evaluate.distances import kernel_distance
from edgediff.evaluate.precision import precision_recall

RNG = np.random.default_rng(0)


def brute_force(x: np.ndarray, y: np.ndarray, neighbours: int = 3) -> float:
    """The share of x that lies in some ball of y."""
    radii = [sorted(float(np.linalg.norm(a - b)) for b in y)[neighbours] for a in y]
    return float(np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(y, radii, strict=True)) for a in x]))


def test_it_is_the_share_within_the_balls() -> None:
    generated, real = RNG.normal(0.5, 1.4, (40, 3)), RNG.normal(size=(40, 3))
    found = precision_recall(generated, real)
    assert found.precision == brute_force(generated, real)
    assert found.recall == brute_force(real, generated)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_one_set_covers_itself_and_sets_far_apart_do_not_cover_each_other() -> None:
    x = RNG.normal(size=(50, 4))
    same, apart = precision_recall(x, x), precision_recall(x + 100, x)
    assert (same.precision, same.recall) == (1, 1)
    assert (apart.precision, apart.recall) == (0, 0)


def test_what_is_all_good_and_all_alike_has_precision_and_no_recall() -> None:
    real = RNG.normal(size=(200, 2))
    alike = real[0] + 1e-3 * RNG.normal(size=(200, 2))
    found = precision_recall(alike, real)
    assert found.precision == 1
    assert found.recall <= 1 / 200


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = RNG.normal(size=(50, 4)), RNG.normal(0.3, 1, (50, 4))
    whole = precision_recall(x, y), kernel_distance(x, y)
    monkeypatch.setattr(precision, "_TILE", 7)
    monkeypatch.setattr(distances, "_TILE", 3)
    assert precision_recall(x, y) == whole[0]
    assert kernel_distance(x, y).value == pytest.approx(whole[1].value, rel=1e-12)
    assert kernel_distance(x, y).spread == pytest.approx(whole[1].spread, rel=1e-9)


def test_sets_of_different_sizes_and_tiny_ones_are_refused() -> None:
    x = np.zeros((8, 2))
    with pytest.raises(DataError, match="8 and 5 images; expected sets of one size"):
        precision_recall(x, x[:5])
    with pytest.raises(DataError, match="expected more than 8"):
        precision_recall(x, x, neighbours=8)
    with pytest.raises(DataError, match="NaN"):
        precision_recall(x, x * np.nan)
