"""Pictures that a request is given: any mode and size from Pillow, or arrays of one size; others are refused."""

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgediff_runtime import RequestError
from edgediff_runtime.editing import as_pixels, feathered
from edgediff_runtime.image import to_uint8
from edgediff_runtime.pictures import depths_of, images_of, masks_of, open_picture, resized

RED, HALF_RED = (255, 0, 0), (255, 0, 0, 128)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (37, 5), (5, 37), (640, 480)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_and_size_becomes_rgb(mode: str, size: tuple[int, int]) -> None:
    drawn = images_of(Image.new(mode, size), 16, 24)
    assert drawn.shape == (1, 16, 24, 3)
    assert drawn.dtype == np.uint8
    assert masks_of(Image.new("L", size, 255), 16, 24, Image.new(mode, size)).all()


def test_what_is_transparent_is_laid_on_white() -> None:
    assert images_of(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4, 4)[0, 0, 0].tolist() == [255, 255, 255]
    assert images_of(Image.new("RGBA", (4, 4), HALF_RED), 4, 4)[0, 0, 0].tolist() == [255, 127, 127]
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert images_of(palette, 4, 4)[0, 0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_their_range() -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert images_of(grey, 1, 3)[0, 0, :, 0].tolist() == [0, 128, 255]


def test_the_middle_of_a_wide_picture_stays() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = RED
    assert (images_of(Image.fromarray(wide), 10, 10) == RED).all()
    cut = masks_of(Image.fromarray(wide[..., 0]), 10, 10, Image.fromarray(wide))
    assert cut.all()


def test_several_pictures_are_a_batch() -> None:
    pictures = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (9, 4))]
    assert [each[0, 0].tolist() for each in images_of(pictures, 4, 4)] == [[255, 0, 0], [0, 0, 0]]
    assert images_of(np.zeros((4, 4), np.uint8), 4, 4).shape == (1, 4, 4, 3)
    assert images_of(torch.zeros((2, 4, 4, 3), dtype=torch.uint8), 4, 4).shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"image is float32 \[4, 4, 3\]; expected uint8 \[N, 4, 4, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"image is uint8 \[4, 4, 4\]"),
        (np.zeros((8, 4, 3), np.uint8), r"image has 4 x 8 pixels \(width x height\); expected uint8 \[N, 4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"image is uint8 \[0, 4, 4, 3\]"),
        ([[1, 2], [3]], "image is not an array"),
        ("apple.png", "image is str"),
        ([], "image is float64"),
    ],
)
def test_what_is_no_picture_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        images_of(given, 4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4), np.float32), r"mask_image is float32 \[4, 4\]; expected bool or uint8 \[N, 4, 4\]"),
        (np.ones((4, 8), bool), r"mask_image has 8 x 4 pixels"),
        (np.zeros((4, 4), bool), "mask_image covers nothing"),
        (np.stack([np.ones((4, 4), bool), np.zeros((4, 4), bool)]), "mask_image covers nothing"),
        (Image.new("L", (4, 4), 127), "mask_image covers nothing"),
        (Image.new("L", (8, 4), 255), r"mask_image has 8 x 4 pixels, the image 4 x 4 \(width x height\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        masks_of(given, 4, 4, Image.new("RGB", (4, 4)))


def test_half_white_and_more_is_drawn_anew() -> None:
    levels = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    wanted = [[False, False, True, True]]
    assert masks_of(levels, 1, 4, None)[0].tolist() == wanted
    assert masks_of(levels[..., None][None], 1, 4, None)[0].tolist() == wanted
    assert masks_of(Image.fromarray(levels), 1, 4, None)[0].tolist() == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4)), "the same everywhere"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.zeros((1, 2, 3, 4)), r"depth_map is float64 \[1, 2, 3, 4\]; expected numbers \[N, h, w\]"),
        (np.zeros((4, 4), bool), "depth_map is bool"),
    ],
)
def test_a_depth_map_that_says_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        depths_of(given, 4, 4)


@pytest.mark.parametrize("size", [(2, 3), (8, 8), (7, 20)])
def test_maps_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    maps = np.random.default_rng(0).normal(size=(2, 8, 9)).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None], size=size, mode="bicubic")
    np.testing.assert_allclose(resized(maps, *size), want[:, 0].numpy(), rtol=0, atol=1e-5)


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(to_uint8(as_pixels(every)), every)


