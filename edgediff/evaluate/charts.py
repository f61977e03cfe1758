"""The pictures of ``edgediff evaluate``: a model by frequency on one page, and images beside training photographs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import ConfigError
from edgediff.evaluate.frequency import top_octaves
from edgediff.evaluate.neighbours import SHOWN, Nearest
from edgediff.evaluate.report import GateCurves, SpectrumReport
from edgediff.outputs import check_drawing, check_file, make_figure, mark_limit, open_frame, save_figure

INK, SOFT, REAL, MADE, BAD = "#222222", "#8a8a8a", "#222222", "#1f5fa8", "#b03a2e"
GRID = "#e6e6e6"
SETS = ("#222222", "#1f5fa8", "#c2571a", "#1a7f37", "#7b3fa0", "#a08a1f")
BAND_COLOURS = {"LL": "#222222", "LH": "#1f5fa8", "HL": "#c2571a", "HH": "#1a7f37"}
WIDTH, HEIGHT, GATES_HEIGHT, DPI = 15.0, 4.6, 3.2, 120
# Pictures of each clock and split on a sheet, and inches.
PROMPTS_SHOWN, SHEET_COLUMNS, SHEET_WIDTH, SHEET_CELL, SHEET_TITLE = 48, 12, 12.0, 1.25, 0.4
# Of a line above a picture.
SHEET_LETTERS = 24
GRID_WIDTH, SHARES_HEIGHT, GROUP_HEIGHT, GRID_DPI = 9.0, 3.2, 2.75, 150
# Timesteps whose response is drawn as a curve.
CURVES = 5
GATES_IN_A_LINE = 6


def draw_overview(
    report: SpectrumReport, generated: NDArray[np.uint8], photographs: NDArray[np.uint8], path: Path
) -> None:
    """Draws a model by frequency as a PNG, with some of its images and photographs, both uint8 [S, H, W, 3]."""
    from matplotlib.colors import LogNorm

    denoising, spectra = report.denoising, report.spectra
    maps = [(denoising.error, "error of the guess")]
    if denoising.teacher_gap is not None:
        maps.append((denoising.teacher_gap, f"gap to {report.teacher}"))
    gates = report.gates or ()
    lines = [gates[i : i + GATES_IN_A_LINE] for i in range(0, len(gates), GATES_IN_A_LINE)]
    heights = [HEIGHT, HEIGHT, *[GATES_HEIGHT] * len(lines)]
    figure = make_figure(WIDTH + 4.5 * (len(maps) - 1), sum(heights), DPI)
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    above = rows[0].subplots(1, 3, width_ratios=(1, 1, 1.15))
    _draw_power(above[0], report)
    _draw_gap(above[1], report)
    _draw_images(above[2], generated, photographs)
    below = rows[1].subplots(1, 2 + len(maps))
    _draw_curves(below[0], report)
    apart = np.array(denoising.response) - np.array(denoising.wiener)
    limit = max(float(np.abs(apart[:, 1:]).max()), 0.05)
    title = "response less Wiener's (red: too little)"
    _draw_map(below[1], report, apart, title, "gain less Wiener's", cmap="RdBu", vmin=-limit, vmax=limit)
    for axes, (error, title) in zip(below[2:], maps, strict=True):
        values = np.maximum(np.array(error), 1e-6)
        norm = LogNorm(values[:, 1:].min(), max(values[:, 1:].max(), 1.0))
        _draw_map(axes, report, values, title, "of the photographs' power", cmap="viridis", norm=norm)
    for row, line in zip(rows[2:], lines, strict=True):
        _draw_gates(row.subplots(1, GATES_IN_A_LINE if len(lines) > 1 else len(line), squeeze=False)[0], line, report)
    figure.suptitle(
        f"{report.model} by frequency: {report.num_images} images, {report.num_inference_steps} steps of "
        f"{report.scheduler}, guidance {report.guidance_scale:g};  {report.available} photographs, "
        f"{denoising.num_images} of them noised\nspectrum error {spectra.error:.3f}, top two octaves "
        f"{spectra.error_top:.3f};  mean departure from Wiener's gain {denoising.response_error:.3f}",
        color=INK,
        fontsize=12,
    )
    save_figure(figure, path)


def _draw_power(axes: Any, report: SpectrumReport) -> None:
    spectra = report.spectra
    at = np.arange(1, len(spectra.gap))
    axes.plot(at, spectra.photographs[1:], color=REAL, linewidth=2, label="photographs")
    axes.plot(at, spectra.generated[1:], color=MADE, linewidth=2, linestyle=(0, (4, 1.5)), label="generated")
    axes.set_yscale("log")
    axes.set_ylabel("power of a coefficient")
    axes.legend(frameon=False, fontsize=9)
    _frequencies(axes, report, "power by frequency")


def _draw_gap(axes: Any, report: SpectrumReport) -> None:
    gap = np.array(report.spectra.gap[1:])
    at = np.arange(1, len(gap) + 1)
    axes.axhline(0, color=REAL, linewidth=1)
    # Finely, so that the areas end where the line crosses zero: it is straight on the logarithmic axis alone.
    fine = np.geomspace(1, at[-1], 50 * len(at))
    between = np.interp(np.log(fine), np.log(at), gap)
    for area, colour in ((np.minimum(between, 0), BAD), (np.maximum(between, 0), MADE)):
        axes.fill_between(fine, area, 0, color=colour, alpha=0.35, linewidth=0)
    axes.plot(at, gap, color=INK, linewidth=1.6)
    limit = max(1.15 * np.abs(gap).max(), 0.12)
    axes.set_ylim(-limit, limit)
    axes.set_ylabel("log10 of power, generated over photographs")
    for height, words, where in ((0.97, "too much", "top"), (0.03, "too little", "bottom")):
        axes.text(0.02, height, words, transform=axes.transAxes, va=where, fontsize=8.5, color=SOFT)
    _frequencies(axes, report, "what generated images lack or have too much of")


def _draw_images(axes: Any, generated: NDArray[np.uint8], photographs: NDArray[np.uint8]) -> None:
    count = min(len(generated), len(photographs))
    columns = max(int(np.ceil(np.sqrt(count))) - 1, 1)
    halves = [_tiles(images[:count], columns) for images in (generated, photographs)]
    between = np.full((len(halves[0]), halves[0].shape[1] // 12, 3), 255, np.uint8)
    axes.imshow(np.concatenate([halves[0], between, halves[1]], axis=1), interpolation="nearest")
    width, gap = halves[0].shape[1], between.shape[1]
    for at, words in ((width / 2, "generated"), (1.5 * width + gap, "photographs")):
        axes.text(at, -0.01 * len(halves[0]), words, ha="center", va="bottom", fontsize=10.5, color=INK)
    axes.set_axis_off()


def _tiles(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The images in lines of `columns`, the last line filled up with white."""
    count, height, width, channels = images.shape
    missing = np.full((-count % columns, height, width, channels), 255, np.uint8)
    lines = np.concatenate([images, missing]).reshape(-1, columns, height, width, channels)
    return lines.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, channels)


