"""A model by frequency on one page: what it makes, how it denoises, and what its gates let pass."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.evaluate.spectra import top_octaves
from edgediff.evaluate.spectrum_report import GateCurves, SpectrumReport

INK, SOFT, REAL, MADE, BAD = "#222222", "#8a8a8a", "#222222", "#1f5fa8", "#b03a2e"
BAND_COLOURS = {"LL": "#222222", "LH": "#1f5fa8", "HL": "#c2571a", "HH": "#1a7f37"}
WIDTH, HEIGHT, DPI = 15.0, 4.6, 120
# Time steps whose response is drawn as a curve.
CURVES = 5
GATES_IN_A_LINE = 6


def draw_overview(
    report: SpectrumReport, generated: NDArray[np.uint8], photographs: NDArray[np.uint8], path: Path
) -> None:
    """Draws the page.

    Args:
        report: The numbers.
        generated: uint8 [S, H, W, 3], some of the generated images.
        photographs: uint8 [S, H, W, 3], some photographs.
        path: Where the PNG is to be.
    """
    # The Agg backend by name: no display is asked for, and no global setting changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    denoising = report.denoising
    maps: list[Callable[[Any], None]] = [lambda axes: _draw_error(axes, report, denoising.error, "error of the guess")]
    if denoising.teacher_gap is not None:
        gap, what = denoising.teacher_gap, f"gap to {report.teacher}"
        maps.append(lambda axes: _draw_error(axes, report, gap, what))
    gates = report.gates or ()
    lines = [gates[i : i + GATES_IN_A_LINE] for i in range(0, len(gates), GATES_IN_A_LINE)]
    wide = len(maps) > 1
    figure = Figure(figsize=(WIDTH + 4.5 * wide, 2 * HEIGHT + 3.2 * len(lines)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subfigures(2 + len(lines), 1, height_ratios=[HEIGHT, HEIGHT, *[3.2] * len(lines)], squeeze=False)
    above = rows[0, 0].subplots(1, 3, width_ratios=(1, 1, 1.15))
    _draw_power(above[0], report)
    _draw_gap(above[1], report)
    _draw_images(above[2], generated, photographs)
    below = rows[1, 0].subplots(1, 2 + len(maps))
    _draw_curves(below[0], report)
    _draw_departure(below[1], report)
    for axes, draw in zip(below[2:], maps, strict=True):
        draw(axes)
    for row, line in zip(rows[2:, 0], lines, strict=True):
        _draw_gates(row.subplots(1, GATES_IN_A_LINE if len(lines) > 1 else len(line), squeeze=False)[0], line, report)
    spectra = report.spectra
    figure.suptitle(
        f"{report.model} by frequency: {report.num_images} images, {report.num_inference_steps} steps of "
        f"{report.scheduler}, guidance {report.guidance_scale:g};  {report.available} photographs, "
        f"{denoising.num_images} of them noised\nspectrum error {spectra.error:.3f}, top two octaves "
        f"{spectra.error_top:.3f};  mean departure from Wiener's gain {denoising.response_error:.3f}",
        color=INK,
        fontsize=12,
    )
    figure.savefig(path, format="png", metadata={"Software": None})


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
    """The images in lines of so many, the last line white where there are none left."""
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


def _draw_departure(axes: Any, report: SpectrumReport) -> None:
    denoising = report.denoising
    apart = np.array(denoising.response) - np.array(denoising.wiener)
    limit = max(float(np.abs(apart[:, 1:]).max()), 0.05)
    _draw_map(axes, report, apart, {"cmap": "RdBu", "vmin": -limit, "vmax": limit}, "gain less Wiener's")
    _frequencies(axes, report, "response less Wiener's (red: too little)")


def _draw_error(axes: Any, report: SpectrumReport, error: Sequence[Sequence[float]], what: str) -> None:
    from matplotlib.colors import LogNorm

    values = np.maximum(np.array(error), 1e-6)
    low, high = (float(limit) for limit in np.quantile(values[:, 1:], (0, 1)))
    norm = LogNorm(low, max(high, 1.0))
    _draw_map(axes, report, values, {"cmap": "viridis", "norm": norm}, "of the photographs' power")
    _frequencies(axes, report, what)


def _draw_map(axes: Any, report: SpectrumReport, values: NDArray[np.float64], colours: Any, label: str) -> None:
    """Time steps from below to above, bands from left to right; band 0 is left out as everywhere."""
    times = np.array(report.denoising.timesteps, dtype=np.float64)
    between = (times[1:] + times[:-1]) / 2
    edges_t = np.array([2 * times[0] - between[0], *between, 2 * times[-1] - between[-1]])
    edges_f = np.arange(values.shape[1]) + 0.5
    drawn = axes.pcolormesh(edges_f, edges_t, values[:, 1:], **colours)
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.set_yticks(times, [f"{t:g}" for t in times])
    axes.set_ylabel("t: little noise below, much above")


def _frequencies(axes: Any, report: SpectrumReport, title: str) -> None:
    """Marks octaves on the axis of frequencies, and where the top two begin."""
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
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_gates(panels: Any, curves: Sequence[GateCurves], report: SpectrumReport) -> None:
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for i, (axes, curve) in enumerate(zip(panels, curves, strict=False)):
        for band, colour in BAND_COLOURS.items():
            axes.plot(report.denoising.timesteps, getattr(curve, band), "o-", color=colour, markersize=3, label=band)
        axes.set_ylim(0, 1)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_title(curve.module.removesuffix(".gate"), fontsize=9, color=INK)
        axes.set_xlabel("t", fontsize=9)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if i == 0:
            axes.set_ylabel("mean gate")
            axes.legend(frameon=False, fontsize=8, ncols=4)
