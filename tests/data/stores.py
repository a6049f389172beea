"""A small writer of Qlib stores, so that tests read real files through real Qlib."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import qlib

Spans = list[tuple[str, str, str]]
DAYS = 60


def sessions(count: int, start: str = "2024-01-02") -> pd.DatetimeIndex:
    return pd.bdate_range(start, periods=count)


def random_bars(count: int, seed: int = 0) -> pd.DataFrame:
    """Plausible daily bars: high and low enclose open and close, change is the close-to-close return."""
    rng = np.random.default_rng(seed)
    close = 10 * np.exp(np.cumsum(rng.normal(0, 0.02, count)))
    open_ = close * np.exp(rng.normal(0, 0.01, count))
    spread = 1 + rng.uniform(0.001, 0.02, (2, count))
    bars = pd.DataFrame({"open": open_, "close": close, "volume": rng.uniform(1e5, 1e6, count)})
    bars["high"] = bars[["open", "close"]].max(axis=1) * spread[0]
    bars["low"] = bars[["open", "close"]].min(axis=1) / spread[1]
    bars["change"] = bars["close"].pct_change()
    bars["factor"] = 1.0
    return bars


def suspend(bars: pd.DataFrame, rows: slice, *, as_nan: bool = False) -> pd.DataFrame:
    """The bars with some sessions suspended: the last close repeated at volume 0, or everything NaN."""
    bars = bars.copy()
    if as_nan:
        bars.iloc[rows] = np.nan
    else:
        bars.loc[bars.index[rows], ["open", "high", "low", "close"]] = bars["close"].iloc[rows.start - 1]
        bars.loc[bars.index[rows], "volume"] = 0.0
    bars["change"] = bars["close"].ffill().pct_change()
    return bars


def write_store(
    folder: Path,
    calendar: pd.DatetimeIndex | list[str],
    bars: Mapping[str, pd.DataFrame],
    universes: Mapping[str, Spans] | None = None,
    *,
    first_rows: Mapping[str, int] | None = None,
    freq: str = "day",
    future: pd.DatetimeIndex | None = None,
) -> Path:
    """Write a store: one table of bars per instrument, the first of which is at session `first_rows[name]` (0)."""
    (folder / "calendars").mkdir(parents=True)
    (folder / "instruments").mkdir()
    write_calendar(folder / "calendars" / f"{freq}.txt", calendar)
    if future is not None:
        write_calendar(folder / "calendars" / f"{freq}_future.txt", future)
    whole = [(name, str(pd.Timestamp(calendar[0]).date()), str(pd.Timestamp(calendar[-1]).date())) for name in bars]
    for universe, spans in ({"all": whole} | dict(universes or {})).items():
        lines = ["\t".join(span) for span in spans]
        (folder / "instruments" / f"{universe}.txt").write_text("\n".join(lines) + "\n")
    for name, table in bars.items():
        home = folder / "features" / name.lower()
        home.mkdir(parents=True)
        for field in table:
            content = np.concatenate([[(first_rows or {}).get(name, 0)], table[field]])
            content.astype("<f4").tofile(home / f"{field}.{freq}.bin")
    return folder


def write_calendar(path: Path, calendar: pd.DatetimeIndex | list[str]) -> None:
    lines = [str(pd.Timestamp(time)).removesuffix(" 00:00:00") for time in calendar]
    path.write_text("\n".join(lines) + "\n")


def use_store(folder: Path | dict[str, str]) -> None:
    """Point Qlib, which is global, at a store (or one a frequency), and forget what it had read of the last one."""
    qlib.init(
        provider_uri=folder if isinstance(folder, dict) else str(folder),
        region="cn",
        kernels=1,
        logging_level=30,
        clear_mem_cache=True,
    )


def market_bars() -> dict[str, pd.DataFrame]:
    """AAA always trades, BBB and CCC have suspensions (zero volume, NaN), DDD is listed at session 40."""
    return {
        "AAA": random_bars(DAYS, seed=1),
        "BBB": suspend(random_bars(DAYS, seed=2), slice(20, 28)),
        "CCC": suspend(random_bars(DAYS, seed=3), slice(30, 33), as_nan=True),
        "DDD": random_bars(DAYS - 40, seed=4),
    }


def write_market(folder: Path, bars: dict[str, pd.DataFrame] | None = None) -> Path:
    """The universe `some` has AAA throughout, BBB until session 45, CCC twice, DDD from its listing."""
    calendar = sessions(DAYS)
    day = [str(date.date()) for date in calendar]
    some = [
        ("AAA", day[0], day[-1]),
        ("BBB", day[0], day[45]),
        ("CCC", day[0], day[12]),
        ("CCC", day[35], day[-1]),
        ("DDD", day[40], day[-1]),
    ]
    bars = market_bars() if bars is None else bars
    return write_store(folder, calendar, bars, {"some": some}, first_rows={"DDD": 40})
