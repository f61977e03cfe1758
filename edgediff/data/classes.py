"""The class that a model or a bundle has for each image of a folder."""

import numpy as np
from numpy.typing import NDArray

from edgediff.data.image_folder import ImageSet
from edgediff.errors import DataError


def class_indices(labels: tuple[str, ...] | None, real: ImageSet, whose: str) -> NDArray[np.int64] | None:
    """The class that a model or a bundle has for each image, int64 [N]; None where it has no condition.

    Raises:
        DataError: A class of the folder is none of these, or the folder has none.
    """
    if labels is None:
        return None
    if not real.names:
        raise DataError(f"the folder has no classes, which the {whose} has; expected a subfolder for each")
    strange = [name for name in real.names if name not in labels]
    if strange:
        raise DataError(f"the folder's class {strange[0]!r} is not one of the {whose}'s; choices: {', '.join(labels)}")
    return np.array([labels.index(name) for name in real.names], dtype=np.int64)[real.labels]
