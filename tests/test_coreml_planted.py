"""Errors planted in a saved .mlpackage, with every hash made right again: only the numbers can tell."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from artefacts import saved_once
from conftest import SMALL_CLASS, Export, save_class_model
from ml_packages import Opened, change_package
from seals import reseal
from unets import unet2d

import edgediff
from edgediff import verify_bundle
from edgediff.config.floors import VerifyConfig
from edgediff.targets.coreml import CoreMLConfig

Plant = Callable[[Opened], None]


def transposed_weight(opened: Opened) -> None:
    square = next(op for op in opened.ops("linear") if len(set(opened.array(op, "weight").shape)) == 1)
    opened.change(square, "weight", np.transpose)


def swapped_channels(opened: Opened) -> None:
    opened.change(opened.ops("conv")[1], "weight", lambda w: np.concatenate([w[1::-1], w[2:]]))


def swapped_input_channels(opened: Opened) -> None:
    opened.change(opened.ops("conv")[1], "weight", lambda w: np.concatenate([w[:, 1::-1], w[:, 2:]], axis=1))


def mirrored_kernel(opened: Opened) -> None:
    opened.change(opened.ops("conv")[0], "weight", lambda w: w[..., ::-1])


def weight_a_few_percent_off(opened: Opened) -> None:
    opened.change(opened.ops("conv")[1], "weight", lambda w: w * 1.03)


def lost_bias(opened: Opened) -> None:
    opened.change(opened.ops("linear")[0], "bias", np.zeros_like)


def wrong_epsilon(opened: Opened) -> None:
    opened.change(_norms(opened)[0], "y", lambda eps: np.full_like(eps, 1e-3))


def _norms(opened: Opened) -> list:
    """Where a norm adds its epsilon to the variance."""
    return [op for op in opened.ops("add") if "sqrt" in opened.users(op)]


def wrong_frequency(opened: Opened) -> None:
    """All but the first of the time embedding's are off by one percent."""
    op = next(op for op in opened.ops("mul") if "sin" in opened.users(op))
    opened.change(op, "y", lambda f: f * np.linspace(1, 1.01, f.size).reshape(f.shape))


def gain_of_a_norm(opened: Opened) -> None:
    opened.change(opened.ops("batch_norm")[0], "gamma", lambda gamma: gamma * np.linspace(1, 1.05, gamma.size))


def sine_for_cosine(opened: Opened) -> None:
    sine, cosine = opened.ops("sin")[0], opened.ops("cos")[0]
    sine.type, cosine.type = "cos", "sin"


def another_activation(opened: Opened) -> None:
    opened.ops("silu")[-1].type = "relu"


def difference_for_sum(opened: Opened) -> None:
    next(op for op in opened.ops("add") if "conv" in opened.users(op) or "reshape" in opened.users(op)).type = "sub"


def swapped_halves(opened: Opened) -> None:
    """A skip connection joined on the wrong side."""
    first, second = opened.ops("concat")[-1].inputs["values"].arguments
    first.name, second.name = second.name, first.name


def swapped_sides_of_attention(opened: Opened) -> None:
    op = opened.ops("scaled_dot_product_attention", "matmul")[0]
    one, other = ("query", "key") if op.type != "matmul" else ("x", "y")
    query, key = op.inputs[one].arguments[0], op.inputs[other].arguments[0]
    query.name, key.name = key.name, query.name


def wrong_class(opened: Opened) -> None:
    """Each class looks up its neighbour's embedding."""
    opened.change(opened.ops("gather")[0], "x", lambda table: np.roll(table, 1, axis=0))


PLANTED: tuple[Plant, ...] = (
    transposed_weight, swapped_channels, swapped_input_channels, mirrored_kernel, weight_a_few_percent_off, lost_bias,
    wrong_epsilon, wrong_frequency, gain_of_a_norm, sine_for_cosine, another_activation, difference_for_sum,
    swapped_halves, swapped_sides_of_attention, wrong_class,
)  # fmt: skip
KINDS = (("pair", "fp16"), ("split", "fp32"))


def _save(folder: Path) -> None:
    """A model whose every weight is drawn, so that no gain is one."""
    unet = unet2d(**SMALL_CLASS)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    save_class_model(unet, folder)


@pytest.fixture(scope="module", params=KINDS, ids=" ".join)
def sound(request: pytest.FixtureRequest, export_once: Export) -> Path:
    """A bundle for Core ML that holds, without trajectories."""
    layout, dtype = request.param
    coreml = CoreMLConfig(dtype=dtype, layout=layout)
    config = edgediff.ExportConfig(steps=2, targets=("coreml",), coreml=coreml, verify=VerifyConfig(mode="graphs"))
    return export_once(saved_once("drawn", _save), config)


def _assert_found(sound: Path, bundle: Path, plant: Plant) -> None:
    shutil.copytree(sound, bundle)
    planted = 0
    for package in sorted(bundle.glob("coreml/*.mlpackage")):
        try:
            change_package(package, plant)
        except (StopIteration, IndexError):  # not every part has such an operation
            continue
        planted += 1
    assert planted
    reseal(bundle)
    report = verify_bundle(bundle)
    assert not report.ok
    # Rounding to fp16 would hide several of these from a floor of 45 dB: the program's own row finds them.
    check = "program" if any(row.check == "program" for row in report.rows) else "graph"
    assert any(row.ok is False for row in report.rows if row.check == check)


@pytest.mark.parametrize("plant", [swapped_input_channels, sine_for_cosine], ids=lambda plant: plant.__name__)
def test_a_planted_error_is_found_in_what_every_test_shares(coreml_bundle: Path, tmp_path: Path, plant: Plant) -> None:
    _assert_found(coreml_bundle, tmp_path / "bundle", plant)


@pytest.mark.long
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_error_is_found(sound: Path, tmp_path: Path, plant: Plant) -> None:
    _assert_found(sound, tmp_path / "bundle", plant)


@pytest.mark.long
def test_what_is_only_written_anew_holds(sound: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(sound, tmp_path / "bundle")
    for package in bundle.glob("coreml/*.mlpackage"):
        change_package(package, lambda opened: None)
    reseal(bundle)
    assert verify_bundle(bundle).ok
