import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunked import Chunked

import edgediff
from edgediff.export.draft import draft_manifest
from edgediff.models.graphs import graph_list
from edgediff.models.torch_session import TorchSession
from edgediff_runtime import AutoClock, EdgePipeline, RequestError, make_scheduler, noise, parse_clock
from edgediff_runtime.auto_clock import AutoDecisions
from edgediff_runtime.loop import Request, denoise
from edgediff_runtime.manifest import Graph

GOLDEN = json.loads((Path(__file__).parents[1] / "runtime/golden/auto_clock.json").read_text())["cases"]
# Rows in another grouping go through other kernels: what is left is the order of additions.
REGROUPED = 1e-4


@pytest.fixture(scope="module")
def pipe(class_model: Path) -> EdgePipeline:
    model = edgediff.load_model(class_model)
    split = edgediff.split(model.unet)
    manifest = draft_manifest(model, split, edgediff.ExportConfig(steps=4), "labels")
    return EdgePipeline(manifest, TorchSession(split.parts, graph_list(split, model)))


# The rule


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['clock']}, {len(case['steps'])} steps")
def test_decisions_are_the_golden_ones(case: dict[str, Any]) -> None:
    clock = parse_clock(case["clock"], len(case["steps"]))
    assert isinstance(clock, AutoClock)
    decisions, was_guided = AutoDecisions(clock), False
    for i, step in enumerate(case["steps"]):
        rows = np.array(step["rows"], dtype=np.float32)
        if was_guided and not step["guided"]:
            decisions.keep_rows(len(rows))
        full, moved = decisions.decide(rows, forced=i == 0 or (step["guided"] and not was_guided))
        assert full is step["full"], i
        assert (moved if moved is not None and math.isfinite(moved) else None) == (
            None if step["moved"] is None else pytest.approx(step["moved"], rel=1e-9, abs=0)
        )
        was_guided = step["guided"]


def test_what_is_no_number_counts_as_having_moved() -> None:
    decisions = AutoDecisions(AutoClock(1e30, bound=100))
    rows = np.ones((2, 3), dtype=np.float16)
    assert decisions.decide(rows, forced=True) == (True, None)
    assert decisions.decide(rows, forced=False) == (False, 0.0)
    broken = rows.copy()
    broken[0, 0] = np.nan
    full, moved = decisions.decide(broken, forced=False)
    assert full
    assert moved is not None
    assert math.isnan(moved)
    full, moved = decisions.decide(rows, forced=False)
    assert full  # it is compared with what was broken
    broken[0, 0] = np.inf
    assert decisions.decide(broken, forced=False)[0]
    assert decisions.decide(broken, forced=False)[0]  # infinity less infinity


def test_half_precision_features_are_compared_in_double() -> None:
    decisions = AutoDecisions(AutoClock(1.0))
    then, now = (np.full((1, 10_000), x, dtype=np.float16) for x in (60_000, 60_032))
    decisions.decide(then, forced=True)
    _, moved = decisions.decide(now, forced=False)
    assert moved == pytest.approx((float(now[0, 0]) - float(then[0, 0])) / float(then[0, 0]), rel=1e-12)


# In the loop


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("clock", "same"), [("auto:1000", 4), ("auto:1000:1", 2), ("auto:1000:20", 20), ("auto:0.00001", 1)]
)
def test_a_huge_tolerance_is_its_bound_and_a_tiny_one_clock_1(
    pipe: EdgePipeline, clock: str, same: int, guidance: float
) -> None:
    asked = {"num_images": 2, "num_inference_steps": 9, "guidance_scale": guidance, "seed": 5}
    got, want = pipe(**asked, clock=clock), pipe(**asked, clock=same)
    assert got.mask == want.mask
    assert np.array_equal(got.latents, want.latents)
    assert [step.ms.keys() for step in got.ledger] == [step.ms.keys() for step in want.ledger]


