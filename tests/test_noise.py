"""The noise: known answers, independence of how images are drawn, and that it is normal."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgediff_runtime.errors import EdgeRuntimeError, RequestError
from edgediff_runtime.noise import noise, philox

GOLDEN = json.loads((Path(__file__).parents[1] / "runtime/golden/noise.json").read_text())
RANDOM123 = {
    "00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344": "d16cfe09 94fdcceb 5001e420 24126ea1",
}


def words_of(texts):
    return [int(text, 16) for text in texts]


@pytest.mark.parametrize("case", GOLDEN["philox4x32_10"], ids=lambda case: case["counter"][0])
def test_philox_gives_random123s_known_answers(case):
    assert RANDOM123[" ".join(case["counter"])] == " ".join(case["words"])
    words = philox(np.array(words_of(case["counter"]), dtype=np.uint32), tuple(words_of(case["key"])))
    assert words.dtype == np.uint32
    assert words.tolist() == words_of(case["words"])


def test_philox_treats_each_row_alone():
    counter = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    words = philox(counter, (1, 2))
    assert words.shape == (2, 3, 4)
    np.testing.assert_array_equal(words[1, 2], philox(counter[1, 2], (1, 2)))


@pytest.mark.parametrize("case", GOLDEN["noise"], ids=lambda case: f"seed{case['seed']}")
def test_noise_is_the_golden_one(case):
    values = noise(int(case["seed"]), case["shape"], case["image"], case["draw"])
    assert values.dtype == np.float32
    assert list(values.shape) == case["shape"]
    np.testing.assert_allclose(values.ravel(), np.array(case["values"], np.float32), rtol=0, atol=1e-6)


def test_noise_follows_the_definition_element_by_element():
    seed, image, draw = 2**40 + 9, 5, 2
    values = noise(seed, (11,), image, draw)
    for i, value in enumerate(values):
        counter = np.array([i // 4, image, draw, 0], dtype=np.uint32)
        words = philox(counter, (seed % 2**32, seed // 2**32)).astype(np.float64)
        u = (words[2 * (i % 4 // 2) :][:2] + 0.5) / 2**32
        wave = np.cos if i % 2 == 0 else np.sin
        assert value == np.float32(np.sqrt(-2 * np.log(u[0])) * wave(2 * np.pi * u[1]))


def test_noise_is_standard_normal():
    values = noise(3, (200_000,)).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.08
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.005
    assert abs(np.corrcoef(values[0::2], values[1::2])[0, 1]) < 0.01


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_the_extreme_words_stay_finite(monkeypatch, word):
    monkeypatch.setattr(sys.modules[noise.__module__], "philox", lambda counter, key: np.full_like(counter, word))
    values = noise(0, (4,))
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 7


def test_an_image_is_the_same_whatever_else_is_drawn():
    alone = noise(11, (3, 8, 8), image=2)
    batch = np.stack([noise(11, (3, 8, 8), image=i) for i in range(5)])
    np.testing.assert_array_equal(batch[2], alone)
    assert len({image.tobytes() for image in batch}) == 5


def test_seeds_images_and_draws_do_not_overlap():
    drawn = [
        noise(seed, (16,), image, draw) for seed in (0, 1, 2**32, 2**32 + 1) for image in (0, 1) for draw in (0, 1)
    ]
    assert len(np.unique(np.concatenate(drawn))) == 16 * len(drawn)


def test_a_shorter_array_is_the_beginning_of_a_longer():
    np.testing.assert_array_equal(noise(0, (7,)), noise(0, (3, 4)).ravel()[:7])


def test_numpys_integers_serve():
    np.testing.assert_array_equal(noise(np.int64(3), (np.int32(2),), np.uint8(1)), noise(3, (2,), 1))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "0"])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(RequestError, match=r"seed .*expected an integer in \[0, 2\*\*64\)"):
        noise(seed, (2,))


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (2.0,), (True,), 4, "ab", (2**20, 2**20)])
def test_a_bad_shape_is_refused(shape):
    with pytest.raises(RequestError, match=r"shape .*expected"):
        noise(0, shape)


@pytest.mark.parametrize("which", ["image", "draw"])
@pytest.mark.parametrize("value", [-1, 2**32, 0.5])
def test_an_image_or_draw_out_of_range_is_refused(which, value):
    with pytest.raises(RequestError, match=f"{which} .*expected an integer in"):
        noise(0, (2,), **{which: value})


def test_errors_are_value_errors():
    assert issubclass(RequestError, EdgeRuntimeError)
    assert issubclass(EdgeRuntimeError, ValueError)
