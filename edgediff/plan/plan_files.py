"""A plan on disk: frontier.png, plan.json and recipe.yaml in one folder, each whole or as it was."""

import json
from pathlib import Path

from edgediff.errors import TargetError
from edgediff.outputs import check_drawing, check_folder, write_whole
from edgediff.plan.figure import DRAWING, draw_frontier
from edgediff.plan.plan_recipe import plan_recipe, render_recipe
from edgediff.plan.planner import Plan
from edgediff_runtime.bundle import MANIFEST

FIGURE, PLAN, RECIPE = "frontier.png", "plan.json", "recipe.yaml"


def check_place(folder: Path, bundle: Path) -> None:
    """Refuses a folder that could not be written, before anything is measured.

    Args:
        folder: Where the plan is to be.
        bundle: The bundle, which holds what its manifest lists and nothing else.

    Raises:
        TargetError: It is no folder, cannot be written, or lies in a bundle.
        MissingExtraError: matplotlib is not installed.
    """
    check_drawing(DRAWING)
    check_folder(folder)
    here = folder.resolve()
    inside = next((parent for parent in (here, *here.parents) if (parent / MANIFEST).is_file()), None)
    if inside is not None or bundle.resolve() in (here, *here.parents):
        raise TargetError(
            f"{folder} lies in the bundle {inside or bundle}, which holds nothing else; choose another output"
        )


def write_plan(plan: Plan, folder: Path) -> dict[str, Path]:
    """Writes a plan; other files of the folder stay.

    Args:
        plan: The plan.
        folder: Where to; made where it is not there.

    Returns:
        The files by what they are: ``figure``, ``plan`` and ``recipe``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = render(plan)
    data = json.dumps(plan.to_dict(), indent=1) + "\n"
    write_whole(folder / FIGURE, lambda path: draw_frontier(plan, path))
    write_whole(folder / PLAN, lambda path: path.write_text(data, encoding="utf-8"))
    write_whole(folder / RECIPE, lambda path: path.write_text(recipe, encoding="utf-8"))
    return {"figure": folder / FIGURE, "plan": folder / PLAN, "recipe": folder / RECIPE}


def render(plan: Plan) -> str:
    """The plan as a recipe.

    Args:
        plan: The plan.

    Returns:
        YAML: the bundle's recipe with the plan's steps and clock.
    """
    chosen, images = plan.chosen, plan.images
    own = plan.manifest.operating_point.guidance_scale
    config = plan_recipe(plan.manifest, chosen.mask, None if images.guidance_scale == own else images.guidance_scale)
    lines = [
        f"{plan.manifest.source.name}, planned for a budget of {plan.budget:g} of clock 1's {plan.cost.unit}: "
        f"{chosen.cost:.1%}, error {chosen.error:.3g} ({images.num_images} images, seed {images.seed}).",
    ]
    return render_recipe(config, lines)
