"""The tables of ``edgediff evaluate``; nothing here prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from edgediff.evaluate.report import Closeness, Distances, Evaluation, Recognised, Retrieval, SpectrumReport


def distance_tables(found: "Evaluation") -> list[Table]:
    """Distances by clock, below those of photographs; with training photographs, also how near images come to those."""
    return [_distances(found), *([] if found.yardstick is None else [_closeness(found)])]


def _distances(found: "Evaluation") -> Table:
    of = "in each set" if found.yardstick is None else f"against {found.num_reference} photographs held out"
    table = Table(
        title=f"{found.model}, distances from photographs: {found.num_images} images {of}, "
        f"{found.num_inference_steps} steps of {found.scheduler}, guidance {found.guidance_scale:g}, {found.backend}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("clock")
    names = ["kernel\nx1000", "Frechet", "precision", "recall", "spectrum\nerror", "top\noctaves"]
    for name in (*names, *(["ratio to\nclock 1"] if len(found.rows) > 1 else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("photographs", *_numbers(found.floor), *(["-"] if len(found.rows) > 1 else []))
    for row in found.rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.clock, *_numbers(row.distances), *([ratio] if len(found.rows) > 1 else []))
    if found.yardstick is None:
        table.caption = f"photographs: {found.num_floor} others of the folder's {found.available}"
    else:
        table.caption = f"photographs: {found.num_floor} of the {found.yardstick.available} training ones"
    if found.accuracy is not None:
        table.caption += f"; the classifier names {found.accuracy:.1%} of those held out"
    if found.num_equal < max(found.num_images, found.num_reference):
        table.caption += f"; Frechet, precision and recall of {found.num_equal} images a set"
    if found.num_equal <= found.num_features:
        table.caption += f"; Frechet says little where there are no more images than features ({found.num_features})"
    return table


def _numbers(distances: "Distances") -> tuple[str, ...]:
    return (
        f"{1e3 * distances.kernel_distance:.1f} +- {1e3 * distances.kernel_spread:.1f}",
        f"{distances.frechet_distance:.2f}",
        f"{distances.precision:.2f}",
        f"{distances.recall:.2f}",
        f"{distances.spectrum_error:.3f}",
        f"{distances.spectrum_error_top:.3f}",
    )


def _closeness(found: "Evaluation") -> Table:
    assert found.yardstick is not None
    table = Table(
        title=f"distance to the nearest of {found.yardstick.available} training photographs, 8-bit levels",
        caption=f"nearer: as near as {found.yardstick.threshold:.1f}, where the nearest 1 % of the photographs held "
        "out are; far more of a model's images there would be copies",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("images")
    for name in ("median", "5 % below", "nearer"):
        table.add_column(name, justify="right")
    table.add_row("photographs held out", *_near(found.yardstick.held_out))
    for row in found.rows:
        if row.closeness is not None:
            table.add_row(f"clock {row.clock}", *_near(row.closeness))
    return table


def _near(closeness: "Closeness") -> tuple[str, str, str]:
    return f"{closeness.median:.1f}", f"{closeness.quantile_5:.1f}", f"{closeness.share_nearer:.1%}"


def retrieval_tables(found: "Retrieval") -> list[Table]:
    """What the classifier recognises, by split and clock, and how far the pictures are from the real drawings."""
    recognised = Table(
        title=f"{found.model}, is it the thing asked for: {found.num_inference_steps} steps of {found.scheduler}, "
        f"guidance {found.guidance_scale:g}, {found.backend}",
        caption=f"% of the pictures, among {found.num_labels} things; drawings: the real ones of the same prompts",
        box=box.SIMPLE_HEAD,
    )
    distances = Table(
        title="distance from the real drawings of the same prompts",
        caption=f"nearest: median distance to {found.num_train} training drawings, 8-bit levels",
        box=box.SIMPLE_HEAD,
    )
    if found.threshold is not None and distances.caption is not None:
        distances.caption += f"; copies: as near as {found.threshold:.1f}, where the nearest 1 % of those held out are"
    for table, names in (
        (recognised, ("top 1", "top 5", "style")),
        (distances, ("kernel\nx1000", "spectrum\nerror", "top\noctaves", "nearest", "copies")),
    ):
        table.add_column("prompts", no_wrap=True)
        table.add_column("clock")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
    for asked in found.asked:
        name = f"{len(asked.prompts)} {asked.split}"
        recognised.add_row(name, "drawings", *_shares(asked.drawings))
        for row in found.rows:
            if row.split == asked.split:
                recognised.add_row("", row.clock, *_shares(row.found))
                kernel, _, _, _, *spectrum = _numbers(row.distances)
                distances.add_row(name, row.clock, kernel, *spectrum, *_nearest(row.nearest))
    if found.held_out is not None:
        distances.add_row("all test", "drawings", "-", "-", "-", *_nearest(found.held_out))
    return [recognised, distances]


def _shares(found: "Recognised") -> tuple[str, str, str]:
    style = "-" if found.style is None else f"{found.style:.1%}"
    return (
        f"{100 * found.top_1:.1f} +- {100 * found.top_1_spread:.1f}",
        f"{100 * found.top_5:.1f} +- {100 * found.top_5_spread:.1f}",
        style,
    )


def _nearest(closeness: "Closeness | None") -> tuple[str, str]:
    return ("-", "-") if closeness is None else (f"{closeness.median:.1f}", f"{closeness.share_nearer:.1%}")


def spectrum_tables(found: "SpectrumReport") -> list[Table]:
    """Power, gains and errors by octave."""
    spectra, denoising = found.spectra, found.denoising
    count = len(denoising.timesteps)
    times = sorted({0, count // 2, count - 1})
    table = Table(
        title=f"{found.model} by frequency: {found.num_images} images, {found.num_inference_steps} steps of "
        f"{found.scheduler}, guidance {found.guidance_scale:g}",
        caption=f"spectrum error {spectra.error:.3f}, top two octaves {spectra.error_top:.3f} (mean of |log10 power|); "
        "gain: of the guess on the noisy image/Wiener's; error: of the guess over the photographs' power; "
        f"{denoising.num_images} of {found.available} photographs noised",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("cycles\nper image", no_wrap=True)
    table.add_column("log10\npower", justify="right", no_wrap=True)
    for k in times:
        table.add_column(f"gain\nt = {denoising.timesteps[k]}", justify="right", no_wrap=True)
    for k in times:
        table.add_column(f"error\nt = {denoising.timesteps[k]}", justify="right", no_wrap=True)
    low = 1
    while low < len(spectra.gap):
        of = slice(low, min(2 * low, len(spectra.gap)))
        cells = [f"{_mean(denoising.response[k][of]):.2f}/{_mean(denoising.wiener[k][of]):.2f}" for k in times]
        errors = [f"{_mean(denoising.error[k][of]):.2f}" for k in times]
        name = str(low) if of.stop == low + 1 else f"{low} to {of.stop - 1}"
        table.add_row(name, f"{_mean(spectra.gap[of]):+.2f}", *cells, *errors)
        low *= 2
    return [table]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
