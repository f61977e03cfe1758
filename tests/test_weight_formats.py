"""Weights in fewer bits: the nearest that each format holds, and which weight is stored in which."""

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from edgediff.config.weight_plan import BITS, WEIGHT_FORMATS, coarsest, formats_of, read_plan
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.part import Part
from edgediff.models.stored_weights import StoredWeights, fits, taken_weights, uniform, weights_of
from edgediff.models.weight_formats import BLOCK, Half, Linear, Palette, store
from edgediff_runtime.manifest import WeightFormat

SHAPES = [(24, 40), (10, 7, 3, 3), (9, 33)]


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=shape).astype(np.float32)


def error(given: np.ndarray, form: WeightFormat) -> float:
    return float(np.abs(store(given, form).values() - given).max())


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_keeps_its_shape_and_comes_near(form: WeightFormat, shape: tuple[int, ...]) -> None:
    given = weight(shape)
    stored = store(given, form)
    values = stored.values()
    assert values.shape == shape
    assert values.dtype == np.float32
    # No worse than an even table over the weight's range: palettes are finer where there are more numbers, scales are
    # those of a channel or a block.
    even = np.ptp(given) / 2 ** min(BITS[form], 10) / math.sqrt(12)
    assert np.sqrt(np.mean((values - given) ** 2)) <= 1.1 * even
    assert stored.nbytes < given.nbytes


@pytest.mark.parametrize("form", ["fp16", "int8", "palette8", "palette4", "palette2"])
def test_what_is_stored_is_stored_as_it_is(form: WeightFormat) -> None:
    once = store(weight((24, 40)), form).values()
    assert np.array_equal(store(once, form).values(), once)


def test_int8_has_a_scale_for_each_output_channel() -> None:
    given = weight((6, 4, 3, 3)) * np.array([1, 10, 0.01, 1, 0, 3], np.float32).reshape(-1, 1, 1, 1)
    stored = store(given, "int8")
    assert isinstance(stored, Linear)
    assert stored.scales.shape == (6,)
    step = np.abs(given).reshape(6, -1).max(axis=1) / 127
    far = np.abs(stored.values() - given).reshape(6, -1).max(axis=1)
    assert (far <= 0.55 * step).all()  # half a step, of a scale that was rounded to fp16
    assert np.array_equal(stored.values()[4], given[4])


def test_scales_are_fp16_unless_they_are_too_small_for_it() -> None:
    assert store(weight((6, 40)), "int8").scales.dtype == np.float16  # type: ignore[union-attr]
    small = store(weight((6, 40)) * np.float32(1e-7), "int8")
    assert isinstance(small, Linear)
    assert small.scales.dtype == np.float32
    assert np.allclose(small.values(), weight((6, 40)) * 1e-7, atol=2e-10)


def test_int4_has_a_scale_for_each_block_of_the_flattened_inputs() -> None:
    given = weight((3, 5, 3, 3))  # 45 inputs: a block, and 13 of another
    stored = store(given, "int4")
    assert isinstance(stored, Linear)
    assert stored.scales.shape == (3, 2)
    assert stored.codes.min() == -8
    given.reshape(3, -1)[:, BLOCK:] *= 100
    again = store(given, "int4")
    assert np.array_equal(again.values().reshape(3, -1)[:, :BLOCK], stored.values().reshape(3, -1)[:, :BLOCK])


def test_a_palette_holds_few_numbers_exactly_and_many_nearly() -> None:
    few = np.array([0.5, -1.25, 3.0, 7.0], np.float32)[np.random.default_rng(0).integers(0, 4, (8, 9))]
    stored = store(few, "palette2")
    assert isinstance(stored, Palette)
    assert np.array_equal(stored.values(), few)
    forms: tuple[WeightFormat, ...] = ("palette2", "palette3", "palette4", "palette6", "palette8")
    given = weight((200, 90))
    far = [np.sqrt(np.mean((store(given, form).values() - given) ** 2)) for form in forms]
    assert far == sorted(far, reverse=True)
    # A normal distribution's best table of 16 is at 20.2 dB (Max 1960), of 4 at 9.3.
    assert 20 * np.log10(given.std() / far[2]) == pytest.approx(20.2, abs=0.15)
    assert 20 * np.log10(given.std() / far[0]) == pytest.approx(9.3, abs=0.1)


