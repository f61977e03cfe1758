"""What the diagnostics of a model by frequency come to, as plain numbers; spectrum.json."""

from typing import Any

import msgspec

Rows = tuple[tuple[float, ...], ...]


class Spectra(msgspec.Struct, frozen=True):
    """Power by band: band b has b cycles per image, and the last ones lie in the transform's corners.

    Attributes:
        generated: Mean power per coefficient of generated images, of the Hann-windowed orthonormal transform.
        photographs: The same of the photographs.
        gap: log10(generated / photographs).
        error: Mean of |gap| over all bands but band 0, the brightness.
        error_top: The same over the top two octaves: the bands above a quarter of the Nyquist frequency.
    """

    generated: tuple[float, ...]
    photographs: tuple[float, ...]
    gap: tuple[float, ...]
    error: float
    error_top: float


class Denoising(msgspec.Struct, frozen=True):
    """What the denoiser does to noised photographs, a row for each time step and a column for each band; no window.

    Attributes:
        timesteps: Of the training schedule.
        alphas_cumprod: abar of each: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
        num_images: Photographs that were noised.
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
    """The mean gates of one resampler, one number for each time step of the denoising.

    Attributes:
        module: The gates' place in the network.
        LL: Of the approximation.
        LH: Of horizontal detail.
        HL: Of vertical detail.
        HH: Of diagonal detail.
    """

    module: str
    LL: tuple[float, ...]
    LH: tuple[float, ...]
    HL: tuple[float, ...]
    HH: tuple[float, ...]


class SpectrumReport(msgspec.Struct, frozen=True):
    """A model by frequency.

    Attributes:
        model: Its name.
        teacher: The teacher's, or None.
        size: Height and width of the images, in pixels.
        num_images: How many were generated.
        available: Photographs in the folder, all of which the spectrum is of.
        scheduler: The sampler's name.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance, of the generated images alone.
        seed: Of all noise, and of the choice of photographs.
        spectra: Power of generated images and photographs.
        denoising: The denoiser on noised photographs.
        gates: Of a wavelet-gated model, one entry for each resampler; None of any other.
        skipped: Files of the folder that were left out, and why; empty where there are none.
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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        return data
