"""A plan on disk: frontier.png, plan.json and recipe.yaml in one folder, each whole or as it was.

The recipe is the bundle's own with steps and clock replaced. It is written without a YAML library, which the light
install does not have: each key on a line of its own, its value as JSON, which YAML reads alike.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgediff.bundle.staging import check_outside
from edgediff.errors import ConfigError, TargetError
from edgediff.export.export_config import ExportConfig, check_config, config_from
from edgediff.outputs import check_drawing, check_folder, make_figure, mark_limit, open_frame, save_figure, write_whole
from edgediff.plan.trajectory import Mask, psnr_db
from edgediff.targets import TARGETS
from edgediff_runtime import Manifest
from edgediff_runtime.clock import format_mask, letters
from edgediff_runtime.schedulers import steps_of

if TYPE_CHECKING:
    from edgediff.plan.planner import Plan, Point
    from edgediff.plan.trajectory import Trajectories

FIGURE, PLAN, RECIPE = "frontier.png", "plan.json", "recipe.yaml"
INK, SOFT, BEST, UNIFORM, CHOSEN = "#222222", "#8a8a8a", "#1f5fa8", "#c2571a", "#1a7f37"
SIZE, DPI = (8.0, 5.0), 150
# Uniform clocks that get their name: those of longer periods crowd together at the cheap end.
NAMED = 5


def check_place(folder: Path, bundle: Path) -> None:
    """Refuses a folder that could not be written, before anything is measured.

    Raises:
        TargetError: It is no folder, cannot be written, or is in a bundle.
        MissingExtraError: matplotlib is not installed.
    """
    check_drawing("the plan's picture")
    check_folder(folder)
    check_outside(folder, bundle)


def check_replaced(folder: Path, search: dict[str, Any]) -> None:
    """Refuses to replace files of a folder that are not the plan of the same search (`planner.search_of`).

    Raises:
        TargetError: There are such files.
    """
    there = [name for name in (FIGURE, PLAN, RECIPE) if (folder / name).exists()]
    try:
        found = json.loads((folder / PLAN).read_bytes())
        same = {key: found.get(key) for key in search} == search
    except (OSError, ValueError, AttributeError, RecursionError):  # no plan.json, or one that is no plan's
        same = False
    if there and not same:
        raise TargetError(
            f"{folder} contains {there[0]} of other settings; pass --force to replace it, or choose another output"
        )


def write_plan(plan: "Plan", folder: Path) -> dict[str, Path]:
    """Writes a plan as the files ``figure``, ``plan`` and ``recipe``; other files of the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen, images = plan.chosen, plan.images
    own = plan.manifest.operating_point.guidance_scale
    whole = (True,) * images.start + chosen.mask
    config = plan_recipe(plan.manifest, whole, None if images.guidance_scale == own else images.guidance_scale)
    comment = (
        f"{plan.manifest.source.name}, planned for a budget of {plan.budget:g} of clock 1's {plan.cost.unit}: "
        f"{chosen.cost:.1%}, error {chosen.error:.3g} ({images.num_images} images, seed {images.seed})."
        + ("" if images.edits is None else f" For edits at strength {images.edits.strength:g}: its last steps run.")
    )
    recipe = render_recipe(config, comment)
    data = json.dumps(plan.to_dict(), indent=1) + "\n"
    files = {"figure": folder / FIGURE, "plan": folder / PLAN, "recipe": folder / RECIPE}
    write_whole(files["figure"], lambda path: draw_frontier(plan, path))
    write_whole(files["plan"], lambda path: path.write_text(data, encoding="utf-8"))
    write_whole(files["recipe"], lambda path: path.write_text(recipe, encoding="utf-8"))
    return files