def test_fp16_is_fp16() -> None:
    stored = store(weight((4, 5)), "fp16")
    assert isinstance(stored, Half)
    assert np.array_equal(stored.values(), weight((4, 5)).astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_what_is_not_finite_is_refused(form: WeightFormat) -> None:
    given = weight((4, 40))
    given[1, 2], given[3, 0] = np.nan, np.inf
    with pytest.raises(UnsupportedError, match=r"conv_in.weight: 2 of its 160 numbers are not finite"):
        store(given, form, "conv_in.weight")


def test_fp16_refuses_what_it_does_not_hold() -> None:
    with pytest.raises(UnsupportedError, match=r"wide: fp16 overflows \(largest 1e\+05"):
        store(np.full((4, 4), 1e5, np.float32), "fp16", "wide")


# Which weights


class Two(Part):
    """A part that holds two layers and uses one."""

    def __init__(self) -> None:
        super().__init__(("x",), ("y",))
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(40, 30), nn.Linear(40, 30)

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": self.used(tensors["x"])}


def test_weights_are_those_of_two_dimensions_and_of_some_size() -> None:
    part = Two()
    assert list(weights_of(part)) == ["used.weight", "unused.weight"]
    assert list(weights_of(part.used, part.unused)) == ["weight", "adaptor.weight"]
    assert list(taken_weights(part, {"x": np.zeros((1, 40), np.float32)})) == ["used.weight"]
    assert not weights_of(nn.Linear(4, 4))


def test_below_eight_bits_the_smallest_tenth_and_what_does_not_fit_are_int8() -> None:
    weights = {"a": torch.empty(100, 96), "b": torch.empty(10, 70), "narrow": torch.empty(900, 9)}
    assert uniform(weights, "int8") == dict.fromkeys(weights, "int8")
    assert uniform(weights, "palette4") == {"a": "palette4", "b": "int8", "narrow": "palette4"}
    assert uniform(weights, "int4") == {"a": "int4", "b": "int8", "narrow": "int8"}
    assert uniform({"b": torch.empty(99, 70)}, "int4") == {"b": "int4"}
    assert uniform({"b": torch.empty(99, 70)}, "int4", "whole_blocks") == {"b": "int8"}
    assert fits(torch.empty(9, 64), "int4", "whole_blocks")
    assert uniform({**weights, "c": torch.empty(100, 60)}, "int4", "channels")["c"] == "int8"  # of 40 %


def test_without_blocks_int4_has_the_scale_of_the_least_error_for_each_channel() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 20, 3, 3)).astype(np.float32)
    weight[0, 0] = 30  # outliers that all others would pay for
    weight[1] = 0
    made = store(weight, "int4", scales="channels")
    assert isinstance(made, Linear)
    assert (made.bits, made.scales.shape) == (4, (6,))
    assert (made.scales > 0).all()
    assert -8 <= made.codes.min() <= made.codes.max() <= 7
    assert not made.values()[1].any()
    widest = np.abs(weight).reshape(6, -1).max(axis=1)[2:, None, None, None] / 7
    plain = np.clip(np.rint(weight[2:] / widest), -7, 7) * widest
    assert np.square(made.values()[2:] - weight[2:]).sum() < 0.9 * np.square(plain - weight[2:]).sum()
    assert store(weight, "int4").scales.ndim == 2


def test_a_weight_that_was_multiplied_by_a_constant_is_known() -> None:
    part = Two()
    weight = part.used.weight.detach().numpy()
    weights = StoredWeights({"used": part.used.weight}, {"used": "int8"})
    rng = np.random.default_rng(0)
    outputs, inputs = (rng.uniform(0.1, 2, size).astype(np.float32) for size in weight.shape)
    for array in (weight * outputs[:, None], weight * inputs, weight * np.float32(0.3)):
        assert weights.find(array) == []
        assert weights.find_scaled(array) == "used"
    assert weights.find_scaled(weight * outputs[:, None] * inputs) is None
    assert weights.find_scaled(weight + np.float32(1e-3)) is None


def test_a_weight_is_known_by_its_bytes() -> None:
    part = Two()
    part.unused.weight.data.copy_(part.used.weight.data)
    known = StoredWeights(weights_of(part), {"used.weight": "int8", "unused.weight": "int8"})
    array = part.used.weight.detach().numpy()
    assert known.find(array) == ["used.weight", "unused.weight"]
    assert known.find(array.astype(np.float16)) == ["used.weight", "unused.weight"]
    assert known.find(array.reshape(1, 30, 40, 1)) == ["used.weight", "unused.weight"]
    assert known.find(array.T) == []
    assert known.find(array + 1) == []
    assert known.elements == {"int8": 2400}
    rounded = known.rounded(part.used.weight)
    assert rounded is not None
    assert np.array_equal(rounded.numpy(), store(array, "int8").values())
    assert known.rounded(part.used.bias) is None


# Plans


def test_formats_are_those_of_the_manifest() -> None:
    assert set(BITS) == set(get_args(WeightFormat))
    assert formats_of("int4", "unet") == {"int4"}
    assert coarsest(None, "unet") is None


def test_a_plan_says_a_format_for_each_weight(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"components": {"unet": {"a": "int8", "b": "int4"}, "vae_decoder": {}}}))
    assert read_plan(path).components["unet"]["b"] == "int4"
    assert formats_of(str(path), "unet") == {"int8", "int4"}
    assert coarsest(str(path), "unet") == "int4"
    assert coarsest(str(path), "text_encoder") is None


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "not a plan of weights"), ("{}", "components"), ('{"components": {"unet": {"a": "int5"}}}', "int5"),
     ('{"components": {}, "colour": 1}', "colour")],
)  # fmt: skip
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_plan(path)


def test_what_is_no_format_and_no_file_is_refused_with_the_formats() -> None:
    with pytest.raises(ConfigError, match=r"weights 'int5': no format, and no plan.*expected one of: fp16, int8, int4"):
        formats_of("int5", "unet")
