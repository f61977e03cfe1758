"""Images of a bundle in large numbers, whatever fits into memory at once.

A pipeline numbers its noise from 0 in each call. Here a call is one chunk of a longer row of images, so the noise is
drawn by the image's number in the whole row: image i is the same for any size of chunk (but for rounding, where a
backend adds up in another order), and is what `edgediff run` makes of the same seed and class as its image i.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError, UnsupportedError
from edgediff.train.data import ImageSet
from edgediff_runtime import EdgePipeline, Manifest, Result, clock_mask, denoise, make_scheduler, noise
from edgediff_runtime.loop import Request


def check_pixels(manifest: Manifest) -> int:
    """Refuses a bundle whose images cannot be compared with photographs.

    Args:
        manifest: The bundle's manifest.

    Returns:
        Height and width of its images, in pixels.

    Raises:
        UnsupportedError: It makes latents, or images that are not square or not RGB, is conditioned on text, or draws
            fresh noise on its way.
    """
    sample = manifest.sample
    if sample.space != "pixel":
        raise UnsupportedError("the bundle's model works on latents and has no decoder; expected one that makes images")
    if sample.channels != 3 or sample.height != sample.width:
        shape = f"{sample.channels}x{sample.height}x{sample.width}"
        raise UnsupportedError(f"the bundle's images are {shape}; expected square ones of 3 channels")
    if manifest.conditioning.kind == "text":
        raise UnsupportedError("the bundle's model is conditioned on text; expected classes, or nothing")
    if manifest.scheduler.eta > 0:
        raise UnsupportedError("the bundle's sampler draws fresh noise in every step (eta above 0); expected eta 0")
    return sample.height


def class_indices(manifest: Manifest, real: ImageSet) -> NDArray[np.int64] | None:
    """The bundle's class of each real image.

    Args:
        manifest: The bundle's manifest.
        real: The images; their classes bear the bundle's names.

    Returns:
        int64 [N]; None where the model is not conditioned.

    Raises:
        DataError: A class of the folder is none of the bundle's.
    """
    known = manifest.conditioning.labels
    if manifest.conditioning.kind == "none":
        return None
    strange = [name for name in real.names if name not in known]
    if strange:
        raise DataError(f"the folder's class {strange[0]!r} is none of the bundle's; choices: {', '.join(known)}")
    return np.array([known.index(name) for name in real.names], dtype=np.int64)[real.labels]


def generate(
    pipe: EdgePipeline,
    classes: NDArray[np.int64] | None,
    num_images: int,
    *,
    clock: int | str,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch: int,
) -> Iterator[NDArray[np.uint8]]:
    """Generates images chunk by chunk; what was asked is checked before the first.

    Args:
        pipe: The bundle, opened; `check_pixels` has seen it.
        classes: int64 [num_images], the class of each image; None where the model is not conditioned.
        num_images: How many.
        clock: Period or mask of the full steps.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is off.
        seed: 0 to 2^64 - 1.
        batch: Images of a chunk, the last of which may be smaller.

    Returns:
        An iterator over uint8 [batch, H, W, 3].

    Raises:
        RequestError: What was asked does not fit the bundle.
    """
    # Whatever does not fit is said here, in the pipeline's words; nothing runs.
    label = None if classes is None else int(classes[0])
    pipe.stream(label=label, num_inference_steps=steps, clock=clock, guidance_scale=guidance_scale, seed=seed)
    starts = range(0, num_images, batch)
    chunks = (range(start, min(start + batch, num_images)) for start in starts)
    return (_chunk(pipe, numbers, classes, clock, steps, guidance_scale, seed) for numbers in chunks)


def _chunk(
    pipe: EdgePipeline,
    numbers: Sequence[int],
    classes: NDArray[np.int64] | None,
    clock: int | str,
    steps: int,
    guidance_scale: float,
    seed: int,
) -> NDArray[np.uint8]:
    manifest, graphs = pipe.manifest, pipe.session.graphs
    sample = manifest.sample
    scheduler = make_scheduler(manifest.scheduler, steps)
    shape = (sample.channels, sample.height, sample.width)
    drawn = np.stack([noise(seed, shape, image=i) for i in numbers])
    cond, uncond = {}, {}
    if classes is not None:
        dtype = next(tensor.dtype for graph in graphs for tensor in graph.inputs if tensor.name == "class_labels")
        cond["class_labels"] = classes[numbers[0] : numbers[-1] + 1].astype(dtype)
        if guidance_scale > 1:
            uncond["class_labels"] = np.full(len(numbers), manifest.conditioning.null_label, dtype=dtype)
    request = Request(
        graphs=graphs,
        scheduler=scheduler,
        clock=clock_mask(clock, steps),
        guidance=(guidance_scale,) * steps,
        latents=drawn * np.float32(scheduler.init_noise_sigma),
        cond=cond,
        uncond=uncond,
        seed=seed,
    )
    return Result.of(denoise(request, pipe.session), manifest).images
