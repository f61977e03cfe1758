"""``edgediff evaluate spectrum``: a model by frequency, in what it makes and in how it denoises."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgediff.data.image_folder import ImageSet, class_indices, read_images, shuffled
from edgediff.errors import ConfigError, DataError
from edgediff.evaluate.charts import draw_overview
from edgediff.evaluate.denoiser import Denoiser, GateRecorder
from edgediff.evaluate.frequency import band_gap, measure_response, radial_spectrum, spectrum_error, top_octaves
from edgediff.evaluate.metrics import MIN_IMAGES
from edgediff.evaluate.processes import Processes
from edgediff.evaluate.report import Denoising, GateCurves, Spectra, SpectrumReport
from edgediff.evaluate.sampler import BATCH, Say, check_counts, chunks, sample_model
from edgediff.models.load import Model, load_model
from edgediff.models.spectral import BANDS
from edgediff.outputs import write_whole
from edgediff_runtime.bundle import MANIFEST

NUM_IMAGES = 256
# Timesteps that photographs are noised to.
NUM_TIMES = 10
# Images of either kind in the overview.
SHOWN = 20


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The numbers, and the first of the generated images and of the photographs, uint8 [S, H, W, 3]."""

    report: SpectrumReport
    generated: NDArray[np.uint8]
    photographs: NDArray[np.uint8]

    def write(self, folder: Path) -> dict[str, Path]:
        """Writes spectrum.json, the ``numbers``, and spectrum.png, the ``overview``; other files of the folder stay."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {"numbers": folder / "spectrum.json", "overview": folder / "spectrum.png"}
        data = msgspec.json.format(msgspec.json.encode(self.report), indent=1) + b"\n"
        write_whole(files["numbers"], lambda path: path.write_bytes(data))
        write_whole(files["overview"], partial(draw_overview, self.report, self.generated, self.photographs))
        return files


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
    """Measures a model by frequency.

    Photographs are put in a seeded order; the first `num_images`, or all where there are fewer, are noised. Generated
    images have their classes, in turns.

    Args:
        model: A diffusers directory or a built-in name; with classes or unconditional, of pixels.
        images: A folder with a subfolder for each class, or, of an unconditional model, images alone.
        teacher: Another model, which denoises the same.
        steps, guidance_scale, scheduler: Of the generated images. None: 8, what is usual for the model, dpmpp_2m.

    Raises:
        ConfigError: `num_images`, `batch` or the guidance is out of range, a model is a bundle, or several processes
            were launched.
        DataError: The folder cannot be read, or has a class that a model lacks.
        ModelError: A model cannot be read.
        RequestError: The number of steps or the seed is out of range.
        UnsupportedError: A model is of another kind, the teacher does not fit, or the scheduler is unknown.
    """
    check_counts(num_images, batch)
    processes = Processes.launched()
    if processes.count > 1:
        raise ConfigError(f"evaluate spectrum runs on one process, not on {processes.count}; evaluate distance spreads")
    for source in (model, teacher):
        if source is not None and (Path(source) / MANIFEST).is_file():
            raise ConfigError(f"{source} is a bundle; expected the model that it was made of")
    progress(f"opening {model}")
    loaded = load_model(model)
    denoiser = Denoiser(loaded, processes.device)
    sampler = sample_model(loaded, scheduler, processes.device)
    steps = sampler.steps if steps is None else steps
    guidance_scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    mask = sampler.check("1", steps, guidance_scale, seed)
    models, denoisers = [loaded], [denoiser]
    if teacher is not None:
        progress(f"opening {teacher}")
        models.append(load_model(teacher))
        denoisers.append(Denoiser(models[-1], processes.device))
        denoiser.check_teacher(denoisers[-1])
    progress(f"loading images: {images}")
    real = read_images(images, sampler.size, minimum=MIN_IMAGES)
    skipped = real.skipped.in_words()
    real = real.take(shuffled(len(real), seed))
    classes = [_classes(each, real) for each in models]
    wanted = None if classes[0] is None else np.resize(classes[0], num_images)
    made: list[NDArray[np.uint8]] = []
    for numbers in chunks(num_images, batch):
        made.append(sampler.draw(numbers, mask, classes=wanted, guidance_scale=guidance_scale, seed=seed))
        progress(f"drawing images: {numbers.stop} of {num_images}")
    generated = np.concatenate(made)
    denoising, gates = _denoise(denoisers, real.images[:num_images], classes, seed, batch, progress)
    report = SpectrumReport(
        model=loaded.name,
        teacher=None if teacher is None else denoisers[-1].name,
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
    """The middle of each of `count` equal shares of a schedule; fewer where the schedule is shorter.

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
        generated=tuple(made.tolist()),
        photographs=tuple(real.tolist()),
        gap=tuple(band_gap(made, real).tolist()),
        error=spectrum_error(made, real),
        error_top=spectrum_error(made, real, top_octaves(photographs.shape[1])),
    )


def _denoise(
    denoisers: list[Denoiser],
    photographs: NDArray[np.uint8],
    classes: list[NDArray[np.int64] | None],
    seed: int,
    batch: int,
    progress: Say,
) -> tuple[Denoising, tuple[GateCurves, ...] | None]:
    """Noises photographs and records the gates; the second denoiser, if any, is the teacher."""
    denoiser = denoisers[0]
    times = spread_times(len(denoiser.alphas_cumprod))
    alphas = denoiser.alphas_cumprod[list(times)]

    def clean(which: int, x_t: NDArray[np.float64], k: int, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        known = classes[which]
        return denoisers[which].clean(x_t, times[k], None if known is None else known[numbers])

    teacher = partial(clean, 1) if len(denoisers) > 1 else None
    responses: list[tuple[NDArray[np.float64], ...]] = []
    taken: list[dict[str, NDArray[np.float64]]] = []
    with GateRecorder(denoiser.unet) as gates:
        measured = measure_response(partial(clean, 0), photographs, alphas, teacher=teacher, seed=seed, batch=batch)
        for k, response in enumerate(measured):
            responses.append(response)
            taken.append(gates.take())
            progress(f"step {k + 1} of {len(times)}: photographs noised to t = {times[k]}")
    error, gain, wiener, gap = (np.array(values) for values in zip(*responses, strict=True))
    denoising = Denoising(
        timesteps=times,
        alphas_cumprod=tuple(alphas.tolist()),
        num_images=len(photographs),
        error=_rows(error),
        response=_rows(gain),
        wiener=_rows(wiener),
        response_error=float(np.abs(gain - wiener)[:, 1:].mean()),
        teacher_gap=None if teacher is None else _rows(gap),
    )
    curves = tuple(
        GateCurves(name, *(tuple(float(each[name][i]) for each in taken) for i in range(len(BANDS))))
        for name in gates.modules
    )
    return denoising, curves if curves else None


def _rows(values: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())
