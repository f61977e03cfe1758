"""What is kept of a set of images: enough to compare it with another, and not the images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.evaluate.distances import Features
from edgediff.evaluate.neighbours import Nearest, nearest_neighbours
from edgediff.evaluate.spectra import radial_spectrum
from edgediff.models.classifier import Classifier, features_of


@dataclass(frozen=True, eq=False)
class Traits:
    """What is kept of a set.

    Attributes:
        features: float64 [N, F], the classifier's.
        spectrum: float64 [bands], mean power by radial frequency.
        nearest: The nearest training photographs, where they were asked for.
    """

    features: Features
    spectrum: NDArray[np.float64]
    nearest: Nearest | None = None

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def joined(cls, parts: Sequence["Traits"]) -> "Traits":
        """Makes one set of several.

        Args:
            parts: One or more, in the order that the images shall have; all with nearest photographs, or none.

        Returns:
            Their union.
        """
        near = [part.nearest for part in parts if part.nearest is not None]
        return cls(
            features=np.concatenate([part.features for part in parts]),
            spectrum=np.average([part.spectrum for part in parts], axis=0, weights=[len(part) for part in parts]),
            nearest=Nearest(
                distance=np.concatenate([each.distance for each in near]),
                index=np.concatenate([each.index for each in near]),
                mirrored=np.concatenate([each.mirrored for each in near]),
            )
            if near
            else None,
        )


class Examiner:
    """Looks at images.

    Attributes:
        classifier: Whose features are taken.
        train: uint8 [T, H, W, 3], the photographs that a model was trained on, where neighbours are looked for.
    """

    def __init__(self, classifier: Classifier, train: NDArray[np.uint8] | None = None) -> None:
        self.classifier = classifier
        self.train = train

    def examine(self, images: NDArray[np.uint8], neighbours: bool = True) -> Traits:
        """Takes a set's traits.

        Args:
            images: uint8 [N, H, W, 3].
            neighbours: Whether to look for the nearest training photographs, where there are any.

        Returns:
            What is to be kept.

        Raises:
            DataError: There are no images, or they are of another size than the training photographs.
        """
        wanted = neighbours and self.train is not None
        return Traits(
            features=features_of(self.classifier, images),
            spectrum=radial_spectrum(images),
            nearest=nearest_neighbours(images, self.train) if wanted and self.train is not None else None,
        )