def _by_hand(pipe: EdgePipeline, clock: AutoClock, **asked: Any) -> tuple[list[int], list[float | None]]:
    """What each step should have decided, in plain Python, from the features that the loop's own table holds."""
    mask, moved, last, was_guided, cached = [], [], None, False, 0
    for step in pipe.stream(clock=clock, **asked):
        rows = [row.astype(float).ravel().tolist() for row in pipe.session.get(step.tensors[0]["highres_feature"])]
        if last is not None and was_guided and not step.guided:
            last = last[len(rows) :]
        if last is None or (step.guided and not was_guided):
            moved.append(None)
        else:
            moved.append(max(math.dist(a, b) / math.hypot(*b) for a, b in zip(rows, last, strict=True)))
        full = moved[-1] is None or moved[-1] > clock.tolerance or cached == clock.bound
        mask.append(int(full))
        last, cached = (rows, 0) if full else (last, cached + 1)
        was_guided = step.guided
    return mask, moved


@pytest.mark.parametrize("guidance", [1.0, 2.5, [2, 2, 2, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 1, 1, 1, 1, 2]])
@pytest.mark.parametrize("clock", [AutoClock(0.1), AutoClock(0.2), AutoClock(0.3, 5)])
def test_decisions_are_those_by_hand(pipe: EdgePipeline, clock: AutoClock, guidance: Any) -> None:
    asked = {"num_images": 2, "num_inference_steps": 9, "guidance_scale": guidance, "seed": 3}
    result = pipe(**asked, clock=clock)
    mask, moved = _by_hand(pipe, clock, **asked)
    assert list(result.mask) == mask
    assert 0 in mask
    assert [step.moved is None for step in result.ledger] == [x is None for x in moved]
    for step, want in zip(result.ledger, moved, strict=True):
        assert step.moved == (None if want is None else pytest.approx(want, rel=1e-9))
        assert ("lowres" in step.ms, "adaptor" in step.ms) == (step.full, not step.full)
        assert step.to_dict()["moved"] == step.moved


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_same_steps_as_a_mask_give_the_same_bits(pipe: EdgePipeline, guidance: float) -> None:
    asked = {"num_images": 2, "num_inference_steps": 8, "guidance_scale": guidance, "seed": 1}
    auto = pipe(**asked, clock="auto:0.16")
    assert 1 in auto.mask[1:]
    assert 0 in auto.mask
    mask = pipe(**asked, clock=auto.mask)
    assert np.array_equal(auto.latents, mask.latents)
    assert all(step.moved is None for step in mask.ledger)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.5, [2, 2, 2, 1, 1, 1, 2, 2]])
def test_groups_of_rows_decide_as_the_whole_batch_does(pipe: EdgePipeline, batch: int, guidance: Any) -> None:
    assert isinstance(pipe.session, TorchSession)
    asked = {"num_images": 3, "num_inference_steps": 8, "guidance_scale": guidance, "seed": 2}
    # Only the row that has moved most asks for a full second step; no other group of rows would.
    first, second = (
        pipe.session.get(step.tensors[0]["highres_feature"]).reshape(len(step.tensors[0]["sample"]), -1).copy()
        for step, _ in zip(pipe.stream(**asked, clock="auto:9"), range(2), strict=False)
    )
    *_, next_to, most = sorted(np.linalg.norm(second - first, axis=1) / np.linalg.norm(first, axis=1))
    tolerance = float(next_to + most) / 2
    assert next_to < tolerance < most
    chunked = EdgePipeline(pipe.manifest, Chunked(pipe.session, batch))
    want, got = pipe(**asked, clock=AutoClock(tolerance)), chunked(**asked, clock=AutoClock(tolerance))
    assert want.mask[1] == 1
    assert want.mask == got.mask
    assert np.abs(want.latents - got.latents).max() < REGROUPED
    for one, other in zip(want.ledger, got.ledger, strict=True):
        assert (one.moved is None) == (other.moved is None)
        assert one.moved is None or one.moved == pytest.approx(other.moved, rel=1e-4)


