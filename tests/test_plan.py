from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgediff.errors import ConfigError
from edgediff.plan import planner
from edgediff.plan.budget import StepCost, cached_steps, check_budget
from edgediff.plan.estimate import MAX_PAIRS, Estimate, masks_of, near, probes
from edgediff.plan.plan_files import draw_frontier
from edgediff.plan.planner import Plan, choose
from edgediff.plan.trajectory import Errors, Mask
from edgediff_runtime.clock import format_mask

COST = StepCost("flops", 10.0, 4.0)


def masks(steps: int) -> list[Mask]:
    return [(True, *rest) for rest in product((True, False), repeat=steps - 1)]


def longest_row(mask: Mask) -> int:
    """How many cached steps a mask has in a row, at most."""
    return max(map(len, format_mask(mask).replace(",", "").split("1")))


def displacements(steps: int, seed: int, towards: float = 0.0) -> np.ndarray:
    """How far each step, cached, moves an image of 40 numbers; all of them a little in one direction."""
    moves = np.random.default_rng(seed).standard_normal((steps, 40)) + towards
    moves *= np.linspace(1.5, 0.3, steps)[:, None]
    return moves


def squared(moves: np.ndarray, mask: Mask) -> float:
    return float(np.mean(moves[~np.array(mask)].sum(axis=0) ** 2))


def stale(moves: np.ndarray, mask: Mask) -> float:
    """The same, where cached steps in a row move the image by more than each of them."""
    return squared(moves, mask) * max(longest_row(mask), 1) ** 2


def modelled(moves: np.ndarray, measure: Callable[[np.ndarray, Mask], float] = squared) -> Estimate:
    steps = len(moves)
    return Estimate.of({mask: measure(moves, mask) for mask in probes(steps)}, steps)


class Synthetic:
    """Planning images whose errors follow from displacements that add up, and what a plan asks of them."""

    def __init__(
        self,
        moves: np.ndarray,
        manifest: object = None,
        measure: Callable[[np.ndarray, Mask], float] = squared,
    ) -> None:
        self.moves, self.measure = moves, measure
        self.steps = self.calls = len(moves)
        self.num_images, self.seed, self.guidance_scale = 2, 0, 2.0
        self.start, self.edits = 0, None
        self.manifest = manifest

    def errors(self, asked: Iterable[Mask]) -> dict[Mask, Errors]:
        return {mask: self.measure(self.moves, mask) * np.array([0.9, 1.1]) for mask in asked}


def chosen(moves: np.ndarray, limit: float, **given: Any) -> Plan:
    return choose(Path("bundle"), Synthetic(moves, **given), "onnxruntime", limit, COST)  # type: ignore[arg-type]


# The model


@pytest.mark.parametrize("steps", [2, 3, 8, 11])
def test_the_model_is_exact_where_displacements_add_up(steps: int) -> None:
    moves = displacements(steps, seed=steps, towards=1.0)
    want = [squared(moves, mask) for mask in masks(steps)]
    np.testing.assert_allclose(modelled(moves).errors(masks(steps)), want, rtol=1e-9, atol=1e-12)


def test_one_and_two_cached_steps_are_as_measured_whatever_their_sign() -> None:
    moves = displacements(7, seed=1)
    moves[2] = -moves[1]
    few = [mask for mask in masks(7) if cached_steps(mask) <= 2]
    np.testing.assert_allclose(modelled(moves).errors(few), [squared(moves, mask) for mask in few], atol=1e-12)


@pytest.mark.parametrize("steps", [5, 8, 20])
def test_short_rows_are_as_measured(steps: int) -> None:
    moves = displacements(steps, seed=2, towards=1.0)
    rows = [mask for mask in probes(steps) if cached_steps(mask) == longest_row(mask)]
    assert {cached_steps(mask) for mask in rows} == {1, 2, 3, 4}
    model = modelled(moves, stale)
    np.testing.assert_allclose(model.errors(rows), [stale(moves, mask) for mask in rows], rtol=1e-9)
    longer = (True, *(False,) * (steps - 1))
    assert steps == 5 or model.errors([longer])[0] > modelled(moves).errors([longer])[0]


def test_cancelling_pairs_do_not_make_a_long_mask_free() -> None:
    errors = {mask: 1.0 if cached_steps(mask) == 1 else 0.2 for mask in probes(6)}
    model = Estimate.of(errors, 6)
    assert model.alone.sum() + model.cross[np.triu_indices(6)].sum() < 0
    np.testing.assert_allclose(model.errors([(True, *(False,) * 5)]), [0.2])


@pytest.mark.parametrize("steps", range(1, 61))
def test_pairs_are_bounded_and_neighbours_always_among_them(steps: int) -> None:
    found = probes(steps)
    pairs = [mask for mask in found if cached_steps(mask) == 2]
    assert len(found) == len(set(found)) == steps - 1 + len(pairs) + max(steps - 3, 0) + max(steps - 4, 0)
    assert all(mask[0] for mask in found)
    assert len(pairs) <= max(MAX_PAIRS, steps - 2)
    assert sum(longest_row(mask) == 2 for mask in pairs) == max(steps - 2, 0)
    assert near(steps) >= steps - 2 or steps > 12


# The search


@pytest.mark.parametrize(("steps", "seed"), [(1, 0), (2, 0), (6, 1), (12, 2), (13, 3), (14, 4)])
def test_the_search_finds_what_brute_force_finds(steps: int, seed: int) -> None:
    model = modelled(displacements(steps, seed, towards=0.1), stale)
    every = masks(steps)
    errors = model.errors(every)
    found = model.best_masks(3)
    assert list(found) == list(range(steps))
    for count, best in found.items():
        want = sorted(e for e, mask in zip(errors, every, strict=True) if cached_steps(mask) == count)[:3]
        assert {cached_steps(mask) for mask in best} == {count}
        assert len(set(best)) == len(best)
        np.testing.assert_allclose(model.errors(best), want, rtol=1e-9)


