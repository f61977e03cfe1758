"""``edgediff evaluate spectrum``: a model by frequency, in what it makes and in how it denoises."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgediff.data.classes import class_indices
from edgediff.data.image_folder import ImageSet, read_images, shuffled
from edgediff.errors import ConfigError, DataError
from edgediff.evaluate.denoiser import Denoiser
from edgediff.evaluate.distances import MIN_IMAGES
from edgediff.evaluate.gate_recorder import GateRecorder
from edgediff.evaluate.processes import Processes
from edgediff.evaluate.response import Response, measure_response
from edgediff.evaluate.row import Row
from edgediff.evaluate.sampler import Sampler
from edgediff.evaluate.spectra import band_gap, radial_spectrum, spectrum_error, top_octaves
from edgediff.evaluate.spectrum_report import Denoising, GateCurves, Rows, Spectra, SpectrumReport
from edgediff.models.load import Model, load_model
from edgediff.models.spectral import BANDS
from edgediff_runtime.bundle import MANIFEST

NUM_IMAGES = 256
BATCH = 50
# Time steps that photographs are noised to, each in the middle of its share of the schedule.
NUM_TIMES = 10
# Images of either kind that the overview shows.
SHOWN = 20

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Numbers and pictures.

    Attributes:
        report: The numbers.
        generated: uint8 [S, H, W, 3], the first of the generated images.
        photographs: uint8 [S, H, W, 3], as many photographs.
    """

    report: SpectrumReport
    generated: NDArray[np.uint8]
    photographs: NDArray[np.uint8]


def evaluate_spectrum(
    model: str | Path,
    images: str | Path,
    *,
    teacher: str | Path | None = None,
    num_images: int = NUM_IMAGES,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    batch: int = BATCH,
    progress: Say = lambda what: None,
) -> Diagnosis:
    """Looks at a model by frequency.

    Photographs are put in a seeded order; the first `num_images`, or all where there are fewer, are noised. Generated
    images have their classes, in turns.

    Args:
        model: A diffusers directory or a built-in name; with classes or unconditional, of pixels.
        images: A folder with a subfolder for each class, or, of an unconditional model, images alone.
        teacher: Another model, which is given the same.
        num_images: Images to generate, and photographs to noise at most.
        steps: Denoising steps of the generated images; 8 where None.
        guidance_scale: Classifier-free guidance of the generated images; what is usual for the model where None.
        scheduler: dpmpp_2m where None.
        seed: Of all noise, and of the order of the photographs.
        batch: Images at once; what it changes is memory.
        progress: Told what is being done.

    Returns:
        What was found.

    Raises:
        ConfigError: `num_images`, `batch` or the guidance is out of range, the model is a bundle, or several processes
            were launched.
        DataError: The folder cannot be read, or has a class that a model lacks.
        ModelError: A model cannot be read.
        RequestError: The number of steps or the seed is none.
        UnsupportedError: A model is of another kind, the teacher does not fit, or the scheduler is unknown.
    """
    if num_images < MIN_IMAGES:
        raise ConfigError(f"num_images is {num_images}; expected {MIN_IMAGES} or more")
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected a whole number above 0")
    processes = Processes.launched()
    if processes.count > 1:
        raise ConfigError(f"evaluate spectrum runs on one process, not on {processes.count}; evaluate distance spreads")
    if (Path(model) / MANIFEST).is_file():
        raise ConfigError(f"{model} is a bundle; expected the model that it was made of")
    progress(f"opening {model}")
    loaded = load_model(model)
    denoiser = Denoiser(loaded, processes.device)
    sampler = Sampler(loaded, scheduler, processes.device)
    steps = sampler.steps if steps is None else steps
    guidance_scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    mask = sampler.check("1", steps, guidance_scale, seed)
    known = [loaded]
    guide = None
    if teacher is not None:
        progress(f"opening {teacher}")
        known.append(load_model(teacher))
        guide = Denoiser(known[-1], processes.device)
        denoiser.check_teacher(guide)
    progress(f"loading images: {images}")
    real = read_images(images, sampler.size, minimum=MIN_IMAGES)
    skipped = real.skipped.in_words()
    real = real.take(shuffled(len(real), seed))
    classes = [_classes(each, real) for each in known]
    row = Row(sampler, num_images, None if classes[0] is None else np.resize(classes[0], num_images),
              guidance_scale, seed)  # fmt: skip
    made: list[NDArray[np.uint8]] = []
    for numbers in row.chunks(batch):
        made.append(row.draw(numbers, mask))
        progress(f"drawing images: {sum(map(len, made))} of {num_images}")
    generated = np.concatenate(made)
    denoising, gates = _denoise(denoiser, guide, real.images[:num_images], classes, seed, batch, progress)
    report = SpectrumReport(
        model=loaded.name,
        teacher=None if guide is None else guide.name,
        size=sampler.size,
        num_images=num_images,
        available=len(real),
        scheduler=sampler.scheduler_name,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        spectra=_spectra(generated, real.images),
        denoising=denoising,
        gates=gates,
        skipped=skipped,
    )
    return Diagnosis(report, generated[:SHOWN], real.images[:SHOWN])


