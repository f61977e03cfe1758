"""Peak signal-to-noise ratio, as the on-device ecosystem computes it."""

import math

import numpy as np


def psnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Compares an array with what it should be: ``20 log10((max|ref| + 1e-5) / (rmse + 1e-10))``.

    Returns:
        dB; equal arrays of ordinary size give about 200. Minus infinity where `value` has another shape, or either
        holds NaN or infinity.

    >>> round(psnr_db(np.array([1.0, 2.0]), np.array([1.0, 2.2])), 1)
    23.0
    """
    if reference.shape != value.shape or not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return -math.inf
    reference = reference.astype(np.float64)
    rmse = math.sqrt(float(np.mean((reference - value.astype(np.float64)) ** 2)))
    return 20 * math.log10((float(np.abs(reference).max()) + 1e-5) / (rmse + 1e-10))
