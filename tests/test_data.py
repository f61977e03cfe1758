"""Image folders: the order, how an image is brought to size, and what is refused."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgediff.errors import DataError
from edgediff.train import data
from edgediff.train.data import ImageSet, divide, read_image, read_images, shuffled

RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8) if pixels is None else pixels).save(path, **options)
    return path


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_order_is_that_of_the_names(tmp_path: Path) -> None:
    pixels = {name: random_pixels(8, 8, 3) for name in ("b/2.png", "a/10.png", "b/1.PNG", "a/9.bmp")}
    for name, image in pixels.items():
        write(tmp_path / name, image)
    found = read_images(tmp_path, 8)
    assert found.names == ("a", "b")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.images.dtype == np.uint8
    expected = np.stack([pixels[name] for name in ("a/10.png", "a/9.bmp", "b/1.PNG", "b/2.png")])
    np.testing.assert_array_equal(found.images, expected)


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / ".hidden" / "1.png")
    for name in ("a/.1.png", "a/notes.txt", "README.md"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "a" / "folder.png").mkdir()
    assert len(read_images(tmp_path, 8)) == 1


def box_average(pixels: np.ndarray) -> np.ndarray:
    height, width, channels = pixels.shape
    mean = pixels.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))
    return np.floor(mean + 0.5)


def test_twice_the_size_is_averaged_and_no_more(tmp_path: Path) -> None:
    pixels = random_pixels(32, 32, 3)
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.png", pixels), 16), box_average(pixels))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 32), pixels)


def test_larger_ones_go_through_lanczos_at_twice_the_size(tmp_path: Path) -> None:
    pixels = random_pixels(50, 50, 3)
    file = write(tmp_path / "a.png", pixels)
    twice = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(read_image(file, 16), box_average(twice))


@pytest.mark.parametrize("shape", [(16, 21), (22, 16)])
def test_the_centre_is_cut_out(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = random_pixels(*shape, 3)
    top, left = ((side - 16) // 2 for side in shape)
    expected = pixels[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.png", pixels), 16), expected)


def test_photographs_are_turned_as_they_say(tmp_path: Path) -> None:
    pixels = random_pixels(16, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = write(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(read_image(file, 16), pixels[::-1, ::-1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(random_pixels(8, 8, 3)).convert(mode)
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(file)
    assert read_image(file, 8).shape == (8, 8, 3)


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    def refuses(*parts: str, minimum: int = 1) -> None:
        with pytest.raises(DataError) as caught:
            read_images(tmp_path / "images", 8, minimum)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    refuses("no such folder", str(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "1.png")
    refuses("expected a subfolder for each class")
    (tmp_path / "images" / "Kiwi").mkdir()
    refuses("no images in", "Kiwi", ".png")
    write(tmp_path / "images" / "Kiwi" / "1.png")
    refuses("has 1 images", "expected 2 or more", minimum=2)
    write(tmp_path / "images" / "Kiwi" / "2.png", random_pixels(8, 7, 3))
    refuses("2.png is 7x8", "expected 8x8 or larger")
    good = (tmp_path / "images" / "Kiwi" / "1.png").read_bytes()
    for damaged in (b"", b"no image", good[: len(good) // 2]):
        (tmp_path / "images" / "Kiwi" / "2.png").write_bytes(damaged)
        refuses("2.png cannot be read as an image")


def test_an_order_is_a_permutation_of_its_seed() -> None:
    order = shuffled(1000, 3)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == shuffled(1000, 3).tolist() != shuffled(1000, 4).tolist()
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_dividing_holds_out_of_every_class(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 2), ("c", 1)):
        for i in range(count):
            write(tmp_path / name / f"{i:02}.png", np.full((8, 8, 3), i, np.uint8))
    images = read_images(tmp_path, 8)
    rest, held_out = divide(images, 0.25, seed=0)
    assert np.bincount(held_out.labels, minlength=3).tolist() == [5, 1, 0]
    assert np.bincount(rest.labels, minlength=3).tolist() == [15, 1, 1]
    assert rest.names == held_out.names == images.names

    def contents(*sets: ImageSet) -> list[tuple[int, int]]:
        return sorted(
            (int(k), int(image[0, 0, 0])) for each in sets for k, image in zip(each.labels, each.images, strict=True)
        )

    assert contents(rest, held_out) == contents(images)


def test_examples_hold() -> None:
    assert doctest.testmod(data) == (0, 1)
