"""Fans: stored forecasts of a run and the actual bars; best, median and worst day, three instruments each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from kronos_qlib.analysis.results import RunResult, read_sessions
from kronos_qlib.forecast.chunk_store import read_forecasts
from kronos_qlib.forecast.forecaster import QUANTILES

BARS_BEFORE = 40
_FIELDS = ("open", "high", "low", "close", "volume")


class FansError(Exception):
    """The forecasts of a run cannot be shown; the message names the reason."""


@dataclass(frozen=True)
class Fan:
    """One forecast.

    day: its score date; day_was: best, median or worst by the day's `rank_ic`; score_was: highest, median or lowest
    that day. bars: open, high, low, close and date, index: bars from the score date, up to `BARS_BEFORE` before it
    and the horizon after it, fewer where the store ends. quantiles: of the close, index: step 1 … horizon, columns
    q05 … q95. All in the store's prices.
    """

    instrument: str
    day: pd.Timestamp
    day_was: str
    rank_ic: float
    score_was: str
    score: float
    last_close: float
    bars: pd.DataFrame
    quantiles: pd.DataFrame


def load_fans(run: RunResult, rank_ic: pd.Series) -> list[Fan]:
    """Load nine forecasts of a run: of its best, median and worst day those with the highest, median and lowest score.

    rank_ic: of the run, by day. Raises FansError if the run keeps no forecasts, they are not at hand or those of other
    weights or settings, or the Qlib store is not at hand.
    """
    if run.store is None:
        raise FansError(f"the Qlib store {run.provider_uri or '(not recorded)'} is not at hand")
    days = _days(rank_ic)
    forecasts = _forecasts(run, list(days.values()))
    horizon = int(run.kronos_run["data"]["horizon"])
    forecasts["score"] = run.scores.reindex(forecasts.index)
    fans = []
    for day_was, day in days.items():
        rows = forecasts.loc[day].sort_values("score")
        for score_was, place in (("highest", -1), ("median", len(rows) // 2), ("lowest", 0)):
            row = rows.iloc[place]
            fans.append(
                Fan(
                    instrument=str(row.name),
                    day=day,
                    day_was=day_was,
                    rank_ic=float(rank_ic[day]),
                    score_was=score_was,
                    score=float(row["score"]),
                    last_close=float(row["last_close"]),
                    bars=_bars(run.store, run.bar_freq, row, day, horizon),
                    quantiles=_quantiles(row, horizon),
                )
            )
    return fans


def _days(rank_ic: pd.Series) -> dict[str, pd.Timestamp]:
    order = rank_ic.dropna().sort_values(kind="stable").index
    if order.empty:
        raise FansError("no day has a rank IC")
    return {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}


def _forecasts(run: RunResult, days: list[pd.Timestamp]) -> pd.DataFrame:
    """Read the stored forecasts of some days of a run, index (datetime, instrument), from its own folder."""
    settings = run.kronos_run.get("model", {})
    cache_dir, score = settings.get("forecast", {}).get("cache_dir"), settings.get("score")
    if settings.get("calibration") is not None:
        raise FansError("its forecasts are calibrated, and its cache_dir holds them as they were drawn")
    if cache_dir is None:
        raise FansError("the run kept no forecasts (forecast.cache_dir is null)")
    if run.forecast_digest is None:
        raise FansError(
            "the run was recorded before recorders named the folder of their forecasts (tag forecast.digest); "
            "score it again to see them"
        )
    folders = [place / run.forecast_digest for place in _places(run, Path(cache_dir))]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise FansError(f"its forecasts ({cache_dir}) are not at hand")
    try:
        table = read_forecasts(folder, pd.DatetimeIndex(days).to_numpy())
    except FileNotFoundError as error:
        raise FansError(f"its forecasts ({cache_dir}) are not at hand") from error
    except (OSError, pa.ArrowException) as error:
        raise FansError(f"the forecasts in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    rows = table.to_pandas().set_index(["datetime", "instrument"])
    wanted = run.scores[run.scores.index.get_level_values("datetime").isin(days)].dropna()
    rows = rows.reindex(wanted.index)
    named = isinstance(score, str)  # another is made of the paths
    same = settings.get("neutralise") or not named or np.allclose(rows[score], wanted, rtol=1e-6, atol=1e-9)
    if rows["last_close"].isna().any() or not same:
        raise FansError(f"the forecasts in {cache_dir} are not those of this run's scores")
    return rows


def _places(run: RunResult, cache_dir: Path) -> list[Path]:
    """List where a folder relative to qrun's may lie: here, or beside the MLflow database, four above the artifacts."""
    bases = [Path.cwd(), *([run.artifacts.resolve().parents[3]] if run.artifacts else [])]
    return list(dict.fromkeys((base / cache_dir.expanduser()).resolve() for base in bases))


def _quantiles(row: pd.Series, horizon: int) -> pd.DataFrame:
    columns = {f"q{quantile:02d}": f"q{quantile:02d}_" for quantile in QUANTILES}
    steps = range(1, horizon + 1)
    table = {name: [float(row[f"{stem}{step}"]) for step in steps] for name, stem in columns.items()}
    return pd.DataFrame(table, index=pd.Index(steps, name="step"))


def _bars(store: Path, freq: str, row: pd.Series, day: pd.Timestamp, horizon: int) -> pd.DataFrame:
    instrument = str(row.name)
    calendar = read_sessions(store, freq)
    try:
        bars = pd.DataFrame({name: _field(store, freq, instrument, name, calendar) for name in _FIELDS}).dropna()
        bars = bars[bars["volume"] > 0].drop(columns="volume")  # a suspended day is no bar
    except FileNotFoundError as error:
        raise FansError(f"the Qlib store has no {Path(error.filename).name} of {instrument}") from error
    if day not in bars.index or not np.isclose(bars.loc[day, "close"], row["last_close"], rtol=1e-4):
        raise FansError(f"the Qlib store's close of {instrument} on {day} is not the one that was forecast from")
    place = bars.index.get_loc(day)
    shown = bars.iloc[max(0, place - BARS_BEFORE) : place + horizon + 1].rename_axis("date")
    offsets = np.arange(len(shown)) - min(place, BARS_BEFORE)
    return shown.reset_index().set_axis(offsets)


def _field(store: Path, freq: str, instrument: str, name: str, calendar: pd.DatetimeIndex) -> pd.Series:
    """Qlib's file of a field: little-endian 32-bit floats, the first the calendar position of the second."""
    values = np.fromfile(store / "features" / instrument.lower() / f"{name}.{freq}.bin", dtype="<f4")
    start = int(values[0])
    return pd.Series(values[1:].astype(float), calendar[start : start + len(values) - 1])
