import numpy as np
import pytest
import torch
from unets import unet2d

from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.slim import slim
from edgediff.models.spectral import spectralize
from edgediff.train.distillation import (
    FLOOR,
    POINTS,
    Distillation,
    frequency_term,
    frequency_weights,
    predict_with_features,
    spatial_term,
)
from edgediff.train.learner import Learner, Noising

SIZES = [(16, 16), (8, 8), (4, 8), (7, 5)]


def images(batch: int = 3, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """Smooth pictures: their power falls with frequency."""
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="circular"), 5, stride=1)


def features(size: tuple[int, int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, *size, generator=rng), torch.randn(3, 6, *size, generator=rng)


# The terms


def written_out(teacher: np.ndarray, student: np.ndarray, x_0: np.ndarray, alpha: float) -> float:
    """The frequency term over the whole plane, in numpy, for features of the image's own size."""
    magnitude = np.abs(np.fft.fft2(x_0, norm="ortho")).mean(axis=1, keepdims=True)
    magnitude = np.maximum(magnitude, FLOOR * magnitude.mean(axis=(2, 3), keepdims=True))
    weights = magnitude**alpha
    weights = weights / weights.mean(axis=(2, 3), keepdims=True)
    difference = np.abs(np.fft.fft2(teacher - student, norm="ortho")) ** 2
    return float((weights * difference).mean() / (teacher**2).mean())


@pytest.mark.parametrize("size", [(16, 16), (7, 5), (6, 9)])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5])
def test_the_frequency_term_is_the_formula_written_out(size: tuple[int, int], alpha: float) -> None:
    x_0, (teacher, student) = images(size=size), features(size)
    found = frequency_term(teacher, student, frequency_weights(x_0, size, alpha))
    wanted = written_out(*(tensor.double().numpy() for tensor in (teacher, student, x_0)), alpha)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_with_an_alpha_of_0_the_frequency_term_is_the_spatial_one(size: tuple[int, int]) -> None:
    teacher, student = features(size)
    found = frequency_term(teacher, student, frequency_weights(images(size=(28, 40)), size, 0.0))
    assert float(found) == pytest.approx(float(spatial_term(teacher, student)), rel=1e-5)


def test_an_image_of_one_colour_has_finite_weights_and_gradients() -> None:
    weights = frequency_weights(torch.zeros(2, 3, 8, 8), (4, 4), -1.0)
    assert bool(torch.isfinite(weights).all())
    student = torch.randn(2, 5, 4, 4, requires_grad=True)
    frequency_term(torch.zeros(2, 5, 4, 4), student, weights).backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


# Features and aligners


@pytest.mark.parametrize("make", [lambda u: slim(u, 8), lambda u: spectralize(u, 8)])
def test_features_of_teacher_and_student_lie_at_the_same_places(make: object) -> None:
    teacher = unet2d(block_out_channels=(16, 32, 48))
    student = make(teacher)  # type: ignore[operator]
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    found = {}
    for unet in (teacher, student):
        with torch.no_grad():
            _, found[unet] = predict_with_features(unet, POINTS[:-1], x, t, {})
    shapes = {name: tuple(feature.shape) for name, feature in found[teacher].items()}
    assert shapes == {
        "down_0": (2, 16, 8, 8), "down_1": (2, 32, 4, 4), "down_2": (2, 48, 4, 4), "mid": (2, 48, 4, 4),
        "up_0": (2, 48, 4, 4), "up_1": (2, 32, 8, 8), "up_2": (2, 16, 16, 16),
    }  # fmt: skip
    assert {n: f.shape[2:] for n, f in found[student].items()} == {n: f.shape[2:] for n, f in found[teacher].items()}
    distillation = Distillation(teacher, student, POINTS[:-1], -1.0)
    spatial, frequency = distillation(found[teacher], found[student], x)
    assert bool(torch.isfinite(spatial))
    assert bool(torch.isfinite(frequency))
    assert all(not module._forward_hooks for unet in found for module in unet.modules())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    unet = unet2d()
    distillation = Distillation(unet, unet, POINTS, -1.0)
    for aligner in distillation.aligners.values():
        torch.nn.init.dirac_(aligner.weight)
        torch.nn.init.zeros_(aligner.bias)
    learner = Learner(unet, distillation)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        terms = learner(x, x, t, x, {}, predict_with_features(unet, POINTS, x, t, {})[1])
    assert float(terms["spatial"]) == pytest.approx(0, abs=1e-9)
    assert float(terms["frequency"]) == pytest.approx(0, abs=1e-9)
    assert terms["ddpm"] > 0


@pytest.mark.parametrize("points", [("out",), ("mid", "out"), ("down",), ("up",)])
def test_features_are_compared_where_asked(points: tuple[str, ...]) -> None:
    teacher = unet2d()
    student = slim(teacher, 8)
    distillation = Distillation(teacher, student, points, 0.0)
    learner = Learner(student.requires_grad_(True), distillation)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        _, given = predict_with_features(teacher, points, x, t, {})
    assert {name.partition("_")[0] for name in given} == set(points)
    learner(x, x, t, x, {}, given)["spatial"].backward()
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_unets_of_other_levels_are_refused() -> None:
    shallow = unet2d(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    with pytest.raises(ConfigError, match=r"the student has features .* the teacher .*down_2"):
        Distillation(unet2d(), shallow, POINTS, -1.0)


# Noise


class Schedule:
    def __init__(self, prediction: str) -> None:
        self.config = {"prediction_type": prediction}
        self.alphas_cumprod = torch.linspace(0.999, 0.001, 10, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_is_to_be_predicted_gives_the_clean_image_back(prediction: str) -> None:
    schedule = Schedule(prediction)
    x_0, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 6, 9])
    x_t, target = Noising(schedule, torch.device("cpu")).noised(x_0, noise, t)
    abar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1).float()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    assert torch.allclose(x_t, a * x_0 + s * noise, atol=1e-6)
    back = {"epsilon": (x_t - s * target) / a, "sample": target, "v_prediction": a * x_t - s * target}[prediction]
    assert torch.allclose(back, x_0, atol=1e-3)


def test_schedules_that_cannot_be_trained_with() -> None:
    with pytest.raises(UnsupportedError, match=r"'flow'.*choices: epsilon, v_prediction, sample"):
        Noising(Schedule("flow"), torch.device("cpu"))
    bare = Schedule("epsilon")
    del bare.alphas_cumprod
    with pytest.raises(UnsupportedError, match="no noise schedule"):
        Noising(bare, torch.device("cpu"))
