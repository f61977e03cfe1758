from typing import Any

import numpy as np
import pytest

from edgediff_runtime import AutoClock, RequestError, clock_mask, parse_clock

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
    spelt = clock_mask(clock, steps)
    assert spelt == mask(want)
    assert all(type(full) is bool for full in spelt)


@pytest.mark.parametrize("period", range(1, 11))
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 20])
def test_a_period_begins_with_a_full_step_and_repeats(period: int, steps: int) -> None:
    spelt = clock_mask(period, steps)
    assert len(spelt) == steps
    assert [i for i, full in enumerate(spelt) if full] == list(range(0, steps, period))
    assert clock_mask(str(period), steps) == spelt


def test_a_mask_spelt_out_is_the_same_clock() -> None:
    spelt = clock_mask(3, 8)
    text = ",".join(str(int(full)) for full in spelt)
    assert clock_mask(text, 8) == clock_mask(list(spelt), 8) == clock_mask(spelt, 8) == spelt


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
    ["", " ", ",", "1,", ",1", "1,,0", "-1", "+2", "2.0", "1_0", "1 0", "a", "1,a", "0x2", "1;0", "[1,0]"],
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
    ("clock", "spelt"),
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
def test_entries_that_are_neither_0_nor_1(clock: Any, spelt: str) -> None:
    refused(clock, 2, f"clock mask is {spelt}; each entry is 0 (cached) or 1 (full)")


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


# The auto clock


@pytest.mark.parametrize(
    ("text", "tolerance", "bound"),
    [
        ("auto:0.2", 0.2, 3),
        (" auto:0.2 ", 0.2, 3),
        ("auto:1", 1.0, 3),
        ("auto:00.50", 0.5, 3),
        ("auto:0.2:1", 0.2, 1),
        ("auto:12.5:07", 12.5, 7),
        ("auto:0.2:" + "9" * 30, 0.2, int("9" * 20)),
    ],
)
def test_spellings_of_the_auto_clock(text: str, tolerance: float, bound: int) -> None:
    clock = parse_clock(text, 8)
    assert clock == AutoClock(tolerance, bound)
    assert parse_clock(str(clock), 8) == clock
    assert parse_clock(clock, 3) == clock


def test_an_auto_clock_is_written_without_an_exponent() -> None:
    assert str(AutoClock(1e-7)) == "auto:0.0000001:3"
    assert parse_clock(str(AutoClock(1e-300)), 1) == AutoClock(1e-300)


@pytest.mark.parametrize(
    "text",
    ["auto", "auto:", "auto:nan", "auto:inf", "auto:-1", "auto:+1", "auto:0", "auto:0.0", "auto:0.1:0", "auto:0.1:",
     "auto:0.1:-1", "auto:0.1:1.5", "auto:0.1:3:4", "auto:.5", "auto:5.", "auto:1e-3", "auto:0,5", "auto: 0.1",
     "auto 0.1", "auto:0x1", "auto:1_0", "automatic", "auto:\u0665", "auto:0.1:\u0663", "auto:" + "9" * 400,
     "auto:0." + "0" * 400 + "1"],
)  # fmt: skip
def test_auto_clocks_that_are_none(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_clock(text, 8)
    assert f"clock is {text!r}; expected auto:TOL or auto:TOL:BOUND" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tolerance", [0, -1.0, float("nan"), float("inf"), "0.2", None, True])
def test_tolerances_that_are_none(tolerance: Any) -> None:
    with pytest.raises(RequestError, match=r"the auto clock's tolerance is .*; expected a finite number above 0"):
        AutoClock(tolerance)


@pytest.mark.parametrize("bound", [0, -1, 1.5, "3", None, True])
def test_bounds_that_are_none(bound: Any) -> None:
    with pytest.raises(RequestError, match=r"the auto clock's bound is .*; expected a whole number above 0"):
        AutoClock(0.2, bound)


@pytest.mark.parametrize("clock", ["auto:0.1", "auto", "auto:nan", AutoClock(0.1)])
def test_where_a_mask_is_needed_the_auto_clock_is_refused_by_name(clock: Any) -> None:
    refused(clock, 2, f"clock is {str(clock)!r}, which decides as it runs", PERIOD_OR_MASK.removeprefix("expected "),
            "(auto:TOL is for export and run)")  # fmt: skip


def test_other_clocks_are_read_as_their_masks() -> None:
    assert parse_clock("2", 4) == parse_clock([1, 0, 1, 0], 4) == clock_mask(2, 4)
    with pytest.raises(RequestError, match="has 2 entries for 3 steps"):
        parse_clock("1,0", 3)
    with pytest.raises(RequestError, match="steps is 0"):
        parse_clock("auto:0.1", 0)
