"""What ``edgediff plan`` shows, as rich tables; nothing here prints."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from edgediff.plan.budget import cached_steps
from edgediff.plan.plan_files import edited
from edgediff.plan.trajectory import psnr_db
from edgediff_runtime.clock import format_mask, letters

if TYPE_CHECKING:
    from edgediff.plan.planner import Plan, Point

NAMED_PERIODS = 6


def plan_tables(plan: "Plan") -> list[Table]:
    """The frontier, the uniform clocks, and the plan."""
    images, cost = plan.images, plan.cost
    what = "operations counted" if cost.unit == "flops" else "time measured"
    space = "images in [0, 1]" if plan.manifest.sample.space == "pixel" else "latents over their variance"
    frontier = Table(
        box=box.SIMPLE_HEAD,
        title=f"{plan.manifest.source.name}, {images.steps} steps of {plan.manifest.scheduler.name}, guidance "
        f"{images.guidance_scale:g}: {edited(images)}the best clock for each cost",
        caption=f"cost: of clock 1's, {what}; a full step {cost.format(cost.full)}, a cached one "
        f"{cost.format(cost.cached)}\nerror: 1000 x mean squared difference to clock 1, {space}; {images.num_images} "
        f"images, {plan.measured} clocks measured",
    )
    _columns(frontier, "cached")
    for point in plan.frontier:
        chosen = point.mask == plan.chosen.mask
        frontier.add_row(str(cached_steps(point.mask)), *_cells(point), style="bold green" if chosen else None)
    uniform = Table(box=box.SIMPLE_HEAD, title="uniform clocks")
    _columns(uniform, "clock")
    for period, point in list(plan.uniform.items())[:NAMED_PERIODS]:
        uniform.add_row(str(period), *_cells(point))
    answer = Table(show_header=False, box=box.SIMPLE, title=f"the plan for {plan.budget:.1%} of clock 1")
    answer.add_column("")
    answer.add_column("", overflow="fold")
    for name, words in _answer(plan):
        answer.add_row(name, words)
    return [frontier, uniform, answer]


def _columns(table: Table, first: str) -> None:
    table.add_column(first, justify="right", no_wrap=True)
    table.add_column("full, cached", no_wrap=True)
    for name in ("cost", "expected", "error", "+-", "PSNR dB"):
        table.add_column(name, justify="right", no_wrap=True)


def _cells(point: "Point") -> tuple[str, ...]:
    psnr = f"{psnr_db(point.error):.1f}" if point.error > 0 else "same"
    numbers = (f"{1e3 * value:.3g}" for value in (point.expected, point.error, point.uncertainty))
    return letters(point.mask), f"{point.cost:.1%}", *numbers, psnr


def _answer(plan: "Plan") -> list[tuple[str, Text]]:
    chosen = plan.chosen
    rows = [("clock", Text(format_mask(chosen.mask), "bold green"))]
    rows.append(("cost", Text(f"{chosen.cost:.1%} of clock 1")))
    rows.append(("error", Text(_error(chosen.error))))
    if plan.tied is not None:
        words = f"{format_mask(plan.tied.mask)}: {_error(plan.tied.error)}; these images do not tell the two apart"
        rows.append(("as good", Text(words, "dim")))
    rows += [("warning", Text(line, "yellow")) for line in plan.warnings]
    return rows


def _error(error: float) -> str:
    return f"{1e3 * error:.3g} / 1000 ({psnr_db(error):.1f} dB)" if error > 0 else "none"
