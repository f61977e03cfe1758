"""The images that come nearest to training photographs, as a picture beside those: what numbers cannot show."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import ConfigError, TargetError
from edgediff.evaluate.neighbours import Nearest
from edgediff.evaluate.report import Suspect
from edgediff.outputs import check_drawing

SHOWN = 8
INK, SOFT = "#222222", "#8a8a8a"
LINES = ("#222222", "#1f5fa8", "#c2571a", "#1a7f37", "#7b3fa0", "#a08a1f")
WIDTH, DPI = 9.0, 150


@dataclass(frozen=True, eq=False)
class Group:
    """A set whose nearest images are shown.

    Attributes:
        name: What it is.
        images: uint8 [S, H, W, 3], its suspects.
        suspects: Where each of those is nearest.
        distance: float64 [N], of the whole set.
    """

    name: str
    images: NDArray[np.uint8]
    suspects: Sequence[Suspect]
    distance: NDArray[np.float64]


def most_suspicious(nearest: Nearest) -> tuple[Suspect, ...]:
    """The images that are nearest to a training photograph.

    Args:
        nearest: Of a set.

    Returns:
        The nearest few, the nearest first.
    """
    first = np.argsort(nearest.distance, kind="stable")[:SHOWN]
    return tuple(
        Suspect(int(i), float(nearest.distance[i]), int(nearest.index[i]), bool(nearest.mirrored[i])) for i in first
    )


def check_picture(path: Path, train: str | Path | None) -> None:
    """Refuses to begin where the picture could not be drawn.

    Args:
        path: Where it is to be.
        train: The training photographs that it shows.

    Raises:
        ConfigError: No training photographs were named, or it is to be no PNG.
        MissingExtraError: matplotlib is not installed.
        TargetError: There is no such folder, or it cannot be written.
    """
    if train is None:
        raise ConfigError("the grid shows the nearest training photographs; name their folder: --train DIR")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"the grid is a picture; expected a name that ends in .png, not {path}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise TargetError(f"cannot write {path}: {path.parent} is not a folder that can be written")
    check_drawing("the grid")


def draw_suspects(groups: Sequence[Group], train: NDArray[np.uint8], threshold: float, model: str, path: Path) -> None:
    """Draws how near each set comes, and its nearest images above the training photographs that they are near to.

    Args:
        groups: The sets; the first is the yardstick.
        train: uint8 [T, H, W, 3].
        threshold: What only 1 % of the yardstick is as near as, in steps of 8 bits.
        model: What made the images.
        path: A ``.png``.
    """
    # The Agg backend by name: no display is asked for, and no global setting changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.2 + 2.75 * len(groups)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subfigures(1 + len(groups), 1, height_ratios=[3.2, *[2.75] * len(groups)])
    _draw_shares(rows[0].subplots(), groups, threshold)
    for row, group in zip(rows[1:], groups, strict=True):
        row.suptitle(f"{group.name}: the nearest images, and below them the training photographs", fontsize=9)
        axes = row.subplots(2, SHOWN, squeeze=False)
        for each in axes.flat:
            each.set_axis_off()
        for (above, below), image, suspect in zip(axes.T, group.images, group.suspects, strict=False):
            photograph = train[suspect.neighbour]
            above.imshow(image, interpolation="nearest")
            below.imshow(photograph[:, ::-1] if suspect.mirrored else photograph, interpolation="nearest")
            colour = "#b03a2e" if suspect.distance <= threshold else SOFT
            above.set_title(f"{suspect.distance:.1f}", fontsize=8, color=colour, pad=2)
    figure.suptitle(f"{model}: distance to the nearest training photograph", fontsize=11, color=INK)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_shares(axes: Any, groups: Sequence[Group], threshold: float) -> None:
    """Which share of each set is nearer than a distance."""
    for group, colour in zip(groups, LINES * len(groups), strict=False):
        distance = np.sort(group.distance)
        share = np.arange(1, len(distance) + 1) / len(distance)
        style = "--" if group is groups[0] else "-"
        axes.plot(distance, 100 * share, style, color=colour, linewidth=1.6, label=f"{group.name}, {len(distance)}")
    axes.axvline(threshold, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "1 % of those held out", (threshold, 1), (-4, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", rotation=90, ha="right", va="top", fontsize=7.5, color=SOFT,
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel("root mean squared difference to the nearest training photograph, steps of 8 bits", fontsize=9)
    axes.set_ylabel("share that is nearer, %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
