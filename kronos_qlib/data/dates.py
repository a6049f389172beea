"""Dates as workflow files write them, and times of bars as tables hold them."""

import contextlib
import datetime
import re
import warnings
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator

_DATE_OR_TIME = re.compile(r"\d{4}([-/.]?)\d\d\1\d\d(?P<time>[ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?")


def _parse_date(value: Any) -> pd.Timestamp | None:
    """Parse a date; pydantic makes the ValueError an error of the setting."""
    if value is None:
        return None
    date = pd.NaT
    if isinstance(
        value, (str, datetime.date, np.datetime64)
    ):  # a datetime and a Timestamp are dates too; YAML has them
        with contextlib.suppress(ValueError):
            date = pd.Timestamp(value)
    if date is pd.NaT:
        raise ValueError("should be a date such as 2015-01-01")
    if date.tzinfo is not None:
        raise ValueError("should be a date without a time zone: a store's sessions have none")
    return date


Date = Annotated[pd.Timestamp | None, BeforeValidator(_parse_date)]
"""A date as workflow files write it: a string, a YAML date, a Timestamp, or null for no bound."""

# How a whole number writes a time, by the range of its values: what it is called, and format or unit. No two overlap.
_FIRST, _LAST = pd.Timestamp("1980-01-01"), pd.Timestamp("2100-01-01")
_DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S", 17: "%Y%m%d%H%M%S%f"}
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_YEAR_LAST = r"^\s*(\d{1,2})([/.-])(\d{1,2})\2(\d{2}(?:\d{2})?)(?!\d)(.*)"  # day or month first
ORDERS = ("day", "month")
_WITHOUT_DATE = re.compile(r"\s*\d{1,2}:\d")


def year_first(texts: pd.Series, name: str, order: str | None = None) -> pd.Series:
    """Write dates whose year stands last, as 31/01/2024 and 1/31/2024 9:35, with the year first; others stay.

    Args:
        order: what stands first, "day" or "month"; None: as a number above 12 tells.

    Raises:
        ValueError: no such number, or one in either place; a year of two digits.
    """
    parts = texts.astype(str).str.extract(_YEAR_LAST)
    last = parts[0].notna()
    if not last.any():
        return texts
    shown = texts[last].iloc[0]
    if (parts.loc[last, 3].str.len() == 2).any():
        raise ValueError(f"{name} holds dates with years of two digits: {shown!r}; write them as 2024-01-31")
    first, second = (parts.loc[last, column].astype(int) for column in (0, 2))
    if order is None:
        told = [which for which, numbers in zip(ORDERS, (first, second)) if (numbers > 12).any()]
        if len(told) != 1:
            why = "some with the day first, some with the month" if told else "in which day and month cannot be told"
            raise ValueError(
                f"{name} holds dates {why}: {shown!r}; write them as 2024-01-31, or use --dates day or month"
            )
        order = told[0]
    day, month = (first, second) if order == "day" else (second, first)
    spelled = parts.loc[last, 3] + "-" + month.map("{:02d}".format) + "-" + day.map("{:02d}".format)
    written = texts.astype(object).copy()
    written[last] = spelled + parts.loc[last, 4]
    return written


