"""Times of bars: what is read as such, in which words, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronos_qlib.data.dates import read_times

TIMES = pd.DatetimeIndex(["2024-01-02 09:35:00", "2024-01-02 09:40:00", "2024-03-29 15:00:00"])
DAYS = TIMES.normalize().unique()


def read(times) -> pd.DatetimeIndex:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_times(times, "x_timestamp")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_epochs_are_read_in_their_unit_and_that_is_said(unit):
    numbers = TIMES.as_unit(unit).asi8
    with pytest.warns(
        UserWarning, match=f"x_timestamp holds whole numbers, taken for {unit} since 1970, UTC: {numbers[0]}"
    ):
        assert (read_times(numbers, "x_timestamp") == TIMES).all()
    assert (read(pd.Series(numbers.astype(str))) == TIMES).all(), "as text, from a file read as text"


@pytest.mark.parametrize("form", ["%Y%m%d%H%M", "%Y%m%d%H%M%S", "%Y%m%d%H%M%S000"])
def test_digits_of_a_time_are_read_as_such(form):
    assert (read(pd.Series(TIMES.strftime(form)).astype("int64")) == TIMES).all()


def test_whole_dates_as_numbers_are_dates():
    assert (read(pd.Series(DAYS.strftime("%Y%m%d")).astype(int)) == DAYS).all()
    assert (read(pd.Index(DAYS.strftime("%Y%m%d"))) == DAYS).all()


@given(st.datetimes(pd.Timestamp("1990-01-01").to_pydatetime(), pd.Timestamp("2090-01-01").to_pydatetime()))
def test_a_time_is_the_same_however_it_is_written(moment):
    times = pd.DatetimeIndex([pd.Timestamp(moment).floor("s")])
    written = [
        times.as_unit("s").asi8,
        times.as_unit("ms").asi8,
        times.strftime("%Y%m%d%H%M%S").astype("int64"),
        times.strftime("%Y/%m/%d %H:%M:%S"),
        [times[0].to_pydatetime()],
        times.to_numpy(),
    ]
    for one in written:
        assert (read(one) == times).all(), one


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pd.RangeIndex(3), "neither dates nor epochs of 1980 … 2100: 0, 1, 2"),
        (np.array([20240102, 20240231]), "20240231, which is no date"),
        (np.array([20240102, 1704153600000]), "neither dates nor epochs"),
        (TIMES.asi8.astype(float), "holds float64 values, not times"),
        (np.array([True, False]), "holds bool values"),
        (pd.to_timedelta(["09:35:00"]), "holds timedelta64"),
        (pd.Series(["09:35", "09:40"]), "times of day without a date: '09:35'"),
        (pd.Series(["2024-01-02", "9:40"]), "times of day without a date: '9:40'"),
        (pd.Series(["2024-01-02", "someday"]), "cannot be read as a time"),
        (pd.Series(["2024-01-02", 5], dtype=object), "holds a int at position 1, not a time: 5"),
        (pd.Series(["2024-01-02", None]), "NaT at position 1"),
        (pd.Series([1.5 + 1j]), "holds complex128 values"),
        (pd.period_range("2024-01", periods=2, freq="M"), "not times"),
        (5, "must be a Series or an index of times"),
        (None, "must be a Series or an index of times"),
    ],
)
def test_what_is_no_time_is_refused_by_name(times, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(times)
    assert str(refused.value).startswith("x_timestamp ") and "\n" not in str(refused.value)
