"""What a denoiser does to each band of frequencies, beside the optimal linear denoiser (Spectral Diffusion, section 3).

At the noise level abar a linear denoiser does best with the gain G(f) = sqrt(abar) / (abar + (1 - abar) / |X_0(f)|^2),
Wiener's: near abar = 0 only frequencies of high power pass. The measured gain is the least-squares one of the guess on
what it was made of, Re <X0_hat, X_t> / <X_t, X_t>. For the best guess of all, the mean of what x_0 can have been, the
two agree in every band, linear or not: its error is orthogonal to X_t. So a gain that departs from Wiener's by more
than chance is a fault of the model and not of the formula.

The transforms are orthonormal and without a window: white noise of variance 1 has power 1 at each frequency, and the
photographs' edges, which a window would take away, are part of what is denoised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError
from edgediff.evaluate.spectra import ROUNDING, bands
from edgediff_runtime import noise

Array = NDArray[np.float64]
# (x_t [B, C, H, W], number of the time step in the list, numbers of the images) -> x_0 as it is guessed, of that shape.
Clean = Callable[[Array, int, NDArray[np.int64]], Array]


@dataclass(frozen=True, eq=False)
class Response:
    """What a denoiser did, by time step and band.

    Attributes:
        error: float64 [T, bands], |X0_hat - X_0|^2 over |X_0|^2, both summed over the band.
        gain: float64 [T, bands], the least-squares gain of X0_hat on X_t.
        wiener: float64 [T, bands], G over the band, weighted as the measured gain is: by the power of X_t.
        teacher_gap: float64 [T, bands], |X0_hat - X0_hat of the teacher|^2 over |X_0|^2; None without a teacher.
    """

    error: Array
    gain: Array
    wiener: Array
    teacher_gap: Array | None


def measure_response(
    clean: Clean,
    images: NDArray[np.uint8],
    alphas_cumprod: Array,
    *,
    teacher: Clean | None = None,
    seed: int = 0,
    batch: int = 50,
    after: Callable[[int], None] = lambda index: None,
) -> Response:
    """Noises photographs at each noise level and looks at what becomes of them.

    Args:
        clean: The denoiser.
        images: uint8 [N, H, W, C], taken as -1 to 1.
        alphas_cumprod: float64 [T], abar of each time step.
        teacher: Another denoiser, given the same.
        seed: Of the noise: image i gets the same at a time step, whatever the batch.
        batch: Images at once.
        after: Told the number of each time step when it is done.

    Returns:
        Error, gain and prediction.

    Raises:
        DataError: There are no images.
    """
    if images.ndim != 4 or not len(images):
        raise DataError(f"images of shape {list(images.shape)}; expected one or more, [N, H, W, C]")
    count, height, width, channels = images.shape
    chunks = [np.arange(i, min(i + batch, count)) for i in range(0, count, batch)]
    power = sum((_power(_transform(_as_samples(images[numbers]))) for numbers in chunks), np.zeros((height, width)))
    error, gain, wiener, gap = ([] for _ in range(4))
    for k, abar in enumerate(alphas_cumprod):
        sums = {name: np.zeros((height, width)) for name in ("noisy", "cross", "error", "gap")}
        for numbers in chunks:
            x_0 = _as_samples(images[numbers])
            eps = np.stack([noise(seed, x_0.shape[1:], image=int(i), draw=k + 1) for i in numbers])
            x_t = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
            guess = clean(x_t, k, numbers)
            noisy, guessed = _transform(x_t), _transform(guess)
            sums["noisy"] += _power(noisy)
            sums["cross"] += (guessed * noisy.conj()).real.sum(axis=(0, 1))
            sums["error"] += _power(guessed - _transform(x_0))
            if teacher is not None:
                sums["gap"] += _power(guessed - _transform(teacher(x_t, k, numbers)))
        of_band = {name: _by_band(values) for name, values in sums.items()}
        # Where there is less power than that of rounding to 256 levels, that is what there is.
        whole = np.maximum(_by_band(power), 4 * ROUNDING * count * channels * _by_band(np.ones((height, width))))
        error.append(of_band["error"] / whole)
        gap.append(of_band["gap"] / whole)
        gain.append(of_band["cross"] / of_band["noisy"])
        optimal = wiener_gain(power / (count * channels), float(abar))
        wiener.append(_by_band(optimal * sums["noisy"]) / of_band["noisy"])
        after(k)
    return Response(np.array(error), np.array(gain), np.array(wiener), None if teacher is None else np.array(gap))


def wiener_gain(power: Array, abar: float) -> Array:
    """The gain of the optimal linear denoiser at each frequency.

    Args:
        power: |X_0(f)|^2, of any shape; 0 or more, of the orthonormal transform.
        abar: alphas_cumprod of the time step, 0 to 1.

    Returns:
        sqrt(abar) / (abar + (1 - abar) / power), of the same shape.

    >>> float(wiener_gain(np.array(1.0), 0.25))
    0.5
    """
    gain: Array = np.sqrt(abar) * power / (abar * power + (1 - abar))
    return gain


def _as_samples(images: NDArray[np.uint8]) -> Array:
    """Float64 [B, C, H, W] in [-1, 1]."""
    return images.transpose(0, 3, 1, 2) / 127.5 - 1


def _transform(x: Array) -> NDArray[np.complex128]:
    transformed: NDArray[np.complex128] = np.fft.fft2(x, norm="ortho")
    return transformed


def _power(x: NDArray[np.complex128]) -> Array:
    """[H, W], summed over images and channels."""
    summed: Array = (x.real**2 + x.imag**2).sum(axis=(0, 1))
    return summed


def _by_band(values: Array) -> Array:
    """[bands], summed."""
    summed: Array = np.bincount(bands(*values.shape).ravel(), values.ravel()).astype(np.float64)
    return summed