def _draw_curves(axes: Any, report: SpectrumReport) -> None:
    from matplotlib import colormaps

    denoising = report.denoising
    times = len(denoising.timesteps)
    chosen = np.unique(np.linspace(0, times - 1, min(CURVES, times)).round().astype(int))
    colours = colormaps["plasma"](np.linspace(0.0, 0.85, len(chosen)))
    for k, colour in zip(chosen, colours, strict=True):
        at = np.arange(1, len(denoising.response[k]))
        axes.plot(at, denoising.response[k][1:], color=colour, linewidth=1.8, label=f"t = {denoising.timesteps[k]}")
        axes.plot(at, denoising.wiener[k][1:], color=colour, linewidth=1.2, linestyle=(0, (2, 1.5)))
    axes.plot([], [], color=SOFT, linewidth=1.2, linestyle=(0, (2, 1.5)), label="Wiener's")
    axes.set_ylabel("gain of the guess on the noisy image")
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, loc="upper right")
    _frequencies(axes, report, "response of the denoiser, and Wiener's")


def _draw_map(
    axes: Any, report: SpectrumReport, values: NDArray[np.float64], title: str, label: str, **colours: Any
) -> None:
    """Time steps from below to above, bands from left to right without band 0."""
    times = np.array(report.denoising.timesteps, dtype=np.float64)
    # A schedule may have a single timestep.
    between = (times[1:] + times[:-1]) / 2 if len(times) > 1 else times + 0.5
    edges_t = np.array([2 * times[0] - between[0], *between[: len(times) - 1], 2 * times[-1] - between[-1]])
    edges_f = np.arange(values.shape[1]) + 0.5
    drawn = axes.pcolormesh(edges_f, edges_t, values[:, 1:], **colours)
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.set_yticks(times, [f"{t:g}" for t in times])
    axes.set_ylabel("t: little noise below, much above")
    _frequencies(axes, report, title)


