"""What a source does not say of its bars, found from their figures: units, adjustment, frequency, label of the bar.

Each rule takes the bars of one file. What was found in many files is said once, with how many they are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kronos_qlib.ingest.symbols import is_index

UNITS = {  # by the median of amount / (unadjusted close × volume): what volume and amount are multiplied by
    "shares": (1.0, 1.0, 1.0, "shares and money"),
    "lots": (100.0, 100.0, 1.0, "lots of 100 and money"),
    "lots,thousands": (0.1, 100.0, 1000.0, "lots of 100 and thousands"),
    "thousands": (0.001, 1.0, 1000.0, "shares and thousands"),
}
COMMON = 0.9  # of the files, whose unit an odd one takes
NEAR = 2.0  # a ratio within this factor of a unit's is that unit's
ADJUST = ("auto", "none", "adjusted_close", "factor")
LABELS = ("auto", "start", "end")
DRIFT = 1.05  # by which amount / (close × volume) of the first and last bars differ if one side is adjusted only
CONTRADICTION = 0.02  # of a close-to-close return and the change that the source says
_OPENING = 570  # 9:30, in minutes: the first of the day in mainland China and in New York


@dataclass(frozen=True)
class Finding:
    """A rule's answer, in words with {} where the figure that led to it stands, and that figure."""

    value: str
    text: str
    figure: float | None = None


def summarise(findings: Sequence[Finding]) -> list[str]:
    """Say once what was found in several files: with the median of their figures, and how many files they are."""
    texts = []
    for (value, text), count in Counter((finding.value, finding.text) for finding in findings).most_common():
        own = [f.figure for f in findings if (f.value, f.text) == (value, text) and f.figure is not None]
        said = text.replace("{}", f"{np.median(own):.4g}") if own else text
        texts.append(f"{said}{f', in {count:,} of {len(findings):,} files' if len(findings) > 1 else ''}")
    return texts