def test_a_feather_fades_in_from_the_masks_edge() -> None:
    mask = np.zeros((1, 9, 9), bool)
    mask[:, 1:8, 1:8] = True
    assert feathered(mask, 0)[0, 4].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(3 * feathered(mask, 2)[0, 4], [0, 1, 2, 3, 3, 3, 2, 1, 0])
    mask[:, :, 8] = True  # to the picture's edge, which is none of the mask's
    np.testing.assert_allclose(3 * feathered(mask, 2)[0, 4], [0, 1, 2, 3, 3, 3, 3, 3, 3])


@pytest.mark.parametrize("level", [np.nan, np.inf])
@pytest.mark.parametrize("size", [(4, 4), (9, 5)])
def test_a_picture_of_what_is_no_number_is_refused(level: float, size: tuple[int, int]) -> None:
    given = Image.fromarray(np.full(size, level, np.float32))
    for read in (
        lambda: images_of(given, 4, 4),
        lambda: masks_of(given, 4, 4, None),
        lambda: depths_of(given, 4, 4),
    ):
        with pytest.raises(RequestError, match="holds NaN or infinity"):
            read()


def test_pictures_of_pillows_and_others_in_one_list_are_refused() -> None:
    one, other = Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)
    for given in ([one, other], [other, one], [one, None]):
        with pytest.raises(RequestError, match="image has pictures of Pillow's and others in one list"):
            images_of(given, 4, 4)


def test_a_tensor_with_gradients_is_an_array() -> None:
    depth = torch.arange(4.0, requires_grad=True).reshape(2, 2)
    assert depths_of(depth, 4, 4).tolist() == [[[0, 1], [2, 3]]]


def broken(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])


def animated(path: Path) -> None:
    first, *rest = [Image.new("L", (8, 8), level) for level in (0, 99, 200)]
    first.save(path, format="GIF", save_all=True, append_images=rest)


def huge(path: Path) -> None:
    """A PNG that says it has 16 billion pixels."""
    Image.new("L", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (2**17).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(data))


def bad_tiff(path: Path) -> None:
    """A TIFF whose width is missing: Pillow raises a TypeError."""
    Image.new("RGB", (8, 8)).save(path, "TIFF")
    path.write_bytes(path.read_bytes().replace(b"\x00\x01\x04\x00", b"\x99\x01\x04\x00", 1))


def bad_dds(path: Path) -> None:
    """A DDS of an unknown pixel format: Pillow raises a NotImplementedError."""
    Image.new("RGB", (8, 8)).save(path, "DDS")
    data = bytearray(path.read_bytes())
    data[80:84] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_bytes(b""), "it is damaged, or no picture"),
        (lambda path: path.write_text("<svg/>"), "it is damaged, or no picture"),
        (broken, "it is damaged, or no picture"),
        (animated, "it holds 3 pictures, as animations do; save one of them"),
        (huge, "it has more pixels than Pillow reads"),
        (bad_tiff, "it is damaged, or no picture"),
        (bad_dds, "it is damaged, or no picture"),
    ],
)
def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(RequestError) as refused:
        open_picture(path, "--image")
    assert str(refused.value).startswith(f"--image {path}: {message}")
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "suffix", ["bmp", "gif", "ico", "jpg", "pcx", "png", "ppm", "sgi", "tga", "tif", "webp", "dds"]
)
def test_whatever_is_damaged_is_a_picture_or_refused(tmp_path: Path, suffix: str) -> None:
    """Pillow's readers raise errors of many classes, and warn; a command line has one line to say."""
    path, random = tmp_path / f"picture.{suffix}", np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (9, 7, 3), dtype=np.uint8))
    (picture.convert("P") if suffix == "gif" else picture).save(path)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole[: int(random.integers(1, len(whole) + 1))])
        for place in random.integers(0, min(len(damaged), 128), 3):
            damaged[place] = random.choice([0, 1, 128, 255])
        path.write_bytes(damaged)
        with contextlib.suppress(RequestError):
            images_of(open_picture(path, "--image"), 8, 8)


def test_of_a_telephones_photograph_the_first_picture_counts(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8), "white").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert (images_of(open_picture(path, "--image"), 8, 8) == 255).all()


@pytest.mark.filterwarnings("error")
def test_a_large_photograph_is_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    path = tmp_path / "large.png"
    Image.new("L", (8, 8)).save(path)
    assert open_picture(path, "--image").size == (8, 8)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    photo = Image.new("RGB", (8, 4))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(path, exif=exif)
    assert open_picture(path, "--image").size == (4, 8)
