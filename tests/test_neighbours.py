"""Nearest training photographs: against brute force, and copies."""

import numpy as np
import pytest

from edgediff.errors import DataError
from edgediff.evaluate import neighbours, processes
from edgediff.evaluate.neighbours import Nearest, nearest_neighbours

RNG = np.random.default_rng(0)


def random_images(count: int, size: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def brute_force(image: np.ndarray, train: np.ndarray) -> tuple[float, int, bool]:
    found = [
        (float(np.sqrt(((image.astype(float) - shown) ** 2).mean())), i, mirrored)
        for i, photograph in enumerate(train)
        for mirrored, shown in ((False, photograph), (True, photograph[:, ::-1]))
    ]
    return min(found)


def test_the_nearest_is_the_nearest() -> None:
    images, train = random_images(12), random_images(30)
    found = nearest_neighbours(images, train)
    for i, image in enumerate(images):
        distance, index, mirrored = brute_force(image, train)
        assert found.distance[i] == pytest.approx(distance, rel=1e-12)
        assert (found.neighbour[i], found.mirrored[i]) == (index, mirrored)
    assert found.mirrored.any()
    assert not found.mirrored.all()


def test_copies_are_at_zero_mirrored_or_not() -> None:
    train = random_images(20)
    found = nearest_neighbours(np.stack([train[7], train[3][:, ::-1]]), train)
    assert [each.tolist() for each in found] == [[0, 0], [7, 3], [False, True]]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, train = random_images(9), random_images(25)
    whole = nearest_neighbours(images, train)
    monkeypatch.setattr(neighbours, "_CHUNK", 4 * images[0].size)
    parts = nearest_neighbours(images, train)
    np.testing.assert_array_equal(parts, whole)


def test_closeness_counts_what_is_within_the_threshold() -> None:
    found = at(np.arange(100.0)).closeness(9.0)
    assert (found.median, found.share_nearer) == (49.5, 0.1)
    assert found.quantile_5 == pytest.approx(4.95)
    # Copies count even where the photographs held out have copies themselves.
    assert at(np.zeros(4)).closeness(0.0).share_nearer == 1


def at(distance: np.ndarray) -> Nearest:
    return Nearest(distance, np.arange(len(distance)), np.zeros(len(distance), bool))


def test_suspects_are_the_nearest_few() -> None:
    found = at(np.arange(20.0)[::-1]).suspects()
    assert [(each.image, each.distance, each.neighbour) for each in found] == [(19 - i, i, 19 - i) for i in range(8)]


@pytest.mark.parametrize(
    ("images", "train"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), random_images(2)),
        (random_images(2), np.zeros((0, 8, 8, 3), np.uint8)),
        (random_images(2), random_images(2, size=4)),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(images: np.ndarray, train: np.ndarray) -> None:
    with pytest.raises(DataError, match="of one size"):
        nearest_neighbours(images, train)


def test_work_is_divided_in_turns() -> None:
    shares = [processes.Processes(i, 3).share(range(7)) for i in range(3)]
    assert sorted(number for share in shares for number in share) == [*range(7)]
    assert processes.Processes().gather([1, 2]) == [1, 2]