def spread_times(length: int, count: int = NUM_TIMES) -> tuple[int, ...]:
    """Time steps all over a schedule: the middle of each of its equal shares.

    Args:
        length: Of the schedule.
        count: How many, as far as there are as many.

    Returns:
        Different time steps, from little noise to much.

    >>> spread_times(1000, 4)
    (125, 375, 625, 875)
    """
    count = min(count, length)
    return tuple((2 * k + 1) * length // (2 * count) for k in range(count))


def _classes(model: Model, real: ImageSet) -> NDArray[np.int64] | None:
    labels = model.conditioning.labels if model.conditioning.kind == "class" else None
    try:
        return class_indices(labels, real, "model")
    except DataError as e:
        raise DataError(f"{model.name}: {e}") from e


def _spectra(generated: NDArray[np.uint8], photographs: NDArray[np.uint8]) -> Spectra:
    made, real = radial_spectrum(generated), radial_spectrum(photographs)
    return Spectra(
        generated=_numbers(made),
        photographs=_numbers(real),
        gap=_numbers(band_gap(made, real)),
        error=spectrum_error(made, real),
        error_top=spectrum_error(made, real, top_octaves(photographs.shape[1])),
    )


def _denoise(
    denoiser: Denoiser,
    teacher: Denoiser | None,
    photographs: NDArray[np.uint8],
    classes: list[NDArray[np.int64] | None],
    seed: int,
    batch: int,
    progress: Say,
) -> tuple[Denoising, tuple[GateCurves, ...] | None]:
    """Noises photographs, and listens to the gates meanwhile."""
    times = spread_times(len(denoiser.alphas_cumprod))
    alphas = denoiser.alphas_cumprod[list(times)]
    taken: list[dict[str, NDArray[np.float64]]] = []

    def clean(
        whose: Denoiser, known: NDArray[np.int64] | None, x_t: NDArray[np.float64], k: int, numbers: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        return whose.clean(x_t, times[k], None if known is None else known[numbers])

    with GateRecorder(denoiser.unet) as gates:

        def after(k: int) -> None:
            taken.append(gates.take())
            progress(f"step {k + 1} of {len(times)}: photographs noised to t = {times[k]}")

        response = measure_response(
            partial(clean, denoiser, classes[0]),
            photographs,
            alphas,
            teacher=None if teacher is None else partial(clean, teacher, classes[-1]),
            seed=seed,
            batch=batch,
            after=after,
        )
    curves = tuple(
        GateCurves(name, *(tuple(float(each[name][i]) for each in taken) for i in range(len(BANDS))))
        for name in gates.modules
    )
    return _denoising(response, times, alphas, len(photographs)), curves if curves else None


def _denoising(response: Response, times: tuple[int, ...], alphas: NDArray[np.float64], count: int) -> Denoising:
    return Denoising(
        timesteps=times,
        alphas_cumprod=_numbers(alphas),
        num_images=count,
        error=_rows(response.error),
        response=_rows(response.gain),
        wiener=_rows(response.wiener),
        response_error=float(np.abs(response.gain - response.wiener)[:, 1:].mean()),
        teacher_gap=None if response.teacher_gap is None else _rows(response.teacher_gap),
    )


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _rows(values: NDArray[np.float64]) -> Rows:
    return tuple(_numbers(row) for row in values)
