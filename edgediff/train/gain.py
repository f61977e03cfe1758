"""What an adaptor, or a distillation to a few steps, is worth: PSNR of final images of unseen seeds."""

from dataclasses import dataclass

import numpy as np
import torch

from edgediff.models.clockwork import SplitUNet, split
from edgediff.models.graphs import graph_list
from edgediff.models.load import Model
from edgediff.models.torch_session import TorchSession
from edgediff.train.rollout import Rollouts, final_latents
from edgediff_runtime.image import to_uint8
from edgediff_runtime.loop import initial_latents

IMAGES = 16
SEED = 1


@dataclass(frozen=True)
class Gain:
    """PSNR in dB of final samples against clock 1, a mean over images.

    Attributes:
        space: ``pixel``: of 8-bit images; ``latent``: of latents, against their range.
    """

    identity: float
    learned: float
    images: int
    space: str


@dataclass(frozen=True)
class Nearness:
    """PSNR of final samples of unseen seeds against the teacher's, in dB, a mean over images.

    Attributes:
        before: The model that the training began with, in the few steps, with the teacher's guidance.
        full: The result, every step full, without guidance.
        cached: The result at the clock; None without one.
    """

    before: float
    full: float
    cached: float | None
    images: int


def measure_gain(model: Model, rollouts: Rollouts) -> Gain:
    """Generates the same samples at clock 1, with the identity and with the learned adaptor, as `rollouts` says."""
    learned = rollouts.split
    identity = split(model.unet, learned.cut).to(next(learned.parameters()).device)
    reference = _generate(model, identity, rollouts, (True,) * len(rollouts.mask))
    kept, made = (
        psnr_of(reference, _generate(model, divided, rollouts, rollouts.mask), model.space)
        for divided in (identity, learned)
    )
    return Gain(kept, made, IMAGES, model.space)


@torch.no_grad()
def _generate(model: Model, divided: SplitUNet, rollouts: Rollouts, mask: tuple[bool, ...]) -> np.ndarray:
    session = TorchSession(divided.parts, graph_list(divided, model))
    cond, uncond = rollouts.prompts.draw(np.random.default_rng(SEED), IMAGES)
    latents = initial_latents(SEED, IMAGES, model.sample_shape, rollouts.scheduler.init_noise_sigma)
    # As many at once as the training takes: more may not fit.
    at_once = rollouts.settings.images
    made = []
    for first in range(0, IMAGES, at_once):
        rows = slice(first, first + at_once)
        request = rollouts.request(
            session,
            clock=mask,
            latents=latents[rows],
            cond={name: values[rows] for name, values in cond.items()},
            uncond={name: values[rows] for name, values in uncond.items()},
            seed=SEED + first,
        )
        made.append(final_latents(request, session))
    return np.concatenate(made)


def psnr_of(reference: np.ndarray, samples: np.ndarray, space: str) -> float:
    """Mean of the samples' PSNR in dB: of 8-bit images, or of latents against the range of the reference's."""
    axes = (1, 2, 3)
    peak: np.ndarray | float = np.abs(reference).max(axis=axes)
    if space == "pixel":
        reference, samples = (to_uint8(x).astype(np.float64) for x in (reference, samples))
        peak = 255.0
    error = np.mean((reference - samples) ** 2, axis=axes)
    return float(np.mean(20 * np.log10(peak / np.sqrt(np.maximum(error, 1e-10)))))
