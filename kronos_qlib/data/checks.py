"""Checks of the bars: a value that no market prints is an error, a price that looks unadjusted is a warning."""

import warnings

import numpy as np

from kronos_qlib.data.windows import COLUMNS, Bars

ROUNDING = 1e-5  # adjusted float32 prices may disagree by some units in the last place
CHANGE_TOLERANCE = 0.20
NAMED = 5  # bars that a warning names


def check_bars(bars: Bars) -> None:
    """Check bars for infinite values, prices of zero or less, negative volume or amount, and a high below the low.

    Raises ValueError, which names the first such instrument and date, its values, and how many such bars there are.
    """
    prices = bars.values[:, :4]
    high, low = prices[:, 1], prices[:, 2]
    faults = {
        "an infinite value": np.isinf(bars.values).any(axis=1),
        "a price of zero or less": (prices <= 0).any(axis=1),
        "a negative volume or amount": (bars.values[:, 4:] < 0).any(axis=1),
        "its high below its low": high < low * (1 - ROUNDING),
    }
    for fault, wrong in faults.items():
        rows = np.flatnonzero(wrong)
        if len(rows):
            first = rows[0]
            values = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, bars.values[first]))
            raise ValueError(
                f"KLineHandler: {_name(bars, first)} has {fault}: {values} ({len(rows)} such bars in all, of "
                f"{len(np.unique(bars.codes[rows]))} instruments); correct them in the store, set them to NaN, "
                "or leave the instrument out"
            )


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
