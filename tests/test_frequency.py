"""Images by frequency: power of known images, and denoisers whose response is known."""

import math
from typing import Any

import numpy as np
import pytest

from edgediff.errors import DataError
from edgediff.evaluate import frequency
from edgediff.evaluate.frequency import (
    ROUNDING,
    Clean,
    Response,
    band_gap,
    bands,
    measure_response,
    radial_spectrum,
    spectrum_error,
    wiener_gain,
)

RNG = np.random.default_rng(0)
SIZE = 16


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


def test_white_noise_is_flat_at_its_variance() -> None:
    images = as_bytes(RNG.normal(0.5, 0.1, size=(400, 16, 24, 3)))
    spectrum = radial_spectrum(images)
    assert len(spectrum) == bands(16, 24).max() + 1
    # Subtracting the mean under the window takes a part of the lowest waves too.
    np.testing.assert_allclose(spectrum[2:], 0.01, rtol=0.05)


def test_a_wave_is_in_its_band() -> None:
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    for f_y, f_x in ((0, 5), (3, 4), (6, 0)):
        wave = as_bytes(0.5 + 0.4 * np.sin(2 * np.pi * (f_y * y + f_x * x)))[None, ..., None]
        spectrum = radial_spectrum(wave)
        band = round(math.hypot(f_y, f_x))
        share = spectrum * np.bincount(bands(SIZE, SIZE).ravel())
        share = share[1:] / share[1:].sum()
        # A window widens a line by one coefficient on each side.
        assert share[band - 2 : band + 1].sum() > 0.98, (f_y, f_x, share)
        assert int(np.argmax(spectrum[1:])) + 1 == band


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    whole = radial_spectrum(images)
    monkeypatch.setattr(frequency, "_CHUNK", 3 * 8 * 8 * 3)
    np.testing.assert_allclose(radial_spectrum(images), whole, rtol=1e-12)


def test_half_the_contrast_is_a_quarter_of_the_power() -> None:
    noise = RNG.normal(0, 0.2, size=(50, SIZE, SIZE, 3))
    full, half = (radial_spectrum(as_bytes(0.5 + scale * noise)) for scale in (1, 0.5))
    np.testing.assert_allclose(band_gap(half, full)[1:], math.log10(0.25), atol=0.02)
    assert spectrum_error(half, full) == pytest.approx(math.log10(4), abs=0.02)
    assert spectrum_error(full, full) == 0


def test_power_below_that_of_rounding_counts_as_that() -> None:
    flat = radial_spectrum(np.full((2, SIZE, SIZE, 3), 99, np.uint8))
    noisy = radial_spectrum(as_bytes(RNG.normal(0.5, 0.1, size=(50, SIZE, SIZE, 3))))
    assert spectrum_error(flat, noisy) == pytest.approx(math.log10(0.01 / ROUNDING), abs=0.05)
    assert spectrum_error(flat, flat) == 0


def test_spectra_of_different_sizes_and_of_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="one size"):
        spectrum_error(np.ones(5), np.ones(6))
    with pytest.raises(DataError, match="expected one or more"):
        radial_spectrum(np.zeros((0, 8, 8, 3), np.uint8))


# The response of a denoiser

ALPHAS = np.array([0.98, 0.7, 0.3, 0.02])