def test_two_interleaved_generations_decide_alone(pipe: EdgePipeline) -> None:
    asked = [
        {"num_inference_steps": 8, "clock": "auto:0.1", "seed": 1, "guidance_scale": 1.0},
        {"num_inference_steps": 8, "clock": "auto:0.3:2", "seed": 2, "num_images": 3},
    ]
    alone = [pipe(**request) for request in asked]
    both = [*zip(*(pipe.stream(**request) for request in asked), strict=True)]
    for result, steps in zip(alone, zip(*both, strict=True), strict=True):
        assert [step.full for step in steps] == [step.full for step in result.ledger]
        assert np.array_equal(steps[-1].latents, result.latents)
    assert alone[0].mask != alone[1].mask


@torch.no_grad()
def test_guidance_switched_off_keeps_the_conditional_half_of_the_cache(pipe: EdgePipeline) -> None:
    stream = pipe.stream(num_images=2, num_inference_steps=4, clock="auto:9:9", guidance_scale=[3, 3, 1, 1])
    steps = [(step, {n: t.clone() for n, t in step.tensors[0].items()}) for step in stream]
    assert [step.full for step, _ in steps] == [True, False, False, False]
    assert torch.equal(steps[2][1]["cache"], steps[1][1]["lowres_feature"][2:])


def test_a_step_that_guidance_makes_full_is_what_the_next_is_compared_with(pipe: EdgePipeline) -> None:
    result = pipe(num_inference_steps=5, clock="auto:9:9", guidance_scale=[1, 1, 2, 2, 2])
    assert result.mask == (1, 0, 1, 0, 0)
    assert [step.moved is None for step in result.ledger] == [True, False, True, False, False]
    again = pipe(num_inference_steps=5, clock="1,0,1,0,0", guidance_scale=[1, 1, 2, 2, 2])
    assert np.array_equal(result.latents, again.latents)


def test_graphs_before_the_decision_run_for_all_rows_first(pipe: EdgePipeline) -> None:
    class Listing(Chunked):
        def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
            ran.append(graph.name)
            super().run(graph, tensors)

    ran: list[str] = []
    assert isinstance(pipe.session, TorchSession)
    listing = EdgePipeline(pipe.manifest, Listing(pipe.session, 1))
    listing(num_images=2, num_inference_steps=2, clock="auto:9", guidance_scale=1)
    assert ran == ["highres_in"] * 2 + ["lowres", "highres_out"] * 2 + ["highres_in"] * 2 + ["highres_out"] * 2


# Where it cannot be


def test_a_layout_that_cannot_decide_is_refused_by_name(class_model: Path, pipe: EdgePipeline) -> None:
    model = edgediff.load_model(class_model)
    split = edgediff.split(model.unet)
    manifest = draft_manifest(model, split, edgediff.ExportConfig(steps=4, layout="pair"), "labels")

    class Pair:
        graphs = manifest.targets[0].graphs
        batch = None

    with pytest.raises(RequestError, match=r"clock auto:0\.2:3 decides after highres_in has run, layout pair before"):
        EdgePipeline(manifest, Pair()).stream(clock="auto:0.2")  # type: ignore[arg-type]
    request = Request(
        graphs=Pair.graphs,
        scheduler=make_scheduler(manifest.scheduler, 2),
        clock=AutoClock(0.2),
        guidance=(1.0, 1.0),
        latents=noise(0, (1, 3, 16, 16)),
        cond={"class_labels": np.zeros(1, dtype=np.int64)},
    )
    with pytest.raises(
        RequestError, match=r"auto:0\.2:3 has nothing to decide by before it chooses among full, cached"
    ):
        next(denoise(request, pipe.session))


@pytest.mark.parametrize("clock", ["auto", "auto:", "auto:nan", "auto:-1", "auto:0.1:0"])
def test_bad_spellings_are_refused_before_the_first_step(pipe: EdgePipeline, clock: str) -> None:
    with pytest.raises(RequestError, match="expected auto:TOL or auto:TOL:BOUND"):
        pipe.stream(clock=clock)
