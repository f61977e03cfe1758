"""Images by spatial frequency: their power, and what a denoiser does to each band (Spectral Diffusion, section 3).

A photograph's left edge does not fit its right one, and that jump, repeated by the Fourier transform, has power at all
frequencies: it hides what an image lacks in its highest ones. So `radial_spectrum` subtracts each image's mean and
applies a Hann window, scaled so that white noise keeps its level. On 1,000 of grocery-32's photographs a blur of 0.6
pixels is an error of 0.67 with the window and 0.57 without, and 1,000 others are 0.007 and 0.012 away.

At the noise level abar the best linear denoiser has Wiener's gain G(f) = sqrt(abar) / (abar + (1 - abar) / |X_0(f)|^2):
near abar = 0 only frequencies of high power pass. The measured gain is the least-squares one of the guess on its input,
Re <X0_hat, X_t> / <X_t, X_t>. For the best guess, linear or not, the posterior mean of x_0, the two agree in every
band, since its error is orthogonal to X_t. So a gain that departs from Wiener's by more than chance is an error of the
model. Gains are measured without a window: white noise of variance 1 has power 1 at each frequency, and the
photographs' edges are part of what is denoised.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgediff.errors import DataError
from edgediff_runtime import noise

# Power per coefficient of the rounding to 256 levels: anything below is indistinguishable from that rounding.
ROUNDING = 1 / 12 / 255**2
# Numbers in memory for one transform.
_CHUNK = 2**21

Array = NDArray[np.float64]
# (x_t [B, C, H, W], index of the time step, indices of the images) -> the guess of x_0, of the same shape.
Clean = Callable[[Array, int, NDArray[np.int64]], Array]


def bands(height: int, width: int) -> NDArray[np.int64]:
    """The radial band of each coefficient, int64 [height, width]: cycles per image (over the shorter side), rounded.

    The corners reach about 0.7 times the shorter side and are bands of their own.

    >>> bands(4, 4)[0]
    array([0, 1, 2, 1])
    """
    f_y, f_x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    of_band: NDArray[np.int64] = np.rint(np.hypot(f_y, f_x) * min(height, width)).astype(np.int64)
    return of_band


def top_octaves(size: int) -> int:
    """The first band of the top two octaves: those above a quarter of the Nyquist frequency, corners included.

    >>> top_octaves(32)
    5
    """
    return size // 8 + 1


def radial_spectrum(images: NDArray[np.uint8]) -> Array:
    """Mean power of each band, float64 [bands], over images, uint8 [N, H, W, C] taken as 0 to 1, and channels.

    Power is per coefficient of the orthonormal transform: white noise of standard deviation s has s^2 in every band but
    0 and 1, of which subtracting the mean takes all and a part. DataError: there are no images.
    """
    _check_images(images)
    count, height, width, channels = images.shape
    weights = np.outer(_hann(height), _hann(width))[None, :, :, None]
    power = np.zeros((height, width))
    chunk = max(_CHUNK // (height * width * channels), 1)
    for i in range(0, count, chunk):
        x = images[i : i + chunk] / 255.0
        # The mean under the window, so that nothing of it leaks into the lowest bands.
        x = weights * (x - (weights * x).sum(axis=(1, 2), keepdims=True) / weights.sum())
        power += (np.abs(np.fft.fft2(x, axes=(1, 2), norm="ortho")) ** 2).sum(axis=(0, 3))
    of_band = bands(height, width).ravel()
    spectrum: Array = np.bincount(of_band, power.ravel()) / np.bincount(of_band) / (count * channels)
    return spectrum


def _hann(size: int) -> Array:
    """Hann window whose square has mean 1; half a pixel in, so that no pixel has weight 0."""
    window: Array = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    window /= np.sqrt((window**2).mean())
    return window


def band_gap(spectrum: Array, reference: Array) -> Array:
    """log10 of each band's power over the reference's; power below that of rounding to 256 levels counts as that.

    DataError: the spectra, [bands], are of images of different sizes.
    """
    if spectrum.shape != reference.shape:
        raise DataError(f"spectra of {len(spectrum)} and {len(reference)} bands; expected images of one size")
    return np.log10(np.maximum(spectrum, ROUNDING) / np.maximum(reference, ROUNDING))


def spectrum_error(spectrum: Array, reference: Array, first: int = 1) -> float:
    """Mean of |`band_gap`| over the bands from `first` on; 0.1 is a factor of 1.26 in power."""
    return float(np.abs(band_gap(spectrum, reference)[first:]).mean())


class Response(NamedTuple):
    """What a denoiser does at one time step, float64 [bands] each.

    Attributes:
        error: |X0_hat - X_0|^2 over |X_0|^2, both summed over the band.
        gain: The least-squares gain of X0_hat on X_t.
        wiener: G over the band, weighted as the measured gain is: by the power of X_t.
        teacher_gap: |X0_hat - X0_hat of the teacher|^2 over |X_0|^2; zero without a teacher.
    """

    error: Array
    gain: Array
    wiener: Array
    teacher_gap: Array


def measure_response(
    clean: Clean,
    images: NDArray[np.uint8],
    alphas_cumprod: Array,
    *,
    teacher: Clean | None = None,
    seed: int = 0,
    batch: int = 50,
) -> Iterator[Response]:
    """Noises photographs to each noise level and yields what the denoiser does there.

    Image i gets the same noise at a time step, whatever the batch.

    Args:
        images: uint8 [N, H, W, C], taken as -1 to 1.
        alphas_cumprod: float64 [T], abar of each time step.
        teacher: Another denoiser, given the same.
    """
    _check_images(images)
    count, height, width, channels = images.shape
    chunks = [np.arange(i, min(i + batch, count)) for i in range(0, count, batch)]
    power = sum((_power(_transform(_as_samples(images[numbers]))) for numbers in chunks), np.zeros((height, width)))
    # Bands with less power than the rounding to 256 levels count as having that.
    floor = 4 * ROUNDING * count * channels * _by_band(np.ones((height, width)))
    whole = np.maximum(_by_band(power), floor)
    for k, abar in enumerate(alphas_cumprod):
        noisy, cross, error, gap = (np.zeros((height, width)) for _ in range(4))
        for numbers in chunks:
            x_0 = _as_samples(images[numbers])
            eps = np.stack([noise(seed, x_0.shape[1:], image=int(i), draw=k + 1) for i in numbers])
            x_t = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
            given, guessed = _transform(x_t), _transform(clean(x_t, k, numbers))
            noisy += _power(given)
            cross += (guessed * given.conj()).real.sum(axis=(0, 1))
            error += _power(guessed - _transform(x_0))
            if teacher is not None:
                gap += _power(guessed - _transform(teacher(x_t, k, numbers)))
        optimal = wiener_gain(power / (count * channels), float(abar))
        yield Response(
            error=_by_band(error) / whole,
            gain=_by_band(cross) / _by_band(noisy),
            wiener=_by_band(optimal * noisy) / _by_band(noisy),
            teacher_gap=_by_band(gap) / whole,
        )


def wiener_gain(power: Array, abar: float) -> Array:
    """The optimal linear gain, sqrt(abar) / (abar + (1 - abar) / power), for |X_0(f)|^2 of any shape.

    >>> float(wiener_gain(np.array(1.0), 0.25))
    0.5
    """
    gain: Array = np.sqrt(abar) * power / (abar * power + (1 - abar))
    return gain


def _check_images(images: NDArray[np.uint8]) -> None:
    if images.ndim != 4 or not len(images):
        raise DataError(f"images of shape {list(images.shape)}; expected one or more, [N, H, W, C]")


def _as_samples(images: NDArray[np.uint8]) -> Array:
    """Float64 [B, C, H, W] in [-1, 1]."""
    return images.transpose(0, 3, 1, 2) / 127.5 - 1


def _transform(x: Array) -> NDArray[np.complex128]:
    return np.fft.fft2(x, norm="ortho")


def _power(x: NDArray[np.complex128]) -> Array:
    """[H, W], summed over images and channels."""
    summed: Array = (x.real**2 + x.imag**2).sum(axis=(0, 1))
    return summed


def _by_band(values: Array) -> Array:
    """[bands], summed."""
    return np.bincount(bands(*values.shape).ravel(), values.ravel()).astype(np.float64)