def plan_recipe(manifest: Manifest, mask: Mask, guidance_scale: float | None) -> ExportConfig:
    """Puts a mask, and a guidance scale where it is given, into the recipe that a bundle was made by.

    ConfigError: this version cannot read the bundle's recipe.
    """
    source, adaptor = manifest.source, manifest.adaptor
    data: dict[str, Any] = json.loads(json.dumps(manifest.config))
    data |= {
        "model": source.name if source.path is None else source.path,
        "random_weights": None if source.random_weights is None else int(source.random_weights),
        "seed": int(data.get("seed", 0)),
        # By name: a recipe that leaves it open takes another for another clock, and this one was measured.
        "adaptor": "identity" if adaptor.kind == "identity" else adaptor.path or adaptor.name,
        "steps": steps_of(manifest.scheduler.name, len(mask)),
        "clock": format_mask(mask),
    }
    if guidance_scale is not None:
        data["guidance_scale"] = guidance_scale
    if all(mask):
        # No cached step could verify the cached graph of a pair, and none would run it.
        data["layout"] = "split"
        for target in TARGETS:
            data[target] = {**data.get(target, {}), "layout": None}
    try:
        return check_config(config_from(data))
    except ConfigError as e:
        raise ConfigError(f"the recipe in the bundle's manifest cannot be used again: {e}") from e


def render_recipe(config: ExportConfig, comment: str) -> str:
    """Writes a recipe as `edgediff.load_config` reads it, below a comment; what is None is left out."""
    data = _present(msgspec.to_builtins(config))
    return "".join([f"# {comment}\n", *(f"{key}: {_format(value)}\n" for key, value in data.items())])


def _present(data: dict[str, Any]) -> dict[str, Any]:
    present = {key: _present(value) if isinstance(value, dict) else value for key, value in data.items()}
    return {key: value for key, value in present.items() if value is not None and value != {}}


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_format(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format(inner) for inner in value) + "]"
    if isinstance(value, float):
        # YAML 1.1 takes 1e-05 for text: its numbers have a point.
        digits, e, power = repr(value).partition("e")
        return f"{digits}{'' if '.' in digits else '.0'}{e}{power}"
    return json.dumps(value)


def draw_frontier(plan: "Plan", path: Path) -> None:
    """Draws what each number of cached steps costs and how near its best mask stays to clock 1, as PNG."""
    figure = make_figure(*SIZE, DPI)
    axes = figure.add_subplot()
    points = [point for point in plan.frontier if point.error > 0]
    if points:
        _draw_points(axes, plan, points)
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
    open_frame(axes)
    images, manifest = plan.images, plan.manifest
    figure.suptitle(
        f"{manifest.source.name}: {images.steps} steps of {manifest.scheduler.name}, guidance "
        f"{images.guidance_scale:g}, {edited(images)}{images.num_images} images\n"
        f"plan: {letters(plan.chosen.mask)} (F full, c cached), {plan.chosen.cost:.1%} of clock 1's cost",
        color=INK,
        fontsize=10.5,
    )
    save_figure(figure, path)


def edited(images: "Trajectories") -> str:
    """What a title says of edits; nothing where images are drawn from noise."""
    return "" if images.edits is None else f"edits at strength {images.edits.strength:g}, "


def _draw_points(axes: Any, plan: "Plan", points: "list[Point]") -> None:
    line = {"markersize": 4.5, "linewidth": 1.6, "color": BEST, "zorder": 3}
    axes.plot(*_at(points), "o-", **line, label="best mask for its cost, measured")
    expected = [point for point in points if point.expected > 0]
    axes.plot(*_at(expected, "expected"), "x", markersize=5, color=BEST, alpha=0.7, label="the same, as expected")
    uniform = {period: point for period, point in plan.uniform.items() if point.error > 0}
    axes.plot(*_at(list(uniform.values())), "s", markersize=7, color=UNIFORM, zorder=2, label="uniform clocks")
    for period in list(uniform)[:NAMED]:
        where = (100 * uniform[period].cost, psnr_db(uniform[period].error))
        axes.annotate(f"clock {period}", where, (9, -4), textcoords="offset points", fontsize=8, color=UNIFORM)
    mark_limit(axes, 100 * plan.budget, f"budget {100 * plan.budget:g} %")
    if plan.chosen.error > 0:
        ring = {"markersize": 16, "markerfacecolor": "none", "markeredgecolor": CHOSEN, "markeredgewidth": 2}
        axes.plot(*_at([plan.chosen]), "o", **ring, linestyle="none", label="the plan")
    if plan.cost.cached != plan.cost.full:
        saved = 1 - plan.cost.cached / plan.cost.full
        steps = plan.images.calls
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
