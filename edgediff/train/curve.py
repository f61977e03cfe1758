"""The loss curves of a training, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# Dark enough for the mean; what each update gave is drawn lighter in the same colour.
COLOURS = ("#1f4e79", "#2e7d32", "#b9770e", "#7d3c98")


def draw_losses(
    curves: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    what: str,
    *,
    level: tuple[float, str] | None = None,
    points: tuple[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Draws the losses of a training.

    Args:
        curves: One loss for each update, by name.
        path: A ``.png``.
        title: Over the picture.
        what: Beside the losses' axis.
        level: A horizontal line and its name.
        points: Name, then update and loss of each point of a curve that is measured now and then.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, losses), colour in zip(curves.items(), COLOURS, strict=False):
        updates = np.arange(1, len(losses) + 1)
        window = max(1, len(losses) // 100)
        single = window == 1
        axes.plot(
            updates, losses, color=colour, alpha=1 if single else 0.25, linewidth=0.6, label=name if single else None
        )
        if not single:
            mean = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(updates[window - 1 :], mean, color=colour, linewidth=1.6, label=f"{name}, mean of {window}")
    if points is not None and points[1]:
        axes.plot(*zip(*points[1], strict=True), "o-", color="#b03a2e", markersize=3, linewidth=1, label=points[0])
    if level is not None:
        axes.axhline(level[0], color="#b03a2e", linewidth=1, linestyle="--", label=level[1])
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel(what)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
