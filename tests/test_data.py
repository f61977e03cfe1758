"""Image folders: the order, how an image is brought to size, and what is refused."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgediff.data.image_folder import ImageSet, Reason, Skipped, divide, read_image, read_images, shuffled
from edgediff.errors import DataError

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


def test_files_that_are_no_images_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / ".hidden" / "1.png")
    for name in ("a/.1.png", "a/notes.txt", "README.md"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "a" / "folder.png").mkdir()
    assert len(read_images(tmp_path, 8)) == 1


def test_images_are_known_by_their_content(tmp_path: Path) -> None:
    """Under every name that an image has, and under none."""
    pixels = np.full((8, 8, 3), 200, np.uint8)
    kinds = {"jpg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "j2k": "JPEG2000",
             "tiff": "TIFF", "dib": "BMP", "apng": "PNG", "dat": "PNG", "": "WEBP"}  # fmt: skip
    for name, kind in kinds.items():
        write(tmp_path / f"a.{name}".rstrip("."), pixels, format=kind)
    found = read_images(tmp_path, 8)
    assert len(found) == len(kinds)
    assert found.skipped.count == 0
    np.testing.assert_allclose(found.images.astype(int), 200, atol=3)


def test_images_of_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    write(tmp_path / "2.ppm")
    (tmp_path / "3.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "4.svg").write_text("<svg/>")
    (tmp_path / "5.jpg").symlink_to(tmp_path / "nowhere")
    assert read_images(tmp_path, 8).skipped.in_words() == (
        "4 images skipped: 3 of a format that is not read (2.ppm, 3.heic, 4.svg), 1 cannot be read (5.jpg)"
    )


def test_folders_in_a_class_belong_to_it(tmp_path: Path) -> None:
    for value, name in enumerate(("a/1.png", "a/2/x.png", "a/2/y/z.png", "a/3.png", "b/1.png")):
        write(tmp_path / name, np.full((8, 8, 3), value, np.uint8))
    write(tmp_path / "a" / "2" / ".hidden" / "x.png")
    (tmp_path / "a" / "2" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "2" / "broken.jpg").write_bytes(b"")
    found = read_images(tmp_path, 8)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [0, 0, 0, 0, 1]
    assert found.skipped.in_words() == "1 image skipped: 1 cannot be read (a/2/broken.jpg)"


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """A class's is refused, since it is written into the model; a file's is read, and said in ASCII."""
    folder = tmp_path / "images"
    write(folder / "a" / os.fsdecode(b"1\xe9.png"))
    (folder / "a" / os.fsdecode(b"2\xe9.png")).write_bytes(b"")
    found = read_images(folder, 8)
    assert len(found) == 1
    assert found.skipped.in_words() == "1 image skipped: 1 cannot be read (a/2\\udce9.png)"
    write(folder / os.fsdecode(b"caf\xe9") / "1.png")
    with pytest.raises(DataError, match=r"images/caf\\udce9: the name of this class is not UTF-8; rename the folder"):
        read_images(folder, 8)
    for refused in (tmp_path / os.fsdecode(b"\xe9"), write(tmp_path / os.fsdecode(b"\xe8") / "1.png").parent):
        with pytest.raises(DataError) as caught:
            read_images(refused, 8, minimum=2)
        str(caught.value).encode()


def box_average(pixels: np.ndarray) -> np.ndarray:
    height, width, channels = pixels.shape
    mean = pixels.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))
    return np.floor(mean + 0.5)


def test_twice_the_size_is_averaged_and_no_more(tmp_path: Path) -> None:
    pixels = random_pixels(32, 32, 3)
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.png", pixels), 16), box_average(pixels))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 32), pixels)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BOX))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 20), expected)


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


# What is left out


def damaged_folder(folder: Path) -> Path:
    good = write(folder / "Kiwi" / "1.png").read_bytes()
    write(folder / "Plum" / "1.png", np.full((8, 8, 3), 9, np.uint8))
    damaged = {"2.png": b"", "3.JPG": b"no image", "4.png": good[: len(good) // 2], "5.gif": b"GIF89a"}
    for name, content in damaged.items():
        (folder / "Kiwi" / name).write_bytes(content)
    write(folder / "Plum" / "0.png", random_pixels(8, 7, 3))
    # 90 and 900 million pixels, by a header.
    bitmap = io.BytesIO()
    Image.new("RGB", (8, 8)).save(bitmap, format="BMP")
    for name, width in (("2.bmp", 9000), ("3.bmp", 90000)):
        header = bitmap.getvalue()[:18] + struct.pack("<ii", width, 10000)
        (folder / "Plum" / name).write_bytes(header + bitmap.getvalue()[26:])
    return folder


def test_what_cannot_be_used_is_left_out_counted_and_named(tmp_path: Path) -> None:
    found = read_images(damaged_folder(tmp_path), 8)
    assert found.names == ("Kiwi", "Plum")
    assert found.labels.tolist() == [0, 1]
    assert found.images[:, 0, 0, 0].tolist() == [0, 9]
    assert found.skipped == Skipped(
        (
            Reason("cannot be read", 4, ("Kiwi/2.png", "Kiwi/3.JPG", "Kiwi/4.png")),
            Reason("smaller than 8x8", 1, ("Plum/0.png",)),
            Reason("too large to decode", 2, ("Plum/2.bmp", "Plum/3.bmp")),
        )
    )
    assert found.skipped.count == 7
    assert found.skipped.in_words() == (
        "7 images skipped: 4 cannot be read (Kiwi/2.png, Kiwi/3.JPG, Kiwi/4.png, ...), "
        "1 smaller than 8x8 (Plum/0.png), 2 too large to decode (Plum/2.bmp, Plum/3.bmp)"
    )
    assert Skipped().in_words() == ""
    assert found.take(np.array([0])).skipped.count == 0


def test_reading_one_image_says_what_is_wrong(tmp_path: Path) -> None:
    folder = damaged_folder(tmp_path)
    for name, words in (
        ("Kiwi/2.png", "cannot be read as an image"),
        ("Kiwi/4.png", "cannot be read as an image"),
        ("Plum/0.png", "is 7x8; expected 8x8 or larger"),
        ("Plum/2.bmp", r"too large to decode: Image size \(90000000 pixels\)"),
        ("none.png", "cannot be read as an image"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            read_image(folder / name, 8)
        assert str(folder / name) in str(caught.value)
        assert "\n" not in str(caught.value)


# Folders


def test_images_alone_have_no_classes(tmp_path: Path) -> None:
    for name, value in (("2.png", 2), ("1.JPEG", 1), ("3.png", 3)):
        write(tmp_path / name, np.full((8, 8, 3), value, np.uint8))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "4.png").write_bytes(b"")
    found = read_images(tmp_path, 8, minimum=3)
    assert found.names == ()
    assert found.labels.tolist() == [0, 0, 0]
    assert found.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert found.skipped.in_words() == "1 image skipped: 1 cannot be read (4.png)"
    rest, held_out = divide(found, 0.3, seed=0)
    assert (len(rest), len(held_out)) == (2, 1)


def test_progress_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "a" / "2.png")
    said: list[tuple[str, float]] = []
    read_images(tmp_path, 8, progress=lambda *args: said.append(args))
    assert said == [("reading images: 0 of 2", 0.0)]


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "images"

    def refuses(*parts: str, minimum: int = 1, size: int = 8) -> None:
        with pytest.raises(DataError) as caught:
            read_images(folder, size, minimum)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    refuses("no such folder", str(folder))
    folder.write_text("a file")
    refuses("a file; expected a folder", str(folder))
    folder.unlink()
    folder.mkdir()
    refuses("no images in", "expected a subfolder for each class, or images")
    (folder / "Kiwi").mkdir()
    refuses("no images in", "Kiwi", "expected files of the formats", "PNG")
    write(folder / "Kiwi" / "1.png")
    refuses("has 1 images", "expected 2 or more", minimum=2)
    write(folder / "Kiwi" / "2.png", random_pixels(8, 7, 3))
    refuses("has 1 images that can be used; expected 2 or more; 1 image skipped", "smaller than 8x8", minimum=2)
    refuses("no images left in", "Kiwi: 2 images skipped: 2 smaller than 9x9 (Kiwi/1.png, Kiwi/2.png)", size=9)
    (folder / "Plum").mkdir()
    refuses("no images in", "Plum")
    (folder / "Plum" / "broken.png").write_bytes(b"")
    refuses("no images left in", "Plum: 1 image skipped: 1 cannot be read (Plum/broken.png)")
    write(folder / "loose.png")
    refuses("has images (loose.png) beside folders (Kiwi)", "expected a subfolder for each class, or images alone")


def test_more_images_than_there_is_memory_for(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1 images of 20000000x20000000 take 1200000\.0 GB, more than there is memory"):
        read_images(tmp_path, 20_000_000)


# Orders


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