# The choice


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_and_the_frontier_are_the_best_there_are(seed: int) -> None:
    moves = displacements(8, seed, towards=0.5)
    found = chosen(moves, 0.75)
    affordable = [mask for mask in masks(8) if COST.fits(mask, 0.75)]
    assert found.chosen.error == pytest.approx(min(squared(moves, mask) for mask in affordable))
    assert found.chosen.cost <= 0.75
    assert [cached_steps(point.mask) for point in found.frontier] == list(range(8))
    best = [min(squared(moves, mask) for mask in masks_of(8, count)) for count in range(8)]
    assert [point.error for point in found.frontier] == pytest.approx(best)
    assert best == sorted(best)


LUCKY = (True, False, False, True, False, True, False, False, True)


def jagged(moves: np.ndarray, mask: Mask) -> float:
    """What no model of pairs and rows expects: one mask of five cached steps moves nothing."""
    return 0.0 if mask == LUCKY else squared(moves, mask)


def test_every_mask_of_the_wanted_cost_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = displacements(9, 3, towards=1.0)
    found = chosen(moves, 0.7, measure=jagged)
    assert (found.chosen.mask, found.chosen.error) == (LUCKY, 0.0)
    assert found.chosen.expected > 0
    assert found.measured >= len(masks_of(9, cached_steps(LUCKY))) == 56
    monkeypatch.setattr(planner, "MAX_ENUMERATED", 55)
    found = chosen(moves, 0.7, measure=jagged)
    assert found.chosen.mask != LUCKY
    assert found.measured < 120


@pytest.mark.parametrize("steps", [20, 50])
def test_many_steps_are_searched_with_the_model(steps: int) -> None:
    found = chosen(displacements(steps, 5, towards=0.2), 0.7)
    assert found.measured < 8 * steps + MAX_PAIRS
    assert [cached_steps(point.mask) for point in found.frontier] == list(range(steps))
    assert all(found.chosen.error <= p.error for p in found.uniform.values() if COST.fits(p.mask, 0.7))


def test_no_uniform_clock_that_meets_the_budget_is_better() -> None:
    moves = displacements(9, 7)
    moves[2::2] *= 8  # the clock of period 2 is the right one, and the model is told something else
    found = chosen(moves, 0.8)
    assert all(found.chosen.error <= p.error for p in found.uniform.values() if COST.fits(p.mask, 0.8))
    assert found.chosen.expected == pytest.approx(found.chosen.error)


def test_a_uniform_clock_stands_where_it_is_as_good() -> None:
    noise = {
        (True, False, True, False): np.array([1.0, 3.0, 2.0]),
        (True, True, False, False): np.array([2.0, 1.9, 2.0]),
    }
    images = Synthetic(displacements(4, 0))
    images.errors = lambda asked: {  # type: ignore[method-assign]
        mask: noise.get(mask, cached_steps(mask) * np.array([2.5, 2.5, 2.6])) for mask in asked
    }
    found = choose(Path("bundle"), images, "onnxruntime", 0.7, COST)  # type: ignore[arg-type]
    assert found.chosen.mask == (True, False, True, False)
    assert found.tied is not None
    assert found.tied.mask == (True, True, False, False)
    assert found.tied.error < found.chosen.error


def test_a_budget_of_one_is_clock_1() -> None:
    assert chosen(displacements(5, 0), 1.0).chosen.mask == (True,) * 5
    assert chosen(displacements(1, 0), 1.5).chosen.mask == (True,)


# The budget


@pytest.mark.parametrize("share", [0.0, -0.5, float("nan"), float("inf"), 70.0])
def test_a_budget_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"budget is .*; expected a share of clock 1's cost above 0, such as 0.7"):
        check_budget(share, "flops")


def test_a_budget_that_no_mask_meets_names_the_cheapest_and_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"0\.3 in flops: the cheapest, 1,0,0,0, costs 55\.0% .* nearest budget is 0\.55"
    ):
        COST.fewest_cached(0.3, 4)
    assert COST.fewest_cached(0.55, 4) == 3
    with pytest.raises(ConfigError, match=r"budget of 0\.99 in flops: the cheapest, 1, costs 100\.0% .* is 1"):
        COST.fewest_cached(0.99, 1)
    assert COST.fewest_cached(1, 1) == 0


@pytest.mark.parametrize("steps", range(2, 30))
def test_the_nearest_budget_is_met(steps: int) -> None:
    with pytest.raises(ConfigError) as caught:
        COST.fewest_cached(0.01, steps)
    assert COST.fewest_cached(float(str(caught.value).rpartition(" ")[2]), steps) == steps - 1


def test_a_cached_step_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no clock saves latency with this bundle: a cached step costs 10 ms, a full"):
        StepCost("latency", 10, 10).fewest_cached(0.9, 8)
    assert StepCost("latency", 10, 11).fewest_cached(1.0, 8) == 0


def test_the_picture_shows_clock_1_alone(tmp_path: Path) -> None:
    manifest = SimpleNamespace(
        source=SimpleNamespace(name="tiny"),
        scheduler=SimpleNamespace(name="ddim"),
        sample=SimpleNamespace(space="latent"),
    )
    draw_frontier(chosen(displacements(1, 0), 1.0, manifest=manifest), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
