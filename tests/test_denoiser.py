"""Models as denoisers: the clean image from any prediction, teachers that fit, and what gates let pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DDPM, save_model
from unets import unet2d

from edgediff import load_model
from edgediff.errors import UnsupportedError
from edgediff.evaluate.denoiser import Denoiser, GateRecorder
from edgediff.models.spectral import BandGate, spectralize

SIZE = 16
CPU = torch.device("cpu")


class FixedUNet(torch.nn.Module):
    """A UNet that gives a fixed answer and records what it was given."""

    def __init__(self, unet: torch.nn.Module, answer: torch.Tensor) -> None:
        super().__init__()
        self.config = unet.config
        self.answer = answer

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        assert not return_dict
        self.asked = (timestep.tolist(), None if class_labels is None else class_labels.tolist())
        return (self.answer,)


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
    fixed = FixedUNet(denoiser.unet, torch.from_numpy(answer))
    denoiser.unet = fixed
    np.testing.assert_allclose(denoiser.clean(x_t, t, np.array([4, 1])), x_0, atol=1e-6)
    assert fixed.asked == ([300.0], [4, 1])
    fixed.answer[:] = torch.nan
    with pytest.raises(Exception, match="not finite at t = 300"):
        denoiser.clean(x_t, t, None)


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
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


def test_schedulers_and_predictions_that_are_not_handled_are_refused(tmp_path: Path) -> None:
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
def test_gates_are_recorded(takes_time: bool) -> None:
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
        recorded: list[torch.Tensor] = []
        gates.modules[name].register_forward_hook(lambda module, given, out: recorded.append(out))
        unet(x, torch.tensor([10.0]))
    expected = recorded[0].double().mean(dim=(0, 2, 3, 4)).numpy()
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert expected.shape == (4,)
    assert (expected > 0).all()
    assert (expected < 1).all()


def test_hooks_are_removed_and_other_networks_have_no_gates() -> None:
    unet = gated()
    with GateRecorder(unet) as gates:
        listening = [module._forward_hooks for module in gates.modules.values()]
        assert all(len(hooks) == 1 for hooks in listening)
    assert all(len(hooks) == 0 for hooks in listening)
    assert GateRecorder(unet2d()).modules == {}
