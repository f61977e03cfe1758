from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgediff
from edgediff.inspect.survey import survey_bundle
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import RequestError, clock_mask
from edgediff_runtime.clock import format_mask

PERIOD_OR_MASK = "expected a period such as 2 or a mask such as 1,0,1,0"


def mask(text: str) -> tuple[bool, ...]:
    return tuple(letter == "F" for letter in text)


@pytest.mark.parametrize(
    ("clock", "steps", "want"),
    [
        (1, 1, "F"),
        (1, 4, "FFFF"),
        (2, 1, "F"),
        (2, 8, "FcFcFcFc"),
        (2, 7, "FcFcFcF"),
        (3, 8, "FccFccFc"),
        (8, 8, "Fccccccc"),
        (9, 8, "Fccccccc"),
        (10**30, 3, "Fcc"),
        ("1", 3, "FFF"),
        ("2", 4, "FcFc"),
        (" 4 ", 5, "FcccF"),
        ("02", 4, "FcFc"),
        ("1,0,0,1", 4, "FccF"),
        (" 1 , 0,1 ", 3, "FcF"),
        ("1,1,1", 3, "FFF"),
        ([1], 1, "F"),
        ([1, 0, 1], 3, "FcF"),
        ((1, 0, 0, 1), 4, "FccF"),
        ([True, False], 2, "Fc"),
        ((1.0, 0.0), 2, "Fc"),
        ([np.int64(1), np.bool_(False)], 2, "Fc"),
    ],
)
def test_masks(clock: Any, steps: int, want: str) -> None:
    found = clock_mask(clock, steps)
    assert found == mask(want)
    assert all(type(full) is bool for full in found)


@pytest.mark.parametrize("period", range(1, 11))
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 20])
def test_a_period_begins_with_a_full_step_and_repeats(period: int, steps: int) -> None:
    found = clock_mask(period, steps)
    assert len(found) == steps
    assert [i for i, full in enumerate(found) if full] == list(range(0, steps, period))
    assert clock_mask(str(period), steps) == found


def test_a_period_written_as_a_mask_is_the_same_clock() -> None:
    found = clock_mask(3, 8)
    assert clock_mask(format_mask(found), 8) == clock_mask(list(found), 8) == clock_mask(found, 8) == found


def test_the_callers_list_is_left_as_it_was() -> None:
    given = [1, 0, 1]
    clock_mask(given, 3)
    assert given == [1, 0, 1]


def refused(clock: Any, steps: Any, *words: str) -> None:
    with pytest.raises(RequestError) as caught:
        clock_mask(clock, steps)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("clock", [0, -1, -100, "0", "000"])
def test_periods_below_one(clock: int | str) -> None:
    refused(clock, 4, f"clock is {int(clock)}; expected a period of 1 or more")


@pytest.mark.parametrize(
    "clock",
    ["", " ", ",", "1,", ",1", "1,,0", "-1", "+2", "2.0", "1_0", "1 0", "a", "1,a", "0x2", "1;0", "[1,0]", "auto:0.1"],
)
def test_text_that_is_neither_period_nor_mask(clock: str) -> None:
    refused(clock, 2, f"clock is {clock!r}; {PERIOD_OR_MASK}")


@pytest.mark.parametrize("clock", ["２", "1,０", "²", "٣", "1,٠", "Ⅱ"])  # noqa: RUF001
def test_digits_of_other_scripts(clock: str) -> None:
    refused(clock, 2, f"clock is {clock!r}; {PERIOD_OR_MASK}")


@pytest.mark.parametrize("clock", [True, False, 2.0, float("nan"), None, b"2", {1, 0}, {1: 0}, range(2), object()])
def test_types_that_are_neither_period_nor_mask(clock: Any) -> None:
    refused(clock, 2, f"clock is {clock!r}; {PERIOD_OR_MASK}")


@pytest.mark.parametrize(
    ("clock", "shown"),
    [
        ("1,2", "1,2"),
        ([1, 2], "1,2"),
        ([1, -1], "1,-1"),
        ([1, 0.5], "1,0.5"),
        ([1, None], "1,None"),
        (["1", "0"], "1,0"),
        ((1, [0]), "1,[0]"),
        ([1, float("nan")], "1,nan"),
    ],
)
def test_entries_that_are_neither_0_nor_1(clock: Any, shown: str) -> None:
    refused(clock, 2, f"clock mask is {shown}; each entry is 0 (cached) or 1 (full)")


@pytest.mark.parametrize(
    ("clock", "entries", "steps"), [("1,0", 2, 3), ("1,0,1,0", 4, 3), ([1], 1, 2), ((1, 0), 2, 1), ([], 0, 1)]
)
def test_masks_of_another_length(clock: Any, entries: int, steps: int) -> None:
    refused(clock, steps, f"has {entries} entries for {steps} steps; expected one each")


@pytest.mark.parametrize("clock", ["0,1", [0, 1], (0, 0), [False, True]])
def test_masks_that_do_not_begin_with_a_full_step(clock: Any) -> None:
    refused(clock, 2, "begins with 0; the first step is always full")


@pytest.mark.parametrize("steps", [0, -1, True, False, 8.0, "8", None, [8]])
def test_steps_that_are_no_number_of_steps(steps: Any) -> None:
    refused(2, steps, f"steps is {steps!r}; expected a whole number above 0")


def test_a_bundle_without_cached_steps_has_no_caching_error(class_model: Path, tmp_path: Path) -> None:
    config = edgediff.ExportConfig(steps=2, clock=1, onnx=OnnxConfig(simplify=False))
    done = edgediff.export_bundle(edgediff.load_model(class_model), tmp_path / "bundle", config)
    assert done.report is not None
    rows = {(row.check, row.part): row for row in done.report.rows}
    caching = rows["caching", "latents"]
    assert (caching.status, caching.note) == ("not_run", "the clock has no cached step")
    assert ("composed", "cached") not in rows
    assert survey_bundle(tmp_path / "bundle", None, None, None).mask == (True, True)