def find_unit(bars: pd.DataFrame) -> Finding:
    """Find the units of volume and amount; the value is "" where there is nothing to find them by, "?" where none fits.

    Prices that are adjusted while the volumes are not make the ratio drift; the unit is then that of its one end.
    """
    if "amount" not in bars or "volume" not in bars:
        return Finding("", "units: as given, as there is no amount to compare the volume with")
    shares = bars["instrument"].map({name: not is_index(name) for name in bars["instrument"].cat.categories})
    money = bars["close"] * bars["volume"]
    traded = np.asarray((money > 0) & (bars["amount"] > 0) & shares.astype(bool))
    if not traded.any():
        return Finding("", "units: as given, as no bar of a share has a volume and an amount")
    ratio = (bars["amount"] / money)[traded].to_numpy()
    ordered = ratio[np.argsort(bars["time"].to_numpy()[traded], kind="stable")]
    part = max(1, len(ordered) // 5)
    middle, first, last = (float(np.median(some)) for some in (ratio, ordered[:part], ordered[-part:]))
    drifts = len(ordered) >= 20 and not 1 / DRIFT < first / last < DRIFT
    for figure in (last, first, middle) if drifts else (middle,):
        for name, (expected, _, _, words) in UNITS.items():
            if expected / NEAR < figure < expected * NEAR:
                if not drifts:
                    return Finding(name, f"units: {words} (median of amount / (close × volume) {{}})", figure)
                text = (
                    f"units: {words}; amount / (close × volume) of the first bars is {{}} times that of the last, as "
                    "where prices are adjusted and volumes are not"
                )
                return Finding(name, text, first / last)
    return Finding("?", "units: none fits", middle)


def find_adjustment(bars: pd.DataFrame) -> Finding:
    """Find by what the prices are to be adjusted: adjusted_close, factor or none.

    "given": there is a factor, and prices are × it already, as the source's own change says where the factor changes.
    "prices given": so are the prices, not the volumes: amount / (close × volume) drifts as the factor does.
    """
    if "adjusted_close" in bars and bars["adjusted_close"].notna().any():
        ratio = (bars["adjusted_close"] / bars["close"]).dropna()
        return Finding("adjusted_close", "adjustment: by the adjusted close, at least {} of the close", ratio.min())
    if "factor" not in bars or not bars["factor"].notna().any():
        return Finding("none", "adjustment: none known; prices are taken as given")
    text, least = "adjustment: × factor, at least {}", float(bars["factor"].min())
    same = bars["instrument"].to_numpy()[1:] == bars["instrument"].to_numpy()[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        moves, steps = (np.diff(np.log(bars[name].to_numpy())) for name in ("close", "factor"))
    changed = same & (np.abs(steps) > 0.01)
    if not changed.any():
        return Finding("factor", text, least)
    if "change" in bars:
        said = np.log1p(bars["change"].to_numpy()[1:])
        as_given, multiplied = (np.nanmedian(np.abs(moves + more - said)[changed]) for more in (0, steps))
        if as_given < multiplied:
            said_so = "adjustment: prices are × factor already, as the source's own change says where it changes"
            return Finding("given", said_so + " (at least {})", least)
    if "amount" in bars and "volume" in bars:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(bars["amount"] / (bars["close"] * bars["volume"])).to_numpy()
        slope = np.log(bars["factor"].to_numpy())
        known = np.isfinite(ratio)
        if known.any() and np.std((ratio + slope)[known]) < 0.5 * np.std(ratio[known]):
            drifts = "adjustment: prices are × factor already and volumes are not, as amount / (close × volume) says"
            return Finding("prices given", drifts + " (at least {})", least)
    if np.abs(moves[changed]).sum() < np.abs(moves + steps)[changed].sum():
        text += ", though the close does not jump where it changes: --adjust none, if it was adjusted already"
    return Finding("factor", text, least)


def find_contradictions(bars: pd.DataFrame) -> tuple[int, str]:
    """Count bars whose close, adjusted, moves otherwise than the source's own change says; and describe the first."""
    if "change" not in bars:
        return 0, ""
    returns = bars["close"].to_numpy()[1:] / bars["close"].to_numpy()[:-1] - 1
    same = bars["instrument"].to_numpy()[1:] == bars["instrument"].to_numpy()[:-1]
    said = bars["change"].to_numpy()[1:]
    wrong = np.flatnonzero(same & (np.abs(returns - said) > CONTRADICTION))
    if not len(wrong):
        return 0, ""
    row = bars.iloc[wrong[0] + 1]
    return len(wrong), f"{row['instrument']} {row['time']} ({returns[wrong[0]]:+.1%}, the source {said[wrong[0]]:+.1%})"


def find_frequency(bars: pd.DataFrame) -> Finding:
    """Find the frequency of the bars as a Qlib store names it.

    Raises:
        ValueError: bars of more than a week apart, or of no whole minutes.
    """
    same = bars["instrument"].cat.codes.to_numpy()
    distances = np.diff(bars["time"].to_numpy())[same[1:] == same[:-1]]
    median = pd.Timedelta(np.median(distances)) if len(distances) else pd.Timedelta(days=1)
    if median > pd.Timedelta(days=8):
        raise ValueError(f"frequency: bars are {median} apart; a store has weeks, days or minutes")
    if median >= pd.Timedelta(days=6):
        return Finding("1week", f"frequency: 1week (median distance of bars {median})")
    if median >= pd.Timedelta(hours=20):
        return Finding("day", f"frequency: day (median distance of bars {median})")
    minutes = median / pd.Timedelta(minutes=1)
    if minutes != int(minutes) or minutes < 1:
        raise ValueError(f"frequency: bars are {median} apart; a store has weeks, days or whole minutes")
    return Finding(f"{int(minutes)}min", f"frequency: {int(minutes)}min (median distance of bars {median})")


def find_label(bars: pd.DataFrame, freq: str) -> Finding:
    """Find whether a bar's time is that of its start or of its end, by the first bar of most days; "" if that is open.

    Sessions of mainland China and New York begin at 9:30: a first bar of 9:35 among bars of 5 minutes is named by its
    end.
    """
    minutes = int(freq.removesuffix("min"))
    times = pd.DatetimeIndex(bars["time"])
    clock = pd.Series(times.hour * 60 + times.minute).groupby([bars["instrument"].cat.codes, times.date]).min()
    first = int(clock.mode().iloc[0])
    text = f"the first bar of most days is of {first // 60:02d}:{first % 60:02d}"
    if first == _OPENING + minutes:
        return Finding("end", f"label of a bar: its end, as {text}; the store has its start, {minutes} minutes earlier")
    if first in (_OPENING, 0):
        return Finding("start", f"label of a bar: its start, as {text}")
    return Finding("", f"label of a bar: not known, as {text}; times are kept as they are")


def commonest(units: Sequence[str]) -> str | None:
    """Return the unit that nine tenths of the files have, those without a figure left out; None if there is none."""
    known = Counter(unit for unit in units if unit)
    unit, count = known.most_common(1)[0] if known else ("?", 0)
    return unit if unit != "?" and count >= COMMON * known.total() else None
