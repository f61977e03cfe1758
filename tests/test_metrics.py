"""Kernel distance, Frechet distance, precision and recall: against brute force, and where the answer is known."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgediff.errors import DataError
from edgediff.evaluate import metrics
from edgediff.evaluate.metrics import frechet_distance, kernel_distance, precision_recall

RNG = np.random.default_rng(0)


def brute_force_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    of_x = [k(a, b) for a, b in itertools.permutations(x, 2)]
    of_y = [k(a, b) for a, b in itertools.permutations(y, 2)]
    between = [k(a, b) for a in x for b in y]
    return sum(of_x) / len(of_x) + sum(of_y) / len(of_y) - 2 * sum(between) / len(between)


def test_kernel_distance_is_the_double_sum() -> None:
    x, y = RNG.normal(size=(9, 5)), RNG.normal(0.3, 1.5, size=(7, 5))
    assert kernel_distance(x, y).value == pytest.approx(brute_force_mmd2(x, y), rel=1e-12)


def test_kernel_distance_of_one_distribution_is_around_zero_and_its_spread_fits() -> None:
    found = [kernel_distance(RNG.normal(size=(60, 4)), RNG.normal(size=(60, 4))) for _ in range(60)]
    values = np.array([each.value for each in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(60)
    assert values.min() < 0 < values.max()
    assert 0.8 < np.mean([each.spread for each in found]) / values.std() < 2.2
    found = [kernel_distance(RNG.normal(1, 1, (60, 4)), RNG.normal(size=(60, 4))) for _ in range(60)]
    assert 0.7 < np.mean([each.spread for each in found]) / np.std([each.value for each in found]) < 1.4


def test_the_seed_divides_and_changes_no_value() -> None:
    x, y = RNG.normal(size=(40, 4)), RNG.normal(1, 1, size=(40, 4))
    first, again, other = (kernel_distance(x, y, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value == pytest.approx(other.value, rel=1e-12)
    assert first.spread != other.spread


def sample_with(mean: np.ndarray, covariance: np.ndarray, count: int = 50) -> np.ndarray:
    """Points with exactly this mean and covariance."""
    x = RNG.normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size: int) -> np.ndarray:
    root = RNG.normal(size=(size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_frechet_distance_of_known_gaussians() -> None:
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 1.0, 9.0])
    m, n = np.array([1.0, -2.0, 0.0]), np.array([0.0, 0.0, 2.0])
    expected = 1 + 4 + 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    for q in (np.eye(3), turn):
        x, y = sample_with(q @ m, q @ np.diag(a) @ q.T), sample_with(q @ n, q @ np.diag(b) @ q.T, 80)
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_where_the_covariances_do_not_commute() -> None:
    a, b = random_covariance(6), random_covariance(6)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    x, y = sample_with(np.zeros(6), a), sample_with(np.zeros(6), b)
    assert frechet_distance(x, y) == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_distances_of_a_set_from_itself_and_as_it_moves_away() -> None:
    x = RNG.normal(size=(80, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, x).value <= 0
    moved = [x + shift for shift in (0.25, 0.5, 1.0, 2.0)]
    for distance in (frechet_distance, lambda a, b: kernel_distance(a, b).value):
        values = [distance(x, y) for y in (x, *moved)]
        assert values == sorted(values)
        assert len({*values}) == len(values)


def test_fewer_images_than_features_are_no_fault() -> None:
    x, y = RNG.normal(size=(5, 20)), RNG.normal(size=(6, 20))
    assert frechet_distance(x, y) > 0
    assert kernel_distance(x, y).value == pytest.approx(brute_force_mmd2(x, y), rel=1e-12)


@pytest.mark.parametrize("distance", [kernel_distance, frechet_distance, precision_recall])
def test_features_that_are_none_are_refused(distance: Callable[..., Any]) -> None:
    x = np.zeros((5, 3))
    for y, words in (
        (np.zeros((3, 3)), "4 images or more"),
        (np.zeros((5, 4)), "width 3 and 4"),
        (np.full((5, 3), np.nan), "NaN"),
    ):
        with pytest.raises(DataError, match=words):
            distance(x, y)


# Precision and recall


def share_within(x: np.ndarray, y: np.ndarray) -> float:
    """The share of x that lies in some ball of y."""
    radii = [sorted(float(np.linalg.norm(a - b)) for b in y)[3] for a in y]
    return float(np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(y, radii, strict=True)) for a in x]))


def test_it_is_the_share_within_the_balls() -> None:
    rng = np.random.default_rng(0)
    generated, real = rng.normal(0.5, 1.4, (40, 3)), rng.normal(size=(40, 3))
    found = precision_recall(generated, real)
    assert found.precision == share_within(generated, real)
    assert found.recall == share_within(real, generated)
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
    monkeypatch.setattr(metrics, "_TILE", 3)
    assert precision_recall(x, y) == whole[0]
    assert kernel_distance(x, y).value == pytest.approx(whole[1].value, rel=1e-12)
    assert kernel_distance(x, y).spread == pytest.approx(whole[1].spread, rel=1e-9)


def test_sets_of_different_sizes_are_refused() -> None:
    x = np.zeros((8, 2))
    with pytest.raises(DataError, match="8 and 5 images; expected sets of one size"):
        precision_recall(x, x[:5])