def _frequencies(axes: Any, report: SpectrumReport, title: str) -> None:
    """The axis of frequencies: octaves, and where the top two begin."""
    last, nyquist = len(report.spectra.gap) - 1, report.size / 2
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.5 if axes.collections and not axes.lines else 1, last + 0.5)
    ticks = [2**k for k in range(int(np.log2(last)) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    top = top_octaves(report.size) - 0.5
    axes.axvline(top, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axvline(nyquist, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlabel(f"cycles per image (top octaves from {top_octaves(report.size)}, Nyquist {nyquist:g})", fontsize=9)
    axes.set_title(title, fontsize=10.5, color=INK)
    axes.tick_params(labelsize=8.5)
    axes.set_axisbelow(True)
    open_frame(axes)


def _draw_gates(panels: Any, curves: Sequence[GateCurves], report: SpectrumReport) -> None:
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for i, (axes, curve) in enumerate(zip(panels, curves, strict=False)):
        for band, colour in BAND_COLOURS.items():
            axes.plot(report.denoising.timesteps, getattr(curve, band), "o-", color=colour, markersize=3, label=band)
        axes.set_ylim(0, 1)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_title(curve.module.removesuffix(".gate"), fontsize=9, color=INK)
        axes.set_xlabel("t", fontsize=9)
        axes.tick_params(labelsize=8)
        open_frame(axes)
        if i == 0:
            axes.set_ylabel("mean gate")
            axes.legend(frameon=False, fontsize=8, ncols=4)


def check_grid(path: Path) -> None:
    """Refuses to begin what could not be drawn there at its end.

    Raises:
        ConfigError: It is no .png.
        MissingExtraError: matplotlib is missing.
        TargetError: It could not be written.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"the grid is a picture; expected a name that ends in .png, not {path}")
    check_file(path)
    check_drawing("the grid")


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures, uint8 [N, H, W, 3], with words above each."""

    title: str
    pictures: NDArray[np.uint8]
    words: Sequence[str]


def draw_sheets(sheets: Sequence[Sheet], model: str, path: Path) -> None:
    """Draws sheets of pictures below one another, as a PNG."""
    lines = [-(-len(sheet.pictures) // SHEET_COLUMNS) for sheet in sheets]
    figure = make_figure(SHEET_WIDTH, sum(SHEET_CELL * count + SHEET_TITLE for count in lines), GRID_DPI)
    parts: Any = figure.subfigures(len(sheets), 1, height_ratios=lines, squeeze=False)[:, 0]
    for part, sheet, count in zip(parts, sheets, lines, strict=True):
        part.suptitle(sheet.title, fontsize=9, color=INK)
        axes = part.subplots(count, SHEET_COLUMNS, squeeze=False)
        for each in axes.flat:
            each.set_axis_off()
        for each, picture, words in zip(axes.flat, sheet.pictures, sheet.words, strict=False):
            each.imshow(picture, interpolation="nearest")
            title = "\n".join(fill(line, SHEET_LETTERS) for line in words.split("\n"))
            each.set_title(title, fontsize=5.5, color=BAD if "\n" in words else SOFT, pad=2)
    figure.suptitle(model, fontsize=11, color=INK)
    save_figure(figure, path)


@dataclass(frozen=True, eq=False)
class Group:
    """A set whose nearest images are drawn: `images`, uint8 [S, H, W, 3], are its suspects, `nearest` is of all."""

    name: str
    images: NDArray[np.uint8]
    nearest: Nearest


def draw_suspects(groups: Sequence[Group], train: NDArray[np.uint8], threshold: float, model: str, path: Path) -> None:
    """Draws, as a PNG, how near each set comes to the training photographs, and its nearest images above those.

    Args:
        groups: The sets; the first is the photographs held out.
        train: uint8 [T, H, W, 3].
        threshold: The nearest 1 % of the photographs held out are as near as this, in 8-bit levels.
    """
    heights = [SHARES_HEIGHT, *[GROUP_HEIGHT] * len(groups)]
    figure = make_figure(GRID_WIDTH, sum(heights), GRID_DPI)
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_shares(rows[0].subplots(), groups, threshold)
    for row, group in zip(rows[1:], groups, strict=True):
        row.suptitle(f"{group.name}: the nearest images, and below them the training photographs", fontsize=9)
        axes = row.subplots(2, SHOWN, squeeze=False)
        for each in axes.flat:
            each.set_axis_off()
        for (above, below), image, suspect in zip(axes.T, group.images, group.nearest.suspects(), strict=False):
            photograph = train[suspect.neighbour]
            above.imshow(image, interpolation="nearest")
            below.imshow(photograph[:, ::-1] if suspect.mirrored else photograph, interpolation="nearest")
            colour = BAD if suspect.distance <= threshold else SOFT
            above.set_title(f"{suspect.distance:.1f}", fontsize=8, color=colour, pad=2)
    figure.suptitle(f"{model}: distance to the nearest training photograph", fontsize=11, color=INK)
    save_figure(figure, path)


def _draw_shares(axes: Any, groups: Sequence[Group], threshold: float) -> None:
    for group, colour in zip(groups, SETS * len(groups), strict=False):
        distance = np.sort(group.nearest.distance)
        share = np.arange(1, len(distance) + 1) / len(distance)
        style = "--" if group is groups[0] else "-"
        axes.plot(distance, 100 * share, style, color=colour, linewidth=1.6, label=f"{group.name}, {len(distance)}")
    mark_limit(axes, threshold, "1 % of those held out")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel("root mean squared difference to the nearest training photograph, 8-bit levels", fontsize=9)
    axes.set_ylabel("share that is nearer, %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    open_frame(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
