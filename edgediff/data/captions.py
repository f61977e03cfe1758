"""Images with captions: a folder with ``metadata.jsonl``, as Hugging Face's image folders have it, or text files.

A line of ``metadata.jsonl`` is an object with an image's ``file_name``, its ``text`` and any further columns. Without
that file, the caption of ``a.png`` is the text of ``a.txt``. Images may lie in folders within.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import msgspec
import numpy as np

from edgediff.data.image_folder import Caption, ImageSet, Skipped, images_in, read_files
from edgediff.errors import ConfigError, DataError
from edgediff.outputs import as_text
from edgediff_runtime.errors import one_line

METADATA = "metadata.jsonl"
FILE, TEXT, SPLIT = "file_name", "text", "split"
# The split that is learnt from; all others are held out.
TAUGHT = "train"
# The text as it is.
PLAIN = (f"{{{TEXT}}}",)

Row = dict[str, Any]


def read_captioned(
    folder: str | Path,
    size: int,
    forms: tuple[str, ...] = PLAIN,
    only: Mapping[str, str] | None = None,
    *,
    strict: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Reads images with captions, each brought to `size` x `size` pixels, in the order of their names.

    An image without a caption is skipped and counted, like one that cannot be used.

    Args:
        forms: What captions are made of: ``{text}``, or ``{name}, {style}``. A column with a list gives a wording for
            each entry; where an image lacks a column, the form is left out of its caption.
        only: By column, a file of the values to keep, one a line.
        strict: Whether each of these values must occur.

    Returns:
        The images to learn from, and those that the column ``split`` holds out: none where there is no such column.

    Raises:
        ConfigError: A form is no template, or a column is not there.
        DataError: There is no such folder; metadata.jsonl is empty or damaged, or names an image twice; a file of
            values cannot be read, or has one that does not occur; no image with a caption is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file; expected a folder" if folder.exists() else "no such folder"
        raise DataError(f"no images at {as_text(folder)}: {what}")
    templates = [(form, _columns(form)) for form in forms]
    there = {path.relative_to(folder).as_posix(): path for path in images_in(folder)}
    metadata = folder / METADATA
    rows = _read_metadata(metadata) if metadata.exists() else _read_text_files(there)
    faults = [("without a caption", name) for name in there if name not in rows]
    if rows:
        _check_columns(as_text(folder), rows, [*(only or {}), *(name for _, each in templates for name in each)])
    for column, file in (only or {}).items():
        rows = _keep(rows, column, Path(file), strict)
    captions: dict[str, Caption] = {}
    for name in sorted(rows):
        caption = tuple(_wordings(form, columns, rows[name]) for form, columns in templates)
        if not any(caption):
            faults.append(("without a caption", name))
        elif name not in there:
            faults.append(("not found", name))
        else:
            captions[name] = caption
    if not captions:
        raise DataError(
            f"no captions in {as_text(folder)}: expected {METADATA} with {FILE} and {TEXT}, or a .txt file beside each "
            f"image{_with(faults)}"
        )
    images, read, unfit = read_files(folder, [there[name] for name in captions], size, progress)
    faults += unfit.values()
    names = [list(captions)[place] for place in read]
    every = ImageSet(images, np.zeros(len(read), np.int64), (), captions=tuple(captions[name] for name in names))
    taught = np.array([rows[name].get(SPLIT) in (None, TAUGHT) for name in names], dtype=bool)
    if taught.sum() < 2:
        raise DataError(
            f"{as_text(folder)} has {taught.sum()} images to learn from; expected 2 or more with a caption and, where "
            f"there is a column {SPLIT}, {TAUGHT} there{_with(faults)}"
        )
    data, held_out = (every.take(np.flatnonzero(each)) for each in (taught, ~taught))
    return replace(data, skipped=Skipped.of((what, as_text(name)) for what, name in faults)), held_out


def values_of(data: ImageSet, form: int) -> tuple[str, ...]:
    """What each image is called in one of the forms, the first wording; a DataError where an image is not."""
    values = tuple(next(iter(caption[form]), "") for caption in data.captions)
    if not all(values):
        first = next(words for wordings in data.captions[values.index("")] for words in wordings)
        raise DataError(
            f"{values.count('')} of {len(values)} images lack a column that is asked for, such as {first!r}; "
            f"complete {METADATA}"
        )
    return values


def _with(faults: Iterable[tuple[str, str]]) -> str:
    """What was skipped, behind a message."""
    words = Skipped.of((what, as_text(name)) for what, name in faults).in_words()
    return f"; {words}" if words else ""


def _read_metadata(file: Path) -> dict[str, Row]:
    """The columns of each image by its file's name within the folder."""
    rows: dict[str, Row] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=Row)
            name = _file_name(row)
        except (msgspec.DecodeError, ValueError) as e:
            raise DataError(
                f"{as_text(file)}: line {number} cannot be read: {one_line(e)}; expected an object with {FILE} and "
                f"{TEXT}"
            ) from e
        if name in rows:
            raise DataError(
                f"{as_text(file)}: line {number} names {name}, as line {line_of[name]} does; expected one line for "
                "each image"
            )
        rows[name], line_of[name] = row, number
    if not rows:
        raise DataError(f"{as_text(file)} is empty; expected a line for each image, an object with {FILE} and {TEXT}")
    return rows


