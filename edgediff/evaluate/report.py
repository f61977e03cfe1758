"""The numbers that ``edgediff evaluate`` finds: an `Evaluation` by distance, a `SpectrumReport` by frequency."""

from typing import Any

import msgspec

Rows = tuple[tuple[float, ...], ...]


class Report(msgspec.Struct, frozen=True):
    """What a command found."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data


class Distances(msgspec.Struct, frozen=True):
    """How far one set of images is from the reference.

    Attributes:
        kernel_spread: Standard error of the kernel distance.
        frechet_distance: In squared units of the features.
        precision, recall: Share of the images among the reference's, and of the reference among the images, 0 to 1.
        band_gap: log10(power / reference power) of each band.
        spectrum_error: Mean over the bands, but band 0, the brightness, of |band_gap|.
        spectrum_error_top: The same over the top two octaves: the bands above a quarter of the Nyquist frequency.
    """

    kernel_distance: float
    kernel_spread: float
    frechet_distance: float
    precision: float
    recall: float
    spectrum_error: float
    spectrum_error_top: float
    band_gap: tuple[float, ...]


class Closeness(msgspec.Struct, frozen=True):
    """How near the images of a set are to training photographs, in 8-bit levels.

    Attributes:
        quantile_5: 5 % of the images are nearer.
        share_nearer: Share of the images as near as the nearest 1 % of the photographs held out; about 0.01 of a model
            that repeats nothing.
    """

    median: float
    quantile_5: float
    share_nearer: float


class Suspect(msgspec.Struct, frozen=True):
    """One of the images of a set nearest to a training photograph.

    Attributes:
        image: Its number; the same seed, clock and class make it again.
        distance: Root mean squared difference, in 8-bit levels.
        neighbour: The photograph's number among those that could be read, by class and then by file name.
        mirrored: The photograph's mirror image is the nearest.
    """

    image: int
    distance: float
    neighbour: int
    mirrored: bool


class ClockResult(msgspec.Struct, frozen=True):
    """The images of one clock against the reference.

    Attributes:
        ratio: Its kernel distance over clock 1's; None where that was not measured or is not above 0.
        closeness: None where no training photographs were named; `suspects` are then empty.
    """

    clock: str
    mask: tuple[int, ...]
    distances: Distances
    ratio: float | None
    closeness: Closeness | None
    suspects: tuple[Suspect, ...]


class Yardstick(msgspec.Struct, frozen=True):
    """How near photographs held out come to the training photographs.

    Attributes:
        train: The folder of the training photographs, of which there are `available`.
        threshold: 1 % of the reference is as near as this to a training photograph, in 8-bit levels.
    """

    train: str
    available: int
    held_out: Closeness
    threshold: float


class Evaluation(Report, frozen=True):
    """Distances of the images of a bundle or a model from photographs.

    Attributes:
        num_images: Images generated with each clock.
        num_reference: Photographs that they are compared with.
        num_floor: Other photographs, of the same folder or of the training ones, compared in the same way.
        num_equal: Frechet distance, precision and recall depend on the number of images: they take so many of each set.
        accuracy: Share of the reference whose class the classifier names, 0 to 1; None where it may have been trained
            on them, or does not know the classes.
        floor: The other photographs against the reference.
        yardstick: None where no training photographs were named.
        skipped: Files left out, and why; empty where there are none.
    """

    model: str
    backend: str
    scheduler: str
    num_images: int
    num_reference: int
    num_floor: int
    num_equal: int
    available: int
    features: str
    num_features: int
    accuracy: float | None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    processes: int
    floor: Distances
    yardstick: Yardstick | None
    rows: tuple[ClockResult, ...]
    skipped: str


class Recognised(msgspec.Struct, frozen=True):
    """How many of a set of pictures the classifier takes for what they are to be, 0 to 1.

    Attributes:
        top_1, top_5: Share whose thing is the classifier's first choice, and among its first five.
        top_1_spread, top_5_spread: Their standard errors.
        style: Share whose style it names; None where it knows no styles.
    """

    num_images: int
    top_1: float
    top_1_spread: float
    top_5: float
    top_5_spread: float
    style: float | None


class Asked(msgspec.Struct, frozen=True):
    """The prompts of a split, and the real drawings of them.

    Attributes:
        drawings: The real drawings as the classifier sees them: no model can be expected to come out higher.
    """

    split: str
    prompts: tuple[str, ...]
    drawings: Recognised


class Answer(msgspec.Struct, frozen=True):
    """What was drawn with one clock for the prompts of one split.

    Attributes:
        distances: From the real drawings of the same prompts.
        nearest: How near the pictures come to the training drawings; None where no drawings are held out, which tell
            what is near.
        ranks: Of each prompt's thing among all that the classifier knows, 1 = its first choice.
        taken_for: Its first choice for each prompt.
    """

    clock: str
    mask: tuple[int, ...]
    split: str
    found: Recognised
    distances: Distances
    nearest: Closeness | None
    ranks: tuple[int, ...]
    taken_for: tuple[str, ...]


class Retrieval(Report, frozen=True):
    """Whether pictures are the things asked for.

    Attributes:
        features: The classifier's folder; it knows `num_labels` things.
        num_train: Training drawings among which the nearest is looked for.
        threshold: The nearest 1 % of the drawings held out are as near as this to a training drawing, in 8-bit levels.
        held_out: How near all drawings held out come to those; None, as `threshold`, where there are none.
    """

    model: str
    backend: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    images: str
    features: str
    num_labels: int
    num_train: int
    threshold: float | None
    held_out: Closeness | None
    asked: tuple[Asked, ...]
    rows: tuple[Answer, ...]
    skipped: str


class Spectra(msgspec.Struct, frozen=True):
    """Power by band: band b has b cycles per image, and the last ones are the transform's corners.

    Attributes:
        generated, photographs: Mean power per coefficient of the Hann-windowed orthonormal transform.
        gap: log10(generated / photographs).
        error, error_top: As `Distances.spectrum_error` and `spectrum_error_top`.
    """

    generated: tuple[float, ...]
    photographs: tuple[float, ...]
    gap: tuple[float, ...]
    error: float
    error_top: float


class Denoising(msgspec.Struct, frozen=True):
    """The denoiser on noised photographs: a row for each time step, a column for each band; no window.

    Attributes:
        alphas_cumprod: abar of each time step: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
        error: |X0_hat - X_0|^2 over |X_0|^2, summed over the band.
        response: Least-squares gain of X0_hat on X_t.
        wiener: The gain of the optimal linear denoiser.
        response_error: Mean over time steps and bands, but band 0, of |response - wiener|.
        teacher_gap: |X0_hat - X0_hat of the teacher|^2 over |X_0|^2; None without a teacher.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    num_images: int
    error: Rows
    response: Rows
    wiener: Rows
    response_error: float
    teacher_gap: Rows | None


class GateCurves(msgspec.Struct, frozen=True):
    """The mean gates of one resampler by time step: of the approximation, horizontal, vertical and diagonal detail."""

    module: str
    LL: tuple[float, ...]
    LH: tuple[float, ...]
    HL: tuple[float, ...]
    HH: tuple[float, ...]


class SpectrumReport(Report, frozen=True):
    """A model by frequency; spectrum.json.

    Attributes:
        available: Photographs in the folder, whose spectrum is taken.
        gates: Of a wavelet-gated model, one entry for each resampler; None of any other.
    """

    model: str
    teacher: str | None
    size: int
    num_images: int
    available: int
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    spectra: Spectra
    denoising: Denoising
    gates: tuple[GateCurves, ...] | None
    skipped: str
