"""What a source does not say of its bars, found from their figures: units, adjustment, frequency."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

UNITS = {  # by the median of amount / (unadjusted close × volume): what volume and amount are multiplied by
    "shares": (1.0, 1.0, 1.0, "shares and money"),
    "lots": (100.0, 100.0, 1.0, "lots of 100 and money"),
    "lots,thousands": (0.1, 100.0, 1000.0, "lots of 100 and thousands"),
    "thousands": (0.001, 1.0, 1000.0, "shares and thousands"),
}
NEAR = 2.0  # a ratio within this factor of a unit's is that unit's
ADJUST = ("auto", "none", "adjusted_close", "factor")


@dataclass(frozen=True)
class Finding:
    """A rule's answer, and the figure that led to it."""

    value: str
    text: str


def find_unit(bars: pd.DataFrame) -> Finding:
    """Find the units of volume and amount.

    Raises:
        ValueError: the figure fits no unit; it is named, with how to say the unit.
    """
    if "amount" not in bars or "volume" not in bars:
        return Finding("shares", "units: as given, as there is no amount to compare the volume with")
    money = bars["close"] * bars["volume"]
    traded = (money > 0) & (bars["amount"] > 0)
    if not traded.any():
        return Finding("shares", "units: as given, as no bar has a volume and an amount")
    ratio = float(np.median(bars["amount"][traded] / money[traded]))
    for name, (expected, _, _, words) in UNITS.items():
        if expected / NEAR < ratio < expected * NEAR:
            return Finding(name, f"units: {words} (median of amount / (close × volume) {ratio:.4g})")
    raise ValueError(
        f"units: the median of amount / (close × volume) is {ratio:.4g}, which fits none of {', '.join(UNITS)}; name "
        "one by --unit"
    )


def find_adjustment(bars: pd.DataFrame) -> Finding:
    """Find whether the prices are to be adjusted, and by what."""
    if "adjusted_close" in bars and bars["adjusted_close"].notna().any():
        ratio = (bars["adjusted_close"] / bars["close"]).dropna()
        return Finding(
            "adjusted_close", f"adjustment: by the adjusted close, {ratio.min():.4g} … {ratio.max():.4g} of the close"
        )
    if "factor" in bars and bars["factor"].notna().any():
        return Finding("factor", f"adjustment: × factor, {bars['factor'].min():.4g} … {bars['factor'].max():.4g}")
    return Finding("none", "adjustment: none known; prices are taken as given")


def find_frequency(bars: pd.DataFrame) -> Finding:
    """Find the frequency of the bars as a Qlib store names it.

    Raises:
        ValueError: bars of a week or more apart, or of no whole minutes.
    """
    distances = bars.groupby("instrument", sort=False)["time"].diff().dropna()
    median = distances.median() if len(distances) else pd.Timedelta(days=1)
    if median >= pd.Timedelta(days=6):
        raise ValueError(f"frequency: bars are {median} apart; a store has days or minutes")
    if median >= pd.Timedelta(hours=20):
        return Finding("day", f"frequency: day (median distance of bars {median})")
    minutes = median / pd.Timedelta(minutes=1)
    if minutes != int(minutes) or minutes < 1:
        raise ValueError(f"frequency: bars are {median} apart; a store has days or whole minutes")
    return Finding(f"{int(minutes)}min", f"frequency: {int(minutes)}min (median distance of bars {median})")
