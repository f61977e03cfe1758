"""Samples of a UNet while it is trained, by the loop that runs on the device."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import UnsupportedError
from edgediff.models.load import Model
from edgediff.models.sampling import scheduler_config
from edgediff.models.undivided import undivided_session
from edgediff.train.rollout import Prompts, final_latents
from edgediff_runtime.errors import RequestError
from edgediff_runtime.image import grid, write_png
from edgediff_runtime.loop import Request, initial_latents
from edgediff_runtime.schedulers import Scheduler, make_scheduler

STEPS = 20
SCHEDULER = "dpmpp_2m"


def make_sampler(model: Model) -> Scheduler:
    """The sampler that grids are drawn with: `STEPS` steps, or fewer where the schedule is shorter.

    Raises:
        UnsupportedError: The model's sampler is not supported.
    """
    config = scheduler_config(model.scheduler, SCHEDULER)
    try:
        return make_scheduler(config, max(1, min(STEPS, config.num_train_timesteps - 1)))
    except RequestError as e:
        raise UnsupportedError(f"{model.name} cannot be sampled: {e}") from e


def draw_samples(
    model: Model, count: int, at_once: int, guidance: float | None = None, prompts: Prompts | None = None
) -> NDArray[np.float32]:
    """Samples a model, every step in full, with its usual guidance where none is given.

    Image i has class, or prompt, i mod their number, and noise of seed 0; a model with text needs `prompts`. At most
    `at_once` rows go through the UNet together, two for an image with guidance.

    Returns:
        float32 [count, C, H, W].

    Raises:
        UnsupportedError: The model's sampler is not supported.
    """
    guidance = model.usual_guidance if guidance is None else guidance
    prompts = Prompts.of(model, guidance > 1, None) if prompts is None else prompts
    cond, uncond = prompts.take(np.arange(count))
    rows = count * (2 if guidance > 1 else 1)
    # Equal parts, since the loop pads those that are not full.
    session = undivided_session(model, math.ceil(rows / math.ceil(rows / at_once)))
    scheduler = make_sampler(model)
    steps = len(scheduler.timesteps)
    request = Request(
        graphs=session.graphs,
        scheduler=scheduler,
        clock=(True,) * steps,
        guidance=(guidance,) * steps,
        latents=initial_latents(0, count, model.sample_shape, scheduler.init_noise_sigma),
        cond=cond,
        uncond=uncond,
        seed=0,
    )
    return final_latents(request, session)


def write_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Writes images, uint8 [N, H, W, C], as one PNG, small ones enlarged."""
    write_png(path, grid(images), scale=max(1, 128 // images.shape[1]))