def _file_name(row: Row) -> str:
    name = row.get(FILE)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{FILE} is {name!r}")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{FILE} {name!r} is outside of the folder")
    return path.as_posix()


def _read_text_files(images: Mapping[str, Path]) -> dict[str, Row]:
    """Each image's text file, for those that have one."""
    files = {name: path.with_suffix(".txt") for name, path in images.items()}
    return {name: {TEXT: "\n".join(_lines(file))} for name, file in files.items() if file.is_file()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"{as_text(file)} cannot be read as UTF-8 text: {one_line(e)}") from e


def _columns(form: str) -> tuple[str, ...]:
    """The columns that a form of captions names."""
    try:
        parts = list(Formatter().parse(form))
    except ValueError as e:
        raise ConfigError(f"the caption {form!r} is no template: {e}; expected one such as '{{{TEXT}}}'") from e
    columns = tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
    plain = all(name and not set(name) & set(".[]") for name in columns)
    if not columns or not plain or any(spec or conversion for _, _, spec, conversion in parts):
        raise ConfigError(f"the caption {form!r} is no template; expected columns in braces, such as '{{{TEXT}}}'")
    return columns


def _check_columns(where: str, rows: Mapping[str, Row], asked: Iterable[str]) -> None:
    known = {column for row in rows.values() for column in row}
    for column in asked:
        if column not in known:
            raise ConfigError(f"no image in {where} has the column {column!r}; columns: {', '.join(sorted(known))}")


def _keep(rows: Mapping[str, Row], column: str, file: Path, strict: bool) -> dict[str, Row]:
    """The rows whose value of a column is in a file of values."""
    wanted = {line.strip() for line in _lines(file)} - {""}
    strange = sorted(wanted - {value for row in rows.values() for value in _values(row.get(column))})
    if not wanted or (strict and strange):
        what = f"is empty; expected values of {column!r}, one a line"
        if wanted:
            what = f"has {len(strange)} values that no image has in its column {column!r} ({', '.join(strange[:3])}"
            what += f"{', ...' if len(strange) > 3 else ''}); remove them"
        raise DataError(f"{as_text(file)} {what}")
    return {name: row for name, row in rows.items() if wanted.intersection(_values(row.get(column)))}


def _wordings(form: str, columns: tuple[str, ...], row: Row) -> tuple[str, ...]:
    """A form's captions for one image; none where a column has no value."""
    found = product(*(_values(row.get(column)) for column in columns))
    return tuple(form.format_map(dict(zip(columns, values, strict=True))) for values in found)


def _values(value: Any) -> list[str]:
    """What a column says, in words without line breaks; a list says each of its entries."""
    if isinstance(value, list):
        return [word for entry in value for word in _values(entry)]
    words = " ".join(str(value).split()) if isinstance(value, str | int | float) else ""
    return [words] if words else []
