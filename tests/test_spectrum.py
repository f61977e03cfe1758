"""What a denoiser does to each frequency: against denoisers whose answer is known, and what gates let pass."""

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DDPM, save_model
from unets import unet2d

from edgediff import load_model
from edgediff.errors import DataError, UnsupportedError
from edgediff.evaluate import response as responses
from edgediff.evaluate import spectrum
from edgediff.evaluate.denoiser import Denoiser
from edgediff.evaluate.gate_recorder import GateRecorder
from edgediff.evaluate.response import Response, measure_response, wiener_gain
from edgediff.evaluate.spectra import bands, top_octaves
from edgediff.models.spectral import BandGate, spectralize

SIZE = 16
ALPHAS = np.array([0.98, 0.7, 0.3, 0.02])
CPU = torch.device("cpu")


def smooth_noise(count: int) -> np.ndarray:
    """Images whose power falls with frequency, of no class and no edges: Gaussian, so that Wiener's is the best."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(count, SIZE, SIZE, 3))
    f = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None, :])[None, :, :, None]
    shaped = np.fft.ifft2(np.fft.fft2(white, axes=(1, 2)) / (0.05 + f), axes=(1, 2)).real
    return np.clip(np.rint(127.5 + 20 * shaped / shaped.std()), 0, 255).astype(np.uint8)


IMAGES = smooth_noise(60)
POWER = (np.abs(np.fft.fft2(IMAGES / 127.5 - 1, axes=(1, 2), norm="ortho")) ** 2).mean(axis=(0, 3))


def linear(gain: Any) -> Any:
    """A denoiser that multiplies each frequency, given abar, by something."""

    def clean(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return np.fft.ifft2(np.fft.fft2(x_t) * gain(float(ALPHAS[k]))).real

    return clean


def wiener(abar: float) -> np.ndarray:
    return np.sqrt(abar) / (abar + (1 - abar) / POWER)


def apart(found: Response) -> np.ndarray:
    return np.abs(found.gain - found.wiener)[:, 1:]


# The response


def test_a_wiener_denoiser_lands_on_the_prediction() -> None:
    found = measure_response(linear(wiener), IMAGES, ALPHAS)
    assert found.gain.shape == (4, bands(SIZE, SIZE).max() + 1)
    np.testing.assert_allclose(found.gain, found.wiener, atol=1e-9)
    # And the prediction is the formula, for a band whose frequencies have about one power.
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
def test_any_other_denoiser_does_not(gain: Any) -> None:
    assert apart(measure_response(linear(gain), IMAGES, ALPHAS)).max() > 0.1


def test_of_gaussian_images_no_linear_denoiser_has_less_error() -> None:
    best = measure_response(linear(wiener), IMAGES, ALPHAS).error
    for scale in (0.7, 1.4):
        other = measure_response(linear(lambda abar, scale=scale: scale * wiener(abar)), IMAGES, ALPHAS).error
        # At the last noise level there is hardly anything to gain or lose.
        assert (other.mean(axis=1) > best.mean(axis=1))[:3].all()


def test_the_best_guess_of_images_that_are_not_gaussian_lands_there_too() -> None:
    """Two images, taken in turns: the mean of what x_0 can have been is far from linear."""
    two = np.stack([IMAGES[0], IMAGES[1]])
    x_0 = two.transpose(0, 3, 1, 2) / 127.5 - 1

    def clean(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        alpha, variance = np.sqrt(ALPHAS[k]), 1 - ALPHAS[k]
        far = ((x_t[:, None] - alpha * x_0[None]) ** 2).sum(axis=(2, 3, 4)) / (2 * variance)
        weights = np.exp(far.min(axis=1, keepdims=True) - far)
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("bi,ichw->bchw", weights, x_0)

    found = measure_response(clean, np.tile(two, (200, 1, 1, 1)), ALPHAS)
    assert apart(found).max() < 0.05
    assert apart(measure_response(linear(wiener), two, ALPHAS)).max() > 0.05


def test_error_is_the_ratio_of_powers_and_the_gap_is_the_teachers() -> None:
    def half(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return 0.5 * (IMAGES[numbers].transpose(0, 3, 1, 2) / 127.5 - 1)

    def nothing(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        return np.zeros_like(x_t)

    found = measure_response(half, IMAGES, ALPHAS, teacher=nothing)
    np.testing.assert_allclose(found.error, 0.25, rtol=1e-9)
    np.testing.assert_allclose(found.teacher_gap, 0.25, rtol=1e-9)
    assert measure_response(half, IMAGES, ALPHAS).teacher_gap is None
    assert measure_response(nothing, np.full((2, SIZE, SIZE, 3), 128, np.uint8), ALPHAS).error.max() <= 1


def test_the_noise_is_the_same_whatever_the_batch_and_another_at_each_step() -> None:
    seen: dict[int, list[np.ndarray]] = {}
    found: list[np.ndarray] = []

    def look(x_t: np.ndarray, k: int, numbers: np.ndarray) -> np.ndarray:
        seen.setdefault(k, []).append((x_t - np.sqrt(ALPHAS[k]) * (IMAGES[numbers].transpose(0, 3, 1, 2) / 127.5 - 1))
                                      / np.sqrt(1 - ALPHAS[k]))  # fmt: skip
        return x_t

    for batch in (60, 7):
        seen.clear()
        measure_response(look, IMAGES, ALPHAS, batch=batch)
        noise = np.stack([np.concatenate(parts) for parts in seen.values()])
        assert noise.std() == pytest.approx(1, abs=0.01)
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02
        found.append(noise)
    np.testing.assert_allclose(*found, atol=1e-12)


def test_no_images_are_refused_and_examples_hold() -> None:
    with pytest.raises(DataError, match="expected one or more"):
        measure_response(linear(wiener), IMAGES[:0], ALPHAS)
    assert wiener_gain(np.array([0.0, 1e9]), 0.5) == pytest.approx([0, np.sqrt(2)], rel=1e-6)
    assert doctest.testmod(responses) == (0, 1)
    assert doctest.testmod(spectrum) == (0, 1)
    assert top_octaves(SIZE) == 3


# Models as denoisers


class Told(torch.nn.Module):
    """A UNet that knows the answer, in terms of any prediction."""

    def __init__(self, unet: torch.nn.Module, answer: torch.Tensor) -> None:
        super().__init__()
        self.config = unet.config
        self.answer = answer

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None) -> Any:
        self.asked = (timestep.tolist(), None if class_labels is None else class_labels.tolist())
        return type("Output", (), {"sample": self.answer})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_kind_of_prediction_gives_the_clean_image(tmp_path: Path, prediction: str) -> None:
    folder = save_model(unet2d(num_class_embeds=5), tmp_path / "model", DDPM | {"prediction_type": prediction})
    denoiser = Denoiser(load_model(folder), CPU)
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 2, 3, SIZE, SIZE))
    t = 300
    alpha, sigma = np.sqrt(denoiser.alphas_cumprod[t]), np.sqrt(1 - denoiser.alphas_cumprod[t])
    x_t = alpha * x_0 + sigma * eps
    answer = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[prediction]
    told = Told(denoiser.unet, torch.from_numpy(answer))
    denoiser.unet = told
    np.testing.assert_allclose(denoiser.clean(x_t, t, np.array([4, 1])), x_0, atol=1e-6)
    assert told.asked == ([300.0], [4, 1])
    told.answer[:] = torch.nan
    with pytest.raises(Exception, match="not finite at t = 300"):
        denoiser.clean(x_t, t, None)


def test_a_schedule_is_spread_evenly() -> None:
    assert spectrum.spread_times(1000) == (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
    assert spectrum.spread_times(3) == (0, 1, 2)


def test_teachers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def make(name: str, scheduler: dict[str, Any] | None = None, **config: Any) -> Denoiser:
        return Denoiser(load_model(save_model(unet2d(**config), tmp_path / name, scheduler)), CPU)

    student = make("student")
    student.check_teacher(make("same", num_class_embeds=5))
    for teacher, words in (
        (make("large", sample_size=32), "teacher large has samples 3x32x32, student 3x16x16"),
        (make("eps", DDPM | {"prediction_type": "epsilon"}), "teacher eps has prediction_type epsilon, student v_pred"),
        (make("linear", DDPM | {"beta_schedule": "linear"}), "teacher linear has another noise schedule"),
        (make("short", DDPM | {"num_train_timesteps": 100}), "teacher short has another noise schedule"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            student.check_teacher(teacher)


def test_schedulers_without_such_a_schedule_are_refused(tmp_path: Path) -> None:
    folder = save_model(unet2d(), tmp_path / "flow", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(UnsupportedError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        Denoiser(load_model(folder), CPU)
    odd = save_model(unet2d(), tmp_path / "odd", DDPM | {"prediction_type": "flow"})
    with pytest.raises(UnsupportedError, match="prediction_type 'flow'; expected one of epsilon, v_prediction, sample"):
        Denoiser(load_model(odd), CPU)


# Gates


def gated(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return spectralize(unet2d(block_out_channels=(8, 16, 24)), **settings)


@pytest.mark.parametrize("takes_time", [False, True])
def test_gates_are_heard(takes_time: bool) -> None:
    unet = gated(gate_takes_time=takes_time)
    x = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with GateRecorder(unet) as gates, torch.no_grad():
        assert len(gates.modules) == 4
        assert all(isinstance(module, BandGate) for module in gates.modules.values())
        for part in (x[:2], x[2:]):
            unet(part, torch.tensor([10.0]))
        found = gates.take()
        assert gates.take() == {}
        name = next(iter(gates.modules))
        heard: list[torch.Tensor] = []
        gates.modules[name].register_forward_hook(lambda module, given, out: heard.append(out))
        unet(x, torch.tensor([10.0]))
    expected = heard[0].double().mean(dim=(0, 2, 3, 4)).numpy()
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert expected.shape == (4,)
    assert (expected > 0).all()
    assert (expected < 1).all()


def test_nothing_listens_afterwards_and_other_networks_have_no_gates() -> None:
    unet = gated()
    with GateRecorder(unet) as gates:
        listening = [module._forward_hooks for module in gates.modules.values()]
        assert all(len(hooks) == 1 for hooks in listening)
    assert all(len(hooks) == 0 for hooks in listening)
    assert GateRecorder(unet2d()).modules == {}
