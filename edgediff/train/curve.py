"""The loss curve of a training, as a picture."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgediff.errors import MissingExtraError
from edgediff.train.settings import AdaptorTraining


def check_drawing() -> None:
    """Refuses to begin what could not be drawn at its end.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("drawing the loss curve", "train")


def draw_losses(losses: list[float], settings: AdaptorTraining, path: Path) -> None:
    """Draws the losses of a training.

    Args:
        losses: One for each update, relative to the identity's.
        settings: What was trained.
        path: A ``.png``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    updates = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 100)
    axes.plot(updates, losses, color="#9db4c8", linewidth=0.6, label="each update")
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(updates[window - 1 :], mean, color="#1f4e79", linewidth=1.6, label=f"mean of {window}")
    axes.axhline(1.0, color="#b03a2e", linewidth=1, linestyle="--", label="the identity adaptor")
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel("loss, relative to the identity's")
    axes.set_title(
        f"{settings.adaptor} adaptor, {settings.steps} steps of {settings.scheduler}, clock {settings.clock}, "
        f"{settings.rollout} rollout",
        fontsize=10,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
