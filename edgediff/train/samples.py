"""Samples of a UNet while it is trained, through the loop that runs on the device."""

import math
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import UnsupportedError
from edgediff.models.conditioning import usual_guidance
from edgediff.models.load import Model
from edgediff.models.sampling import scheduler_config
from edgediff.models.undivided import undivided_session
from edgediff_runtime.errors import RequestError
from edgediff_runtime.image import grid, write_png
from edgediff_runtime.loop import Request, denoise, initial_latents
from edgediff_runtime.schedulers import Scheduler, make_scheduler

STEPS = 20
SCHEDULER = "dpmpp_2m"


def make_sampler(model: Model) -> Scheduler:
    """The sampler that grids are drawn with: `STEPS` steps, or fewer where the schedule is shorter.

    Raises:
        UnsupportedError: The model's own cannot be carried over.
    """
    config = scheduler_config(model.scheduler, SCHEDULER)
    try:
        return make_scheduler(config, max(1, min(STEPS, config.num_train_timesteps - 1)))
    except RequestError as e:
        raise UnsupportedError(f"{model.name} cannot be sampled: {e}") from e


def draw_samples(model: Model, count: int, *, seed: int = 0, at_once: int | None = None) -> NDArray[np.float32]:
    """Samples a model with its usual guidance, every step in full.

    Args:
        model: Of classes or of nothing; its UNet is where it is to run, in evaluation mode. Image i has class i mod the
            number of classes.
        count: How many.
        seed: Of the noise.
        at_once: Most rows that go through the UNet together, two for an image with guidance; None for all.

    Returns:
        float32 [count, C, H, W].

    Raises:
        UnsupportedError: The sampler cannot be carried over.
    """
    known = model.conditioning
    guidance = usual_guidance(known)
    cond: dict[str, np.ndarray] = {}
    uncond: dict[str, np.ndarray] = {}
    if known.kind == "class":
        cond["class_labels"] = np.arange(count, dtype=np.int64) % len(known.labels)
        if guidance > 1:
            uncond["class_labels"] = np.full(count, known.null_label, dtype=np.int64)
    rows = count * (2 if guidance > 1 else 1)
    # As many in each part, since the loop fills up parts that are not full.
    even = None if at_once is None else math.ceil(rows / math.ceil(rows / at_once))
    session = undivided_session(model, even)
    scheduler = make_sampler(model)
    steps = len(scheduler.timesteps)
    request = Request(
        graphs=session.graphs,
        scheduler=scheduler,
        clock=(True,) * steps,
        guidance=(guidance,) * steps,
        latents=initial_latents(seed, count, model.sample_shape, scheduler.init_noise_sigma),
        cond=cond,
        uncond=uncond,
        seed=seed,
    )
    made: NDArray[np.float32] = deque(denoise(request, session), maxlen=1).pop().latents
    return made


def write_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Writes images, uint8 [N, H, W, C], as one PNG, small ones enlarged."""
    write_png(path, grid(images), scale=max(1, 128 // images.shape[1]))
