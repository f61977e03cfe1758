"""The frontier as a picture: what each number of cached steps costs, and how near its best mask stays to clock 1."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgediff.outputs import check_drawing
from edgediff.plan.trajectory import psnr_db
from edgediff_runtime.clock import letters

if TYPE_CHECKING:
    from edgediff.plan.planner import Plan, Point

INK, SOFT, BEST, UNIFORM, CHOSEN = "#222222", "#8a8a8a", "#1f5fa8", "#c2571a", "#1a7f37"
SIZE, DPI = (8.0, 5.0), 150
DRAWING = "the plan's picture"
# Uniform clocks that get their name: those of longer periods crowd together at the cheap end.
NAMED = 5


def draw_frontier(plan: "Plan", path: Path) -> None:
    """Draws the frontier, the uniform clocks and the plan.

    Args:
        plan: The plan.
        path: Where the PNG is to be; the folder must exist.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_drawing(DRAWING)
    # The Agg backend by name: no display is asked for, and no global setting changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [point for point in plan.frontier if point.error > 0]
    if points:
        _draw(axes, plan, points)
    else:
        axes.text(
            0.5, 0.5, "no clock but clock 1: nothing is cached", ha="center", transform=axes.transAxes, color=SOFT
        )
    unit = "GFLOPs" if plan.cost.unit == "flops" else "milliseconds on this machine"
    axes.set_xlabel(f"cost, % of clock 1's {unit}")
    peak = "PSNR" if plan.manifest.sample.space == "pixel" else "latents: signal to noise"
    axes.set_ylabel(f"{peak} against clock 1, dB (higher is nearer)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    images = plan.images
    figure.suptitle(
        f"{plan.manifest.source.name}: {images.steps} steps of {plan.manifest.scheduler.name}, guidance "
        f"{images.guidance_scale:g}, {images.num_images} images\n"
        f"plan: {letters(plan.chosen.mask)} (F full, c cached), {plan.chosen.cost:.1%} of clock 1's cost",
        color=INK,
        fontsize=10.5,
    )
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw(axes: Any, plan: "Plan", points: "list[Point]") -> None:
    best = [point for point in plan.undominated if point.error > 0]
    axes.plot(*_at(points), linestyle="none", marker="o", markersize=5, color=BEST, alpha=0.35, zorder=3)
    axes.plot(
        *_at(best), "o-", markersize=4.5, linewidth=1.6, color=BEST, zorder=3, label="best mask for its cost, measured"
    )
    expected = [point for point in points if point.expected > 0]
    axes.plot(*_at(expected, "expected"), "x", markersize=5, color=BEST, alpha=0.7, label="the same, as expected")
    uniform = {period: point for period, point in plan.uniform.items() if point.error > 0}
    axes.plot(*_at(list(uniform.values())), "s", markersize=7, color=UNIFORM, zorder=2, label="uniform clocks")
    for period in list(uniform)[:NAMED]:
        where = (100 * uniform[period].cost, psnr_db(uniform[period].error))
        axes.annotate(f"clock {period}", where, (9, -4), textcoords="offset points", fontsize=8, color=UNIFORM)
    budget = 100 * plan.budget
    axes.axvline(budget, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"budget {budget:g} %", (budget, 1), (-4, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8, color=SOFT,
    )  # fmt: skip
    if plan.chosen.error > 0:
        where = (100 * plan.chosen.cost, psnr_db(plan.chosen.error))
        ring = {"markersize": 16, "markerfacecolor": "none", "markeredgecolor": CHOSEN, "markeredgewidth": 2}
        axes.plot(*where, "o", **ring, linestyle="none", label="the plan")
    if plan.cost.cached != plan.cost.full:
        saved = 1 - plan.cost.cached / plan.cost.full
        steps = plan.images.steps
        top = axes.secondary_xaxis(
            "top", functions=(lambda cost: (1 - cost / 100) * steps / saved, lambda n: 100 * (1 - n * saved / steps))
        )
        top.set_ticks([n for n in range(1, steps) if steps <= 24 or n % 5 == 0])
        top.set_xlabel(f"cached steps of {steps}", fontsize=9, color=SOFT)
        top.tick_params(labelsize=8, colors=SOFT)
        top.spines["top"].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")


def _at(points: "Sequence[Point]", which: str = "error") -> tuple[list[float], list[float]]:
    """Costs in percent and errors in dB."""
    return [100 * point.cost for point in points], [psnr_db(getattr(point, which)) for point in points]
