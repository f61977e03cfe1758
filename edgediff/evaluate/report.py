"""What an evaluation comes to: how far sets of images are from photographs, as plain numbers."""

from typing import Any

import msgspec

from edgediff.evaluate.distances import frechet_distance, kernel_distance
from edgediff.evaluate.neighbours import Closeness
from edgediff.evaluate.precision import precision_recall
from edgediff.evaluate.spectra import band_gap, spectrum_error, top_octaves
from edgediff.evaluate.traits import Traits


class Distances(msgspec.Struct, frozen=True):
    """How far one set of images is from the reference.

    Attributes:
        kernel_distance: Unbiased, so that sets of one distribution come out around 0, on either side.
        kernel_spread: Its standard error, from subsets.
        frechet_distance: In squared units of the features; grows as sets get smaller.
        precision: Share of the images that lie among the reference's, 0 to 1.
        recall: Share of the reference that lies among the images, 0 to 1.
        spectrum_error: Mean over the bands of |log10(power / reference power)|.
        spectrum_error_top: The same over the top two octaves: the bands above a quarter of the Nyquist frequency.
        band_gap: log10(power / reference power) of each band; band 0, the brightness, has no part in the means.
    """

    kernel_distance: float
    kernel_spread: float
    frechet_distance: float
    precision: float
    recall: float
    spectrum_error: float
    spectrum_error_top: float
    band_gap: tuple[float, ...]


class Suspect(msgspec.Struct, frozen=True):
    """An image that is as near to a training photograph as any of its set.

    Attributes:
        image: Its number; the same seed, clock and class make it again.
        distance: Root mean squared difference, in steps of 8 bits.
        neighbour: The photograph's number, of those that could be read; classes and the files of each are in the order
            of their names.
        mirrored: Whether the photograph is nearest as its mirror image.
    """

    image: int
    distance: float
    neighbour: int
    mirrored: bool


class ClockRow(msgspec.Struct, frozen=True):
    """What one clock's images come to.

    Attributes:
        clock: As it was asked for.
        mask: Spelt out, 1 = full.
        distances: From the reference.
        ratio: Its kernel distance over clock 1's; None where that was not measured or is not above 0.
        closeness: To the training photographs; None where none were named.
        suspects: The images nearest to one, the nearest first.
    """

    clock: str
    mask: tuple[int, ...]
    distances: Distances
    ratio: float | None
    closeness: Closeness | None
    suspects: tuple[Suspect, ...]


class Yardstick(msgspec.Struct, frozen=True):
    """How near photographs come to the training ones that were not among them.

    Attributes:
        train: The folder of the training photographs.
        available: How many there are.
        held_out: The reference's own closeness.
        threshold: 1 % of the reference is as near as this to a training photograph, in steps of 8 bits.
    """

    train: str
    available: int
    held_out: Closeness
    threshold: float


class Evaluation(msgspec.Struct, frozen=True):
    """Distances of the images of a bundle or a model from photographs.

    Attributes:
        model: The bundle's source, or the model.
        backend: What ran the graphs.
        scheduler: The sampler's name.
        num_images: Images of each clock's set.
        num_reference: Photographs that they are compared with.
        num_floor: Other photographs, of the same folder or of the training ones, that are compared with those as well.
        num_equal: Images of each set, the first ones, that Frechet distance, precision and recall take: they depend on
            the number of images.
        available: Images in the folder.
        features: The folder of the classifier that they are compared by.
        num_features: How many it has.
        accuracy: Share of the reference whose class the classifier names, 0 to 1; None where it may have seen them in
            training, or does not know the classes.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        seed: Of the noise, of the choice of photographs and of the spread.
        processes: How many made the images.
        floor: The other photographs against the reference.
        yardstick: What closeness is measured by; None where no training photographs were named.
        rows: In the order in which the clocks were given.
        skipped: Files of the folders that were left out, and why; empty where there are none.
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
    rows: tuple[ClockRow, ...]
    skipped: str

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain data."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data


class Reference:
    """A set of images that others are compared with."""

    def __init__(self, traits: Traits, size: int, num_equal: int | None = None, seed: int = 0) -> None:
        """Takes the set.

        Args:
            traits: What is kept of it.
            size: Height and width of the images, in pixels.
            num_equal: How many images of each set are taken where sets must be of one size; this one's number if None.
            seed: Of the spread.
        """
        self._traits = traits
        self._first = top_octaves(size)
        self._num_equal = len(traits) if num_equal is None else num_equal
        self._seed = seed

    def distances(self, traits: Traits) -> Distances:
        """Compares a set.

        Args:
            traits: What is kept of it.

        Returns:
            Its distances.

        Raises:
            DataError: There are fewer than four images, fewer than are to be taken of each set, or they are of another
                size.
        """
        mine, theirs = self._traits, traits
        kernel = kernel_distance(theirs.features, mine.features, self._seed)
        made, real = theirs.features[: self._num_equal], mine.features[: self._num_equal]
        cover = precision_recall(made, real)
        return Distances(
            kernel_distance=kernel.value,
            kernel_spread=kernel.spread,
            frechet_distance=frechet_distance(made, real),
            precision=cover.precision,
            recall=cover.recall,
            spectrum_error=spectrum_error(theirs.spectrum, mine.spectrum),
            spectrum_error_top=spectrum_error(theirs.spectrum, mine.spectrum, self._first),
            band_gap=tuple(float(value) for value in band_gap(theirs.spectrum, mine.spectrum)),
        )