def read_times(times: Any, name: str) -> pd.DatetimeIndex:
    """Read the times of bars, with or without a time zone.

    Times, dates and their texts are taken as they are. Whole numbers are taken for dates such as 20240102 or for epochs
    in s, ms, µs or ns of UTC if all of them are then in 1980 … 2100, and a warning says so.

    Args:
        times: a Series, an index or an array.
        name: what to call the times in messages.

    Raises:
        ValueError: floats, truth values, numbers that are no such dates, times of day without a date, texts that cannot
            be read, a time that is missing; one line names what was given.
    """
    if times is None or isinstance(times, (str, bytes)) or not hasattr(times, "__len__"):
        raise ValueError(f"{name} must be a Series or an index of times, not {times!r:.80}")
    try:
        series = pd.Series(times).reset_index(drop=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a Series or an index of times ({error})") from None
    if pd.api.types.is_datetime64_any_dtype(series.dtype):
        index = pd.DatetimeIndex(series)
    elif pd.api.types.is_integer_dtype(series.dtype) and not series.hasnans:
        index = _read_numbers(series, name)
    elif pd.api.types.is_object_dtype(series.dtype) or pd.api.types.is_string_dtype(series.dtype):
        index = _read_objects(series, name)
    else:
        raise ValueError(f"{name} holds {series.dtype} values, not times: {_shown(series)}")
    if index.hasnans:
        raise ValueError(f"{name} holds NaT at position {int(np.argmax(index.isna()))}")
    return index


def _read_numbers(series: pd.Series, name: str) -> pd.DatetimeIndex:
    """Read whole numbers as dates or epochs, whichever puts all of them into a plausible range."""
    low, high = int(series.min()), int(series.max())
    first, last = int(_FIRST.timestamp()), int(_LAST.timestamp())
    if len(series):
        for digits, form in _DIGITS.items():
            if int(f"1980{'0' * (digits - 4)}") < low and high < int(f"2100{'0' * (digits - 4)}"):
                index = pd.DatetimeIndex(pd.to_datetime(series.astype(str), format=form, errors="coerce"))
                return _said(index, series, f"dates written as {form}", name)
        for unit, size in _UNITS.items():
            if first * size <= low and high < last * size:
                index = pd.DatetimeIndex(pd.to_datetime(series, unit=unit))
                return _said(index, series, f"{unit} since 1970, UTC", name)
    raise ValueError(f"{name} holds whole numbers that are neither dates nor epochs of 1980 … 2100: {_shown(series)}")


def _said(index: pd.DatetimeIndex, series: pd.Series, kind: str, name: str) -> pd.DatetimeIndex:
    """Warn of how numbers were read; those that are no date are an error."""
    if index.hasnans:
        raise ValueError(f"{name} holds {series[int(np.argmax(index.isna()))]}, which is no date; taken for {kind}")
    warnings.warn(f"{name} holds whole numbers, taken for {kind}: {series[0]} is {index[0]}", stacklevel=5)
    return index


def _read_objects(series: pd.Series, name: str) -> pd.DatetimeIndex:
    """Read texts, dates and Timestamps."""
    wrong = series.map(lambda value: not isinstance(value, (str, datetime.date, np.datetime64)) and not pd.isna(value))
    if wrong.any():
        where = int(np.argmax(wrong))
        raise ValueError(
            f"{name} holds a {type(series[where]).__name__} at position {where}, not a time: {series[where]!r}"
        )
    texts = series.map(lambda value: isinstance(value, str))
    if len(series) and texts.all() and series.str.fullmatch(r"\s*\d+\s*").all():
        return _read_numbers(series.astype("int64"), name)
    timeless = texts & series.astype(str).str.match(_WITHOUT_DATE)
    if timeless.any():
        raise ValueError(f"{name} holds times of day without a date: {series[int(np.argmax(timeless))]!r}")
    series = year_first(series, name) if texts.any() else series
    try:
        return pd.DatetimeIndex(pd.to_datetime(series))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} holds what cannot be read as a time ({str(error).splitlines()[0]})") from None


def _shown(series: pd.Series) -> str:
    return ", ".join(str(value) for value in series[:3]) + (" …" if len(series) > 3 else "")


def read_until(text: str) -> pd.Timestamp:
    """Read up to when bars count: a date, which means its end, or a time. Raises ValueError for anything else."""
    found = _DATE_OR_TIME.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        at = pd.Timestamp(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is no date such as 2025-06-05, nor a time such as 2025-06-05 14:30") from None
    return at if found["time"] else at + pd.Timedelta(days=1) - pd.Timedelta(1, "ns")
