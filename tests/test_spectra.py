"""Radial power spectra: white noise, waves, Parseval, and what is refused."""

import doctest
import math

import numpy as np
import pytest

from edgediff.errors import DataError
from edgediff.evaluate import spectra
from edgediff.evaluate.spectra import ROUNDING, band_gap, bands, radial_spectrum, spectrum_error

RNG = np.random.default_rng(0)
SIZE = 16


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("window", [True, False])
def test_white_noise_is_flat_at_its_variance(window: bool) -> None:
    images = as_bytes(RNG.normal(0.5, 0.1, size=(400, 16, 24, 3)))
    spectrum = radial_spectrum(images, window)
    assert len(spectrum) == bands(16, 24).max() + 1
    # Taking the mean under the window away takes a part of the lowest waves too.
    np.testing.assert_allclose(spectrum[2 if window else 1 :], 0.01, rtol=0.05)


@pytest.mark.parametrize("window", [True, False])
def test_a_wave_is_in_its_band(window: bool) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    for f_y, f_x in ((0, 5), (3, 4), (6, 0)):
        wave = as_bytes(0.5 + 0.4 * np.sin(2 * np.pi * (f_y * y + f_x * x)))[None, ..., None]
        spectrum = radial_spectrum(wave, window)
        band = round(math.hypot(f_y, f_x))
        share = spectrum * np.bincount(bands(SIZE, SIZE).ravel())
        share = share[1:] / share[1:].sum()
        # A window widens a line by one coefficient on each side.
        near = slice(band - 2, band + 1) if window else slice(band - 1, band)
        assert share[near].sum() > (0.98 if window else 0.9999), (f_y, f_x, share)
        assert int(np.argmax(spectrum[1:])) + 1 == band


def test_power_adds_up() -> None:
    images = RNG.integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    spectrum = radial_spectrum(images, window=False)
    total = (spectrum * np.bincount(bands(12, 10).ravel())).sum() * 5 * 3
    assert total == pytest.approx(((images / 255) ** 2).sum(), rel=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    whole = radial_spectrum(images)
    monkeypatch.setattr(spectra, "_CHUNK", 3 * 8 * 8 * 3)
    np.testing.assert_allclose(radial_spectrum(images), whole, rtol=1e-12)


def test_half_the_contrast_is_a_quarter_of_the_power() -> None:
    noise = RNG.normal(0, 0.2, size=(50, SIZE, SIZE, 3))
    full, half = (radial_spectrum(as_bytes(0.5 + scale * noise)) for scale in (1, 0.5))
    np.testing.assert_allclose(band_gap(half, full)[1:], math.log10(0.25), atol=0.02)
    assert spectrum_error(half, full) == pytest.approx(math.log10(4), abs=0.02)
    assert spectrum_error(full, full) == 0


def test_images_without_power_have_that_of_rounding() -> None:
    flat = radial_spectrum(np.full((2, SIZE, SIZE, 3), 99, np.uint8))
    noisy = radial_spectrum(as_bytes(RNG.normal(0.5, 0.1, size=(50, SIZE, SIZE, 3))))
    assert spectrum_error(flat, noisy) == pytest.approx(math.log10(0.01 / ROUNDING), abs=0.05)
    assert spectrum_error(flat, flat) == 0


def test_spectra_of_other_sizes_and_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="one size"):
        spectrum_error(np.ones(5), np.ones(6))
    with pytest.raises(DataError, match="expected one or more"):
        radial_spectrum(np.zeros((0, 8, 8, 3), np.uint8))


def test_examples_hold() -> None:
    assert doctest.testmod(spectra) == (0, 2)
