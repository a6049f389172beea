"""Checks of a store's files and of the bars in them: what no market prints is an error, what looks odd is a warning."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from kronos_qlib.data.windows import Bars

Prices = Literal["positive", "any"]
ROUNDING = 1e-5  # adjusted float32 prices may disagree by some units in the last place
CHANGE_TOLERANCE = 0.20
NAMED = 5  # bars that a warning names


def check_calendar_file(path: Path) -> int:
    """Check that every line of a store's calendar is a date, and return their number. Raises ValueError."""
    lines = _lines(path)
    dates = pd.to_datetime(pd.Series(lines, dtype=object), errors="coerce", format="ISO8601")
    if dates.isna().any():
        row = int(np.argmax(dates.isna()))
        raise ValueError(f"{path}: line {row + 1} is no date: {lines[row]!r:.80}")
    return len(lines)


def check_universe_file(path: Path) -> None:
    """Check that every line of a universe's file is a name, a first and a last date, with tabs. Raises ValueError."""
    lines = _lines(path)
    rows = [line.split("\t") for line in lines]
    for number, (line, row) in enumerate(zip(lines, rows), 1):
        if len(row) < 3 or not row[0].strip():
            raise ValueError(f"{path}: line {number} is no instrument, first and last date, with tabs: {line!r:.80}")
    first, last = (
        pd.to_datetime(pd.Series([row[column] for row in rows], dtype=object), errors="coerce", format="mixed")
        for column in (1, 2)
    )
    wrong = first.isna() | last.isna() | (first > last)
    if wrong.any():
        at = int(np.argmax(wrong))
        what = "ends before it starts" if first.notna()[at] and last.notna()[at] else "has no two dates"
        raise ValueError(f"{path}: the span of {rows[at][0]} in line {at + 1} {what}: {lines[at]!r:.80}")


def check_bins(folder: Path, freq: str, names: Iterable[str], fields: Iterable[str], calendar: Path) -> None:
    """Check the files of some instruments' fields: float32 numbers, the first of them the first bar's row.

    Args:
        calendar: the calendar's file, in which all bars lie.

    Raises:
        ValueError: a file that is cut short or begins with no row of the calendar; it is named.
    """
    from qlib.utils import code_to_fname  # here, as KronosPredictor, which checks bars too, needs no Qlib

    fields, sessions, beyond = list(fields), check_calendar_file(calendar), []
    for name in names:
        for field in fields:
            path = folder / "features" / code_to_fname(name).lower() / f"{field}.{freq}.bin"
            try:
                with path.open("rb") as file:
                    size, head = file.seek(0, 2), (file.seek(0), file.read(4))[1]
            except FileNotFoundError:
                continue
            if size < 4 or size % 4:
                raise ValueError(f"{path}: {size} bytes are no float32 numbers, at least one; write it anew")
            (row,), bars = np.frombuffer(head, "<f4"), size // 4 - 1
            if not (np.isfinite(row) and 0 <= row < sessions and row == int(row)):
                raise ValueError(
                    f"{path}: its first number, the row of its first bar, is {row:g}; the calendar {calendar} has "
                    f"{sessions} sessions"
                )
            if row + bars > sessions:
                beyond.append(path)
    if beyond:
        warnings.warn(
            f"KLineHandler: {len(beyond)} files reach beyond the {sessions} sessions of {calendar}, {beyond[0]} first: "
            "Qlib does not read what lies there",
            stacklevel=4,
        )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def check_bars(bars: Bars, prices: Prices = "positive") -> None:
    """Check bars for infinite values, prices of zero or less, negative volume or amount, and prices outside low … high.

    Args:
        prices: `any` lets them be zero or less.

    Raises ValueError, which names the first such instrument and date, its values, and how many such bars there are.
    """
    values = bars.values[:, :4]
    high, low = values[:, 1], values[:, 2]
    faults = {
        "an infinite value": np.isinf(bars.values).any(axis=1),
        "a price of zero or less": (values <= 0).any(axis=1) & (prices == "positive"),
        "a negative volume or amount": (bars.values[:, 4:6] < 0).any(axis=1),
        "its high below its low": high < low - np.abs(low) * ROUNDING,
        "its open or close outside low … high": impossible_bars(values),
    }
    for fault, wrong in faults.items():
        rows = np.flatnonzero(wrong)
        if len(rows):
            first = rows[0]
            said = ", ".join(f"{name} {value:g}" for name, value in zip(bars.columns, bars.values[first]))
            raise ValueError(
                f"KLineHandler: {_name(bars, first)} has {fault}: {said} ({len(rows)} such bars in all, of "
                f"{len(np.unique(bars.codes[rows]))} instruments); correct them in the store, set them to NaN, "
                "or leave the instrument out"
                + ("; for futures joined by differences set prices: any" if fault.startswith("a price") else "")
            )


def impossible_bars(prices: np.ndarray) -> np.ndarray:
    """Return which bars have their open or close outside low … high, but for rounding: bool `[N]`.

    Args:
        prices: open, high, low, close `[N, 4]`; NaN is never outside.
    """
    opened, high, low, close = prices.T
    rounding = ROUNDING * np.abs(prices).max(axis=1)
    above = np.maximum(opened, close) > high + rounding
    return above | (np.minimum(opened, close) < low - rounding)


def warn_of_jumps(bars: Bars, returns: np.ndarray, change: np.ndarray) -> None:
    """Warn of bars whose close-to-close return disagrees with `$change` by over 0.20; the worst are named.

    Such a jump is mostly a split or a change of code that the prices were not adjusted for.

    Args:
        returns, change: ratios `[N]` (−0.059 is −5.9 %) of the `bars`, NaN where unknown.
    """
    distance = np.abs(returns - change)
    rows = np.flatnonzero(distance > CHANGE_TOLERANCE)
    if len(rows):
        worst = rows[np.argsort(-distance[rows], kind="stable")][:NAMED]
        named = "; ".join(f"{_name(bars, row)} ({returns[row]:+.1%} against {change[row]:+.1%})" for row in worst)
        warnings.warn(
            f"KLineHandler: the close-to-close return disagrees with $change by over {CHANGE_TOLERANCE:g} on "
            f"{len(rows)} bars of {len(np.unique(bars.codes[rows]))} "
            f"instruments, the prices may be unadjusted there: {named}" + ("; …" if len(rows) > NAMED else ""),
            stacklevel=3,
        )


def _name(bars: Bars, row: int) -> str:
    """Name a bar by instrument and date."""
    date = np.datetime_as_string(bars.dates[row], unit="m").removesuffix("T00:00")
    return f"{bars.instruments[bars.codes[row]]} {date}"
