"""A search for formats on disk: the plan of weights, all that was found, and the frontier as a picture."""

import json
from pathlib import Path

import msgspec

from edgediff.outputs import make_figure, mark_limit, open_frame, save_figure, write_whole
from edgediff.plan.plan_files import BEST, CHOSEN, DPI, INK, SIZE
from edgediff.plan.weight_search import MEGABYTE, WeightSearch

PLAN, FOUND, PICTURE = "weights.json", "search.json", "frontier.png"


def write_search(search: WeightSearch, folder: Path) -> dict[str, Path]:
    """Writes ``plan``, which `--weights` takes, ``search`` and ``figure``, each whole or as it was."""
    files = {"plan": folder / PLAN, "search": folder / FOUND, "figure": folder / PICTURE}
    plan = msgspec.json.format(msgspec.json.encode(search.plan), indent=1) + b"\n"
    found = json.dumps(search.to_dict(), indent=1) + "\n"
    write_whole(files["plan"], lambda path: path.write_bytes(plan))
    write_whole(files["search"], lambda path: path.write_text(found, encoding="utf-8"))
    write_whole(files["figure"], lambda path: draw_sizes(search, path))
    return files


def draw_sizes(search: WeightSearch, path: Path) -> None:
    """Draws what each size of the weights keeps of the pictures, as PNG."""
    figure = make_figure(*SIZE, DPI)
    axes = figure.add_subplot()
    points = search.frontier
    sizes = [point.nbytes / MEGABYTE for point in points]
    axes.plot(sizes, [p.measured_db for p in points], "o-", color=BEST, markersize=4.5, linewidth=1.6, label="measured")
    axes.plot(sizes, [p.expected_db for p in points], "x", color=BEST, alpha=0.7, markersize=5, label="expected")
    chosen = search.chosen
    ring = {"markersize": 16, "markerfacecolor": "none", "markeredgecolor": CHOSEN, "markeredgewidth": 2}
    axes.plot([chosen.nbytes / MEGABYTE], [chosen.measured_db], "o", **ring, linestyle="none", label="the plan")
    if search.floor_db is not None:
        axes.axhline(
            search.floor_db, color="#c2571a", linewidth=1, linestyle="--", label=f"floor {search.floor_db:g} dB"
        )
    if search.size_mb is not None:
        mark_limit(axes, search.size_mb, f"limit {search.size_mb:g} MB")
    axes.set_xlabel("all weights of the pipeline, MB")
    axes.set_ylabel("PSNR of latents and pictures, the lower, dB")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    open_frame(axes)
    axes.legend(fontsize=8, frameon=False, loc="best")
    figure.suptitle(
        f"{search.plan.model} for {search.target}: {search.runs}\nplan: {chosen.nbytes / MEGABYTE:.2f} of "
        f"{search.whole / MEGABYTE:.2f} MB, {chosen.measured_db:.1f} dB",
        color=INK,
        fontsize=10.5,
    )
    save_figure(figure, path)