def smooth_noise(count: int) -> np.ndarray:
    """Gaussian images, for which Wiener's gain is the best, whose power falls with frequency."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(count, SIZE, SIZE, 3))
    f = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None, :])[None, :, :, None]
    shaped = np.fft.ifft2(np.fft.fft2(white, axes=(1, 2)) / (0.05 + f), axes=(1, 2)).real
    return np.clip(np.rint(127.5 + 20 * shaped / shaped.std()), 0, 255).astype(np.uint8)


IMAGES = smooth_noise(60)
POWER = (np.abs(np.fft.fft2(IMAGES / 127.5 - 1, axes=(1, 2), norm="ortho")) ** 2).mean(axis=(0, 3))


def linear(gain: Any) -> Any:
    """A denoiser that multiplies each frequency by a gain, given abar."""

    def clean(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return np.fft.ifft2(np.fft.fft2(x_t) * gain(float(ALPHAS[k]))).real

    return clean


def wiener(abar: float) -> np.ndarray:
    return np.sqrt(abar) / (abar + (1 - abar) / POWER)


def response(clean: Clean, images: np.ndarray = IMAGES, **options: Any) -> Response:
    """The response at all noise levels, [T, bands] each."""
    return Response(*map(np.array, zip(*measure_response(clean, images, ALPHAS, **options), strict=True)))


def apart(found: Response) -> np.ndarray:
    return np.abs(found.gain - found.wiener)[:, 1:]


def test_a_wiener_denoiser_has_wieners_gain() -> None:
    found = response(linear(wiener))
    assert found.gain.shape == (4, bands(SIZE, SIZE).max() + 1)
    np.testing.assert_allclose(found.gain, found.wiener, atol=1e-9)
    # And that is the formula, for a band whose frequencies have about the same power.
    np.testing.assert_allclose(found.wiener[:, 5], [wiener(a)[3, 4] for a in ALPHAS], rtol=0.25)


@pytest.mark.parametrize(
    "gain",
    [
        lambda abar: 1 / np.sqrt(abar),  # no denoising at all, rescaled
        lambda abar: 0.8 * wiener(abar),
        lambda abar: wiener(abar) ** 2,
        lambda abar: np.sqrt(abar) / (abar + (1 - abar) / POWER.mean()),  # blind to frequency
        lambda abar: wiener(abar) * (bands(SIZE, SIZE) < 5),  # a blur
    ],
)
def test_any_other_linear_denoiser_has_another_gain(gain: Any) -> None:
    assert apart(response(linear(gain))).max() > 0.1


def test_no_linear_denoiser_of_gaussian_images_has_less_error() -> None:
    best = response(linear(wiener)).error
    for scale in (0.7, 1.4):
        other = response(linear(lambda abar, scale=scale: scale * wiener(abar))).error
        # At the last noise level errors hardly differ.
        assert (other.mean(axis=1) > best.mean(axis=1))[:3].all()


def test_the_posterior_mean_of_images_that_are_not_gaussian_has_wieners_gain_too() -> None:
    """Two images in turns: the posterior mean is far from linear."""
    two = np.stack([IMAGES[0], IMAGES[1]])
    x_0 = two.transpose(0, 3, 1, 2) / 127.5 - 1

    def clean(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        alpha, variance = np.sqrt(ALPHAS[k]), 1 - ALPHAS[k]
        far = ((x_t[:, None] - alpha * x_0[None]) ** 2).sum(axis=(2, 3, 4)) / (2 * variance)
        weights = np.exp(far.min(axis=1, keepdims=True) - far)
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("bi,ichw->bchw", weights, x_0)

    found = response(clean, np.tile(two, (200, 1, 1, 1)))
    assert apart(found).max() < 0.05
    assert apart(response(linear(wiener), two)).max() > 0.05


def test_error_is_the_ratio_of_powers_and_the_gap_is_the_teachers() -> None:
    def half(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return 0.5 * (IMAGES[numbers].transpose(0, 3, 1, 2) / 127.5 - 1)

    def nothing(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return np.zeros_like(x_t)

    found = response(half, teacher=nothing)
    np.testing.assert_allclose(found.error, 0.25, rtol=1e-9)
    np.testing.assert_allclose(found.teacher_gap, 0.25, rtol=1e-9)
    assert response(half).teacher_gap.max() == 0
    assert response(nothing, np.full((2, SIZE, SIZE, 3), 128, np.uint8)).error.max() <= 1


def test_the_noise_is_the_same_whatever_the_batch_and_another_at_each_step() -> None:
    seen: dict[int, list[np.ndarray]] = {}
    found: list[np.ndarray] = []

    def look(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        seen.setdefault(k, []).append((x_t - np.sqrt(ALPHAS[k]) * (IMAGES[numbers].transpose(0, 3, 1, 2) / 127.5 - 1))
                                      / np.sqrt(1 - ALPHAS[k]))  # fmt: skip
        return x_t

    for batch in (60, 7):
        seen.clear()
        response(look, batch=batch)
        noise = np.stack([np.concatenate(parts) for parts in seen.values()])
        assert noise.std() == pytest.approx(1, abs=0.01)
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02
        found.append(noise)
    np.testing.assert_allclose(*found, atol=1e-12)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="expected one or more"):
        response(linear(wiener), IMAGES[:0])


def test_wieners_gain_at_no_power_and_at_much() -> None:
    assert wiener_gain(np.array([0.0, 1e9]), 0.5) == pytest.approx([0, np.sqrt(2)], rel=1e-6)
