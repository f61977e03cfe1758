"""What ``edgediff plan-weights`` shows, as rich tables; nothing here prints."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from edgediff.config.weight_plan import BITS
from edgediff.plan.weight_search import MEGABYTE

if TYPE_CHECKING:
    from edgediff.plan.weight_search import WeightSearch


def search_tables(search: "WeightSearch") -> list[Table]:
    """The frontier, and the plan by component."""
    frontier = Table(
        box=box.SIMPLE_HEAD,
        title=f"{search.plan.model} for {search.target}: what each size of the weights keeps",
        caption=f"PSNR: of final latents and pictures, the lower, against the weights as they are; {search.runs}",
    )
    for name in ("MB", "of all", "expected dB", "measured dB"):
        frontier.add_column(name, justify="right", no_wrap=True)
    for point in search.frontier:
        frontier.add_row(
            f"{point.nbytes / MEGABYTE:.2f}", f"{point.nbytes / search.whole:.1%}", f"{point.expected_db:.1f}",
            f"{point.measured_db:.1f}", style="bold green" if point.count == search.chosen.count else None,
        )  # fmt: skip
    plan = Table(box=box.SIMPLE_HEAD, title="the plan: millions of elements in each format")
    forms = sorted(
        {form for counts in search.elements.values() for form in counts}, key=lambda form: -BITS.get(form, 99)
    )
    plan.add_column("component")
    for form in forms:
        plan.add_column(form, justify="right", no_wrap=True)
    for component, counts in search.elements.items():
        plan.add_row(component, *(f"{counts[form] / 1e6:.3f}" if form in counts else "" for form in forms))
    return [frontier, plan]
