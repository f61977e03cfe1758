"""Kinds of image files: each is read as RGB, or skipped with a reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgediff.data.image_folder import read_image, read_images
from edgediff.errors import DataError

RNG = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png_of_16_bits(values: np.ndarray, transparent: int | None = None) -> bytes:
    """A 16-bit PNG of 1 to 4 channels, which Pillow cannot write in colour."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = random_pixels(8, 8, 3)


def grey_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "A.TIFF", "a.webp", "a.GIF"])
def test_lossless_files_give_their_pixels(tmp_path: Path, name: str) -> None:
    flat = np.full((8, 8, 3), (200, 30, 90), np.uint8)  # one colour, which a palette can have
    save(tmp_path / name, flat, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(read_images(tmp_path, 8).images, flat[None])


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_grey_images_and_palettes(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.where(GREY > 100, 255, 0).astype(np.uint8) if mode == "1" else GREY)
    expected = np.asarray(image.convert("RGB"))
    image.convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 8), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:4], alpha[4:] = 128, 255
    source = Image.fromarray(COLOUR).convert("L").convert("RGB") if mode == "LA" else Image.fromarray(COLOUR)
    image = source.convert(mode)
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 8).astype(float)
    share = alpha[:, :, None] / 255
    expected = share * np.asarray(source) + (1 - share) * 255
    np.testing.assert_allclose(found, expected, atol=1)
    np.testing.assert_array_equal(found[4:], np.asarray(source)[4:])


@pytest.mark.parametrize(
    ("name", "transparency"),
    [("a.png", 7), ("a.gif", 7), ("a.png", bytes([255] * 7 + [0] + [255] * 248))],
    ids=["png", "gif", "alphas"],
)
def test_palettes_with_transparency(tmp_path: Path, name: str, transparency: int | bytes) -> None:
    image = Image.frombytes("P", (8, 8), bytes(range(64)))
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 10)])
    image.save(tmp_path / name, transparency=transparency, optimize=False)
    found = read_image(tmp_path / name, 8)
    assert found[0, 7].tolist() == [255, 255, 255]
    assert found[0, 6].tolist() == [6, 249, 10]


def test_a_transparent_grey_value(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png", transparency=int(GREY[0, 3]))
    (tmp_path / "b.png").write_bytes(png_of_16_bits(GREY[:, :, None].astype(np.uint16) * 257, 257 * int(GREY[0, 3])))
    expected = np.where(GREY[0, 3] == GREY, 255, GREY)
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name, 8), grey_rgb(expected))


def test_cmyk_and_inverted_jpegs_of_it(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    image = Image.fromarray(flat).convert("CMYK")
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 8), flat)
    # JPEGs have them inverted, as Adobe's do; the segment that says so is often missing.
    image.save(tmp_path / "adobe.jpg", quality=100)
    data = (tmp_path / "adobe.jpg").read_bytes()
    start = data.index(b"\xff\xee\x00\x0eAdobe")
    (tmp_path / "silent.jpg").write_bytes(data[:start] + data[start + 16 :])
    for name in ("adobe.jpg", "silent.jpg"):
        np.testing.assert_allclose(read_image(tmp_path / name, 8).astype(int), flat, atol=3)


def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.rint(values / 257).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "b.tif")
    Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(tmp_path / "c.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "d.tif")
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "e.tif")
    modes = {}
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as opened:
            modes[file.name] = opened.mode
        np.testing.assert_array_equal(read_image(file, 8), grey_rgb(expected), err_msg=file.name)
    assert modes == {"a.png": "I;16", "b.tif": "I;16", "c.tif": "I;16B", "d.tif": "I", "e.tif": "F"}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_pngs_in_colour_and_with_transparency(tmp_path: Path, channels: int) -> None:
    values = RNG.integers(0, 65536, (8, 8, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[:, :, -1] = 65535
    (tmp_path / "a.png").write_bytes(png_of_16_bits(values))
    colour = values[:, :, :3] if channels > 2 else values[:, :, [0, 0, 0]]
    # Pillow takes the high byte of colours: half a level less on average.
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 8), colour / 257, atol=1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((8, 8), 70000, np.int32), "70000 to 70000; expected 0 to 65535"),
        (np.full((8, 8), -1, np.int32), "-1 to -1; expected"),
        (np.full((8, 8), 200, np.int32), "200 to 200; expected 0 to 65535, and above 255 somewhere"),
        (np.full((8, 8), 1.5, np.float32), "1.5 to 1.5; expected 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "nan to nan; expected 0 to 1"),
    ],
)
def test_values_of_an_unknown_range_are_skipped(tmp_path: Path, values: np.ndarray, words: str) -> None:
    save(tmp_path / "1.png", COLOUR)
    Image.fromarray(values).save(tmp_path / "2.tif")
    with pytest.raises(DataError, match=rf"2.tif has values of {words}"):
        read_image(tmp_path / "2.tif", 8)
    found = read_images(tmp_path, 8).skipped
    assert found.in_words() == "1 image skipped: 1 of an unknown range of values (2.tif)"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_is_read(tmp_path: Path, name: str) -> None:
    colours = ("#c81e5a", "white")
    first, second = (Image.new("RGB", (8, 8), colour) for colour in colours)
    options = {"lossless": True} if name == "a.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / name) as opened:
        assert opened.n_frames == 2
    assert read_image(tmp_path / name, 8)[0, 0].tolist() == [0xC8, 0x1E, 0x5A]


def test_contents_count_and_not_the_suffix(tmp_path: Path) -> None:
    pixels = random_pixels(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", 8), pixels)
    Image.fromarray(pixels).save(tmp_path / "b.png", format="EPS")
    with pytest.raises(DataError, match=r"b.png cannot be read as an image"):
        read_image(tmp_path / "b.png", 8)


def test_damaged_bytes_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "a.png": (Image.fromarray(COLOUR), {"exif": exif}),
        "b.png": (Image.fromarray(COLOUR).quantize(16), {"transparency": 3}),
        "c.jpg": (Image.fromarray(COLOUR), {"exif": exif}),
        "d.jpg": (Image.fromarray(COLOUR).convert("CMYK"), {}),
        "e.gif": (Image.fromarray(COLOUR).quantize(16), {}),
        "f.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), {}),
        "g.webp": (Image.fromarray(COLOUR), {"exif": exif}),
        "h.bmp": (Image.fromarray(COLOUR), {}),
    }
    read, refused = 0, 0
    for name, (image, options) in pictures.items():
        image.save(tmp_path / name, **options)
        whole = (tmp_path / name).read_bytes()
        assert read_image(tmp_path / name, 8).shape == (8, 8, 3)
        for number in range(60):
            data = bytearray(whole)
            for _ in range(1 + number % 4):
                data[rng.integers(len(data) if number % 2 else min(len(data), 120))] = rng.integers(256)
            (tmp_path / name).write_bytes(data if number % 3 else data[: rng.integers(len(data))])
            try:
                assert read_image(tmp_path / name, 8).shape == (8, 8, 3)
                read += 1
            except DataError:
                refused += 1
    assert min(read, refused) > 50
