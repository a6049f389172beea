import warnings

import numpy as np
import pandas as pd
import pytest

from kronos_qlib.data.checks import check_bars, warn_of_jumps
from kronos_qlib.data.stamps import stamps
from kronos_qlib.data.windows import COLUMNS, Bars


@pytest.fixture
def bars() -> Bars:
    dates = np.tile(pd.bdate_range("2024-01-01", periods=5).to_numpy("M8[ns]"), 2)
    values = np.tile(np.array([10, 11, 9, 10.5, 1e6, 1e7], np.float32), (10, 1))
    return Bars(values, stamps(dates).astype(np.int8), dates, np.array([0, 5, 10]), ("SH600000", "SZ000001"))


def set_value(bars: Bars, row: int, column: str, value: float) -> None:
    bars.values[row, COLUMNS.index(column)] = value


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("high", np.inf, "an infinite value: .*high inf"),
        ("amount", -np.inf, "an infinite value: .*amount -inf"),
        ("open", 0.0, "a price of zero or less: open 0"),
        ("low", -1.0, "a price of zero or less: .*low -1"),
        ("volume", -5.0, "a negative volume or amount: .*volume -5"),
        ("high", 8.0, "its high below its low: .*high 8, low 9"),
    ],
)
def test_what_no_market_prints_is_an_error_that_names_the_bar(bars, column, value, message):
    set_value(bars, 7, column, value)
    set_value(bars, 8, column, value)
    with pytest.raises(ValueError, match=f"SZ000001 2024-01-03 has {message}.*2 such bars in all, of 1 instr") as error:
        check_bars(bars)
    assert "\n" not in str(error.value)


def test_sound_bars_pass(bars):
    check_bars(bars)


def test_high_and_low_may_differ_by_float32_rounding(bars):
    low = np.float32(9)
    for column in ("open", "low", "close"):
        set_value(bars, 3, column, low)
    set_value(bars, 3, "high", np.nextafter(low, np.float32(0)))
    check_bars(bars)


def test_returns_that_disagree_with_change_are_one_counted_warning_worst_first(bars):
    returns, change = np.full(10, 0.01), np.full(10, 0.01)
    returns[[2, 6]] = 4.63, -0.3
    change[2] = -0.059
    with pytest.warns(UserWarning, match=r"0\.2 on 2 bars of 2 instruments.*SH600000 2024-01-03 \(\+463") as warned:
        warn_of_jumps(bars, returns, change)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert "-5.9%" in text and text.index("SH600000 2024-01-03") < text.index("SZ000001 2024-01-02 (-30.0%")


def test_small_disagreements_and_unknown_changes_pass(bars):
    returns, change = np.full(10, 0.19), np.zeros(10)
    returns[4], change[5] = np.nan, np.nan
    returns[5] = 9.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_jumps(bars, returns, change)


def test_only_the_worst_bars_are_named(bars):
    with pytest.warns(UserWarning, match="on 10 bars of 2 instruments.*; …$") as warned:
        warn_of_jumps(bars, np.linspace(1, 2, 10), np.zeros(10))
    assert str(warned[0].message).count("against") == 5
