"""What is known to go wrong with a cached clock, and speaks against a plan whatever its figures are.

Pixel distances to clock 1 are not quality: the paper's two failures were seen in FID, so they are said beside the plan.
"""

from collections.abc import Sequence
from itertools import pairwise

from edgediff.plan.trajectory import spell
from edgediff_runtime import Manifest
from edgediff_runtime.operating_point import departure

# The paper saw it at 8 steps. Few, here: up to a quarter more.
DDIM_STEPS = 10


def caveats(
    manifest: Manifest, mask: Sequence[bool], guidance_scale: float, own_conditioning: bool = False
) -> tuple[str, ...]:
    """Warns of what the paper, or the adaptor's training, says against a plan.

    Args:
        manifest: The bundle's manifest.
        mask: The plan, True = full.
        guidance_scale: What it was planned for.
        own_conditioning: Whether it was planned with what the bundle brings, and not with embeddings that were given.

    Returns:
        One line for each warning.
    """
    steps, found = len(mask), []
    if manifest.source.random_weights is not None:
        found.append("the bundle's weights are random: the plan's errors are of noise, its costs are right")
    if own_conditioning and manifest.evidence.conditioning == "synthetic":
        found.append(
            "planned with random embeddings, for want of others in the bundle; give real ones (--conditioning)"
        )
    if all(mask):
        return tuple(found)
    if manifest.scheduler.name == "ddim" and steps <= DDIM_STEPS:
        found.append(
            f"DDIM at {steps} steps: the one sampler that the paper saw get worse with a clock (FID 34.72 to 38.38 at "
            "few steps); dpmpp_2m did not"
        )
    if any(not a and not b for a, b in pairwise(mask)):
        found.append(
            "cached steps in a row: of 8 steps with 4 cached, the paper saw FID 28.07 (cached 5 to 8) and 33.10 (3 to "
            "6) against 23.21 where they take turns with full ones"
        )
    other = departure(manifest, tuple(mask), (guidance_scale,) * steps, spell(mask))
    if other is not None:
        found.append(f"{other}; train one for this plan")
    return tuple(found)
