"""Is a planned clock nearer to clock 1 than the uniform clock, on noise that the planner has not seen? drawings-64.

For each number of steps: the plan for the budget and the best mask of clock 2's own cost, both found on the planning
images; then both on unseen ones, of other prompts and seeds, against clock 2.
The bar: the best mask of clock 2's cost has at most its error.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from drawings import TEACHER, taught_prompts
from measure import machine

import edgediff
from edgediff.export.export_config import config_from
from edgediff.plan.budget import cached_steps, count_cost
from edgediff.plan.estimate import Estimate
from edgediff.plan.planner import Plan, choose
from edgediff.plan.trajectory import Mask, Trajectories, psnr_db
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import clock_mask, open_bundle
from edgediff_runtime.clock import letters

PERIOD = 2
UNSEEN_SEED = 1_000_000


def main() -> None:
    """Plans, and measures what was planned on unseen noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle; left out, the model is exported")
    parser.add_argument("--model", default=TEACHER)
    parser.add_argument("--adaptor", default="identity", help="of the exported bundle; a name, or a folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20], help="denoising steps")
    parser.add_argument("--budget", type=float, default=0.75, help="share of clock 1's FLOPs")
    parser.add_argument("--planning-images", type=int, default=16)
    parser.add_argument("--unseen-images", type=int, default=48)
    asked = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        bundle = (
            asked.bundle if asked.bundle is not None else _export(asked.model, Path(folder) / "bundle", asked.adaptor)
        )
        for steps in asked.steps:
            _compare(bundle, steps, asked.budget, asked.planning_images, asked.unseen_images)


def _export(model: str, path: Path, adaptor: str) -> Path:
    config = config_from({"adaptor": adaptor, "layout": "split", "verify": {"mode": "graphs"}})
    edgediff.export_bundle(edgediff.load_model(model), path, config)
    return path


def _compare(bundle: Path, steps: int, budget: float, planning: int, unseen: int) -> None:
    opened = open_bundle(bundle)
    pipe = open_pipeline(opened, "onnxruntime")
    session, prompts = pipe.session, []
    if pipe.can_encode:
        prompts = taught_prompts()
        prompts = [prompts[11 * i % len(prompts)] for i in range(planning + unseen)]
    ours, theirs = ({} if not some else pipe.encode_prompt(some) for some in (prompts[:planning], prompts[planning:]))
    guidance = opened.manifest.operating_point.guidance_scale
    seen = Trajectories(opened.manifest, session, steps, guidance, 0, planning, ours)
    cost = count_cost(bundle)
    start = time.perf_counter()
    plan = choose(bundle, seen, "onnxruntime", budget, cost)
    planned = time.perf_counter() - start
    uniform = clock_mask(PERIOD, steps)
    best = plan.frontier[cached_steps(uniform)].mask
    adaptor = opened.manifest.adaptor.name or "identity"
    print(
        f"\n{steps} steps, guidance {guidance:g}, adaptor {adaptor}: planned on {planning} images in {planned:.0f} s, "
        f"{plan.measured} clocks measured; then {unseen} unseen images"
    )
    _print_model(plan, plan.estimate)
    others = Trajectories(opened.manifest, session, steps, guidance, UNSEEN_SEED, unseen, theirs)
    errors = others.errors([(True,) * steps, uniform, best, plan.chosen.mask])
    reference = errors[uniform]
    _print_row(f"clock {PERIOD}", uniform, cost.share(uniform), reference, reference)
    _print_row(f"best mask of clock {PERIOD}'s cost", best, cost.share(best), errors[best], reference)
    _print_row(f"plan for {budget:g}", plan.chosen.mask, plan.chosen.cost, errors[plan.chosen.mask], reference)
    held = errors[best].mean() <= reference.mean()
    print(
        f"bar: {errors[best].mean() / reference.mean():.3f} x clock {PERIOD}'s error (1) {'ok' if held else 'MISSED'}"
    )


def _print_model(plan: Plan, estimate: Estimate) -> None:
    """How well the model foretold what was measured afterwards: masks of three and more cached steps."""
    told = [p for p in (*plan.frontier, *plan.uniform.values()) if cached_steps(p.mask) > 2]
    ratios = np.array([point.expected / point.error for point in told])
    print(
        f"model (pairs up to {estimate.near} apart, short rows), expected over measured, {len(told)} clocks: "
        f"median {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}"
    )


def _print_row(name: str, mask: Mask, share: float, errors: np.ndarray, reference: np.ndarray) -> None:
    low, high = np.percentile(1e3 * errors, [10, 90])
    nearer = np.mean(errors < reference)
    print(
        f"{name:26} {letters(mask)}: cost {share:.1%}, 1000 x error {1e3 * errors.mean():.3f} [{low:.3f}, {high:.3f}], "
        f"{psnr_db(float(errors.mean())):.2f} dB, {errors.mean() / reference.mean():.3f} x, nearer for {nearer:.0%}"
    )


if __name__ == "__main__":
    main()
