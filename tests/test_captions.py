"""Folders of images with captions: what is read, what is skipped and counted, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioned import COLOURS, captioned_folder, rows_of, write_rows
from PIL import Image

from edgediff.data.batches import hash_of
from edgediff.data.captions import read_captioned
from edgediff.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return captioned_folder(tmp_path / "drawings")


def texts(data: Any) -> list[str]:
    return [caption[0][0] for caption in data.captions]


def test_the_split_says_what_is_learnt(folder: Path) -> None:
    data, held_out = read_captioned(folder, 16)
    assert texts(data) == [row["text"] for row in sorted(rows_of(), key=str) if row["split"] == "train"]
    assert texts(held_out) == [f"{colour} stripes, flat" for colour in sorted(COLOURS)]
    assert (data.skipped.count, len(data.names)) == (0, 0)
    with Image.open(folder / "blue" / "000.png") as image:
        np.testing.assert_array_equal(data.images[0], np.asarray(image))
    assert data.take(np.array([3, 0])).captions == (data.captions[3], data.captions[0])


def test_other_captions_are_other_data(folder: Path) -> None:
    before = hash_of(read_captioned(folder, 16)[0])
    rows = rows_of()
    rows[0]["text"] += "!"
    write_rows(folder, rows)
    assert hash_of(read_captioned(folder, 16)[0]) != before


def test_text_files_beside_the_images(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for row in rows_of():
        (folder / row["file_name"]).with_suffix(".txt").write_text(f"  {row['name']}\n painting\n")
    (folder / "red" / "000.txt").unlink()
    (folder / "red" / "001.txt").write_text(" \n")
    data, held_out = read_captioned(folder, 16)
    assert set(texts(data)) == {f"{colour} painting" for colour in COLOURS}
    assert (len(data), len(held_out)) == (14, 0)
    assert data.skipped.in_words() == "2 images skipped: 2 without a caption (red/000.png, red/001.png)"


def test_forms_are_made_of_columns(folder: Path) -> None:
    rows = rows_of()
    rows[0] |= {"text": None, "keywords": []}
    write_rows(folder, rows)
    data, _ = read_captioned(folder, 16, ("{text}", "{keywords}, {name}", "a {name}"))
    found = {caption for caption in data.captions if caption[2] == ("a red",)}
    assert ((), (), ("a red",)) in found
    assert (("red stripes, flat",), ("paint, red", "redish, red"), ("a red",)) in found


@pytest.mark.parametrize("form", ["no column", "{", "{name.text}", "{0[a]}", "{}", "{name!r}", "{name:>4}"])
def test_a_form_that_is_no_template_is_refused(folder: Path, form: str) -> None:
    with pytest.raises(ConfigError, match="is no template"):
        read_captioned(folder, 16, (form,))


def test_a_column_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the column 'style'; columns: file_name, keywords, name, split, text"):
        read_captioned(folder, 16, ("{style}",))
    (tmp_path / "values.txt").write_text("flat")
    with pytest.raises(ConfigError, match="has the column 'style'"):
        read_captioned(folder, 16, only={"style": str(tmp_path / "values.txt")})


def test_only_some_values_of_a_column(folder: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.txt"
    values.write_text("red\n\n blue \n")
    data, held_out = read_captioned(folder, 16, ("{name}",), {"name": str(values)})
    assert (set(texts(data)), set(texts(held_out)), len(data), len(held_out)) == ({"red", "blue"},) * 2 + (6, 2)
    lists, _ = read_captioned(folder, 16, ("{name}",), {"keywords": str(write(tmp_path, "greenish"))})
    assert set(texts(lists)) == {"green"}
    both = {"name": str(values), "keywords": str(write(tmp_path, "redish"))}
    assert set(texts(read_captioned(folder, 16, ("{name}",), both)[0])) == {"red"}


def write(folder: Path, text: str) -> Path:
    (folder / "more.txt").write_text(text)
    return folder / "more.txt"


def test_values_that_do_not_occur_are_refused(folder: Path, tmp_path: Path) -> None:
    for text, words in (
        (
            "red\npink\nwhite\nblack\nbrown",
            r"has 4 values that no image has in its column 'name' \(black, brown, pink, ",
        ),
        ("\n", "is empty; expected values of 'name', one a line"),
    ):
        with pytest.raises(DataError, match=words):
            read_captioned(folder, 16, only={"name": str(write(tmp_path, text))})
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        read_captioned(folder, 16, only={"name": str(tmp_path / "nowhere.txt")})
    some = read_captioned(folder, 16, only={"name": str(write(tmp_path, "red\npink"))}, strict=False)
    assert len(some[0]) == 3


def test_images_without_a_caption_are_counted(folder: Path) -> None:
    rows = rows_of()
    rows[0]["text"] = ""
    rows[1]["text"] = None
    del rows[2]["text"]
    write_rows(folder, [*rows[:-1], {"file_name": "gone.png", "text": "gone"}])
    data, _ = read_captioned(folder, 16)
    assert data.skipped.in_words() == (
        "5 images skipped: 4 without a caption (grey/003.png, red/000.png, red/001.png, ...), 1 not found (gone.png)"
    )
    assert len(data) == 9


def test_other_sizes_and_modes(folder: Path) -> None:
    """They are brought to size and to RGB; smaller ones and broken ones are skipped and named."""
    ramp = np.linspace(0, 255, 40 * 24, dtype=np.uint8).reshape(24, 40)
    Image.fromarray(ramp).save(folder / "red" / "000.png")
    Image.fromarray(ramp).convert("P").save(folder / "red" / "001.png")
    Image.fromarray(np.dstack([ramp] * 4)).save(folder / "red" / "002.png")
    Image.fromarray(ramp[:8, :8]).save(folder / "green" / "000.png")
    (folder / "green" / "001.png").write_bytes(b"no image")
    data, _ = read_captioned(folder, 16)
    assert data.images.shape == (10, 16, 16, 3)
    assert data.skipped.in_words() == (
        "2 images skipped: 1 smaller than 16x16 (green/000.png), 1 cannot be read (green/001.png)"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"metadata\.jsonl is empty; expected a line for each image"),
        ("\n \n", r"metadata\.jsonl is empty"),
        ("{", r"line 1 cannot be read: Input data was truncated; expected an object with file_name and text"),
        ("[1]", "line 1 cannot be read: Expected `object`"),
        ('{"text": "a"}', "line 1 cannot be read: file_name is None"),
        ('\n{"file_name": 3}', "line 2 cannot be read: file_name is 3"),
        ('{"file_name": "../a.png"}', "line 1 cannot be read: file_name '../a.png' is outside of the folder"),
        ('{"file_name": "red/000.png"}\n\n{"file_name": "./red/000.png"}', "line 3 names red/000.png, as line 1 does"),
        ('{"file_name": "red/000.png"}', r"no image in .* has the column 'text'; columns: file_name"),
        (
            '{"file_name": "red/000.png", "text": ""}',
            r"no captions in .*: expected .*; 16 images skipped: 16 without a caption \(blue/000",
        ),
        ('{"file_name": "red/000.png", "text": "a"}', r"has 1 images to learn from; expected 2 or more"),
    ],
)
def test_metadata_that_cannot_be_used(folder: Path, text: str, words: str) -> None:
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises((DataError, ConfigError), match=words) as caught:
        read_captioned(folder, 16)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_text(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_captioned(folder, 16)


def test_no_split_to_learn_from(folder: Path) -> None:
    write_rows(folder, [row | {"split": "validation"} for row in rows_of()])
    with pytest.raises(DataError, match=r"has 0 images to learn from; expected 2 or more .* column split, train there"):
        read_captioned(folder, 16)


def test_a_line_may_have_any_character(folder: Path) -> None:
    rows = rows_of()
    rows[0]["text"] = "a\u2028b {c}"
    (folder / "metadata.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert "a b {c}" in texts(read_captioned(folder, 16)[0])
