"""A question about one instrument → the answer of the page: bars, fan, paths, what came, and figures beside them.

The forecast is that of `kronos-qlib forecast`: the same bars, the same sessions, the same predictor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd

from kronos_qlib.analysis.bar_forecast import QUANTILES, BarForecast
from kronos_qlib.data.calendar import sessions_after_bars
from kronos_qlib.data.dates import read_until
from kronos_qlib.data.windows import CLOSE, COLUMNS
from kronos_qlib.evaluation.measures import Outcomes, measure
from kronos_qlib.forecast.calibration import bar_volatility
from kronos_qlib.forecast.predictor import KronosPredictor, possible_bars
from kronos_qlib.ingest.selection import InstrumentBars
from kronos_qlib.web.jobs import Report
from kronos_qlib.web.keeping import Keeper, StoreForecast, digest_bars
from kronos_qlib.web.networks import NamedNetwork, Networks
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import Draws, ForecastQuestion
from kronos_qlib.web.settings import Limits
from kronos_qlib.web.snippet import forecast_snippet
from kronos_qlib.web.sources import FoundBars, Sources
from kronos_qlib.workflow.named_predictor import most_lookback

SHOWN_PATHS = 20
FIRST_PATHS = 16  # of a long forecast are drawn before all: the same as the first of all, for a band to look at
LONG = 1e10  # paths × bars × parameters: some seconds
_FIGURES = ("crps", "error", "coverage_50", "coverage_90")


@dataclass(frozen=True)
class Prepared:
    """A question with its bars.

    bars: those that the network sees. before: those before them, which a chart may show. later: those after them.
    """

    question: ForecastQuestion
    network: NamedNetwork
    found: FoundBars
    bars: pd.DataFrame
    before: pd.DataFrame
    later: pd.DataFrame
    times: pd.DatetimeIndex

    @property
    def group(self) -> tuple[Any, ...]:
        """What questions that are answered together have in common."""
        asked = self.question
        drawn = (asked.samples, asked.temperature, asked.top_p, asked.top_k, asked.seed)
        return "forecast", self.network.name, len(self.bars), len(self.times), *drawn

    @property
    def digest(self) -> str:
        """A digest of all that decides the answer."""
        bars = digest_bars([self.before, self.bars, self.later.loc[: self.times[-1]]])
        known = (self.group, self.network.digest, self.found.source, self.times.as_unit("ns").asi8.tobytes(), bars)
        return blake2b(repr(known).encode(), digest_size=16).hexdigest()


def check_size(question: Draws, limits: Limits, instruments: int = 1) -> None:
    """Check a question against the limits. Raises Problem, 422, which names the limit."""
    for name in ("lookback", "horizon", "samples"):
        value, most = getattr(question, name), getattr(limits, name)
        if value > most:
            raise Problem(422, f"{name} is {value:,}; {most:,} is the most here.")
    bars = question.samples * question.horizon * instruments
    if bars > limits.bars:
        what = "samples × horizon × instruments"
        raise Problem(422, f"{what} is {bars:,}; {limits.bars:,} is the most here. Ask for fewer samples.")


def read_date(text: str | None) -> pd.Timestamp | None:
    """Read a date, which means its end, or a time; None where there is none. Raises Problem."""
    try:
        return read_until(text) if text else None
    except ValueError as error:
        raise Problem(422, f"{error}.") from None


def split_bars(found: InstrumentBars, at: pd.Timestamp | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the bars up to a date and those after it. Raises Problem if too few are before it."""
    bars = found.bars
    before, later = (bars, bars.iloc[:0]) if at is None else (bars[bars.index <= at], bars[bars.index > at])
    if len(before) < 2:
        raise Problem(422, f"{found.instrument} has {len(before)} bars up to that date; two are needed at least.")
    return before, later


def prepare(question: ForecastQuestion, sources: Sources, networks: Networks, limits: Limits) -> Prepared:
    """Find the bars and the network of a question. Raises Problem."""
    check_size(question, limits)
    network = networks.network(question.model)
    context = network.predictor.max_context
    if question.horizon >= context:
        raise Problem(422, f"horizon is {question.horizon}; {network.name} forecasts fewer than {context} bars.")
    at = read_date(question.at)
    found = sources.bars(question.source, question.instrument, at)
    before, later = split_bars(found.bars, at)
    room = min(question.lookback, most_lookback(network.predictor, question.horizon))
    bars, earlier = before.iloc[-room:], before.iloc[:-room]
    times = _sessions_after(_Times(pd.DatetimeIndex(before.index)), question.horizon, found.exchange)
    shown = max(question.lookback - len(bars), 0) + 60  # and sixty more, so that averages begin before the first bar
    return Prepared(question, network, found, bars, earlier.iloc[-shown:], later, times)


class _Times:
    """Times of bars that are equal where their digests are."""

    def __init__(self, times: pd.DatetimeIndex) -> None:
        self.times = times
        self.digest = blake2b(times.as_unit("ns").asi8.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Times) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(32)  # of bars of minutes a key is some MiB
def _sessions_after(bars: _Times, horizon: int, exchange: str | None) -> pd.DatetimeIndex:
    """Return the sessions that follow bars; to look an exchange's up takes as long as a forecast."""
    return sessions_after_bars(bars.times, horizon, exchange)


class Forecasts:
    """Answers questions about instruments.

    Args:
        paths_shown: whether snippets name folders and files.
        keeper: keeps forecasts of a store in the ledger.
    """

    def __init__(self, paths_shown: bool, keeper: Keeper | None = None) -> None:
        self._paths_shown, self._keeper = paths_shown, keeper

    def answer(self, asked: Sequence[Prepared], report: Report) -> list[dict[str, Any]]:
        """Answer questions of one group, in one call of the engine."""
        predictor, draws, early = asked[0].network.predictor, asked[0].question, 0.0
        frames, times = [each.bars for each in asked], [each.times for each in asked]
        work = len(asked) * draws.samples * draws.horizon * predictor.model.n_parameters
        if draws.samples >= 4 * FIRST_PATHS and work >= LONG:
            early, few = FIRST_PATHS / draws.samples, draws.model_copy(update={"samples": FIRST_PATHS})
            paths = draw_paths(predictor, frames, times, few, lambda share: report(early * share))
            report(early, [_partial(each, own) for each, own in zip(asked, paths)])
        paths = draw_paths(predictor, frames, times, draws, lambda share: report(early + (1 - early) * share))
        return [self._describe(each, own) for each, own in zip(asked, paths)]

    def _describe(self, asked: Prepared, paths: np.ndarray) -> dict[str, Any]:
        times = asked.times
        came = asked.later[asked.later.index.isin(times)]
        forecast = BarForecast(asked.found.bars.instrument, asked.bars, times, paths, came)
        close, last = paths[..., CLOSE], float(asked.bars["close"].iloc[-1])
        table, quantiles = forecast.table(), forecast.close_quantiles
        shown = pd.concat([asked.before, asked.bars])
        daily = are_days(shown.index.union(times))
        kept, note = self._keep(asked, close, last)
        notes = [_note(asked), *([note] if note else []), *asked.found.bars.findings]
        snippet = forecast_snippet(asked.question, asked.bars, asked.network, asked.found, self._paths_shown)
        return {
            "digest": asked.digest,
            "instrument": asked.found.bars.instrument,
            "model": asked.network.name,
            "seen": len(asked.bars),
            "last_close": last,
            "bars": bars_as_columns(shown, daily),
            "times": as_text(times, daily),
            "quantiles": _quantiles(forecast),
            "prob_up": table["prob_up"].tolist(),
            "low": table["low"].tolist(),
            "high": table["high"].tolist(),
            "volume": np.median(paths[..., COLUMNS.index("volume")], axis=0).tolist(),
            "paths": close[:SHOWN_PATHS].tolist(),
            "came": bars_as_columns(came, daily) if len(came) else None,
            "figures": _figures(asked, close, quantiles, came),
            "notes": notes,
            "snippet": snippet,
            "ledger": kept,
        }

    def _keep(self, asked: Prepared, close: np.ndarray, last: float) -> tuple[dict[str, Any] | None, str]:
        if self._keeper is None:
            return None, ""
        if asked.found.origin is None:
            return None, "Not kept in the ledger: a file gets no later bars; ingest it to a store."
        if last <= 0:
            return None, "Not kept in the ledger: of a last close of 0 or less there are no returns."
        date, names = pd.Timestamp(asked.bars.index[-1]), [asked.found.bars.instrument]
        question = asked.question.model_dump() | {"instrument": names[0]}
        digest = digest_bars([asked.bars])
        return self._keeper.keep(
            StoreForecast(
                asked.network, asked.found.origin, date, names, close[None], np.array([last]), question, digest
            )
        )


def draw_paths(
    predictor: KronosPredictor,
    frames: Sequence[pd.DataFrame],
    times: Sequence[pd.DatetimeIndex],
    draws: Draws,
    report: Callable[[float], None],
    batch_size: int = 1,
) -> np.ndarray:
    """Draw possible paths [B, S, P, D] of frames of one length, at these times."""
    report(0.0)
    paths = predictor.predict_paths_batch(
        list(frames),
        [pd.DatetimeIndex(frame.index) for frame in frames],
        list(times),
        len(times[0]),
        T=draws.temperature,
        top_k=draws.top_k,
        top_p=draws.top_p,
        sample_count=draws.samples,
        seed=draws.seed,
        batch_size=batch_size,
        report_share=report,
    )
    return possible_bars(paths)


def are_days(times: pd.Index) -> bool:
    """Return whether all times are midnights."""
    index = pd.DatetimeIndex(times)
    return bool((index == index.normalize()).all())


def as_text(times: pd.DatetimeIndex, daily: bool) -> list[str]:
    """Return times as text: of bars of days as dates."""
    return list(times.strftime("%Y-%m-%d" if daily else "%Y-%m-%d %H:%M"))


def bars_as_columns(bars: pd.DataFrame, daily: bool) -> dict[str, Any]:
    """Return bars as lists by column; unknown numbers are None."""
    named = [name for name in COLUMNS[:5] if name in bars]
    values = {name: bars[name].astype(object).where(bars[name].notna(), None).tolist() for name in named}
    return {"time": as_text(pd.DatetimeIndex(bars.index), daily), **values}


def _partial(asked: Prepared, paths: np.ndarray) -> dict[str, Any]:
    """Describe what the first paths show."""
    forecast = BarForecast(asked.found.bars.instrument, asked.bars, asked.times, paths, asked.later.iloc[:0])
    shown = pd.concat([asked.before, asked.bars])
    daily = are_days(shown.index.union(asked.times))
    return {
        "instrument": forecast.instrument,
        "last_close": float(asked.bars["close"].iloc[-1]),
        "bars": bars_as_columns(shown, daily),
        "times": as_text(asked.times, daily),
        "quantiles": _quantiles(forecast),
        "volume": np.median(paths[..., COLUMNS.index("volume")], axis=0).tolist(),
        "paths": paths[..., CLOSE].tolist(),
    }


def _quantiles(forecast: BarForecast) -> dict[str, list[float]]:
    return {f"q{round(100 * level):02d}": row.tolist() for level, row in zip(QUANTILES, forecast.close_quantiles)}


def _note(asked: Prepared) -> str:
    question, seen = asked.question, len(asked.bars)
    note = asked.network.note
    if seen < question.lookback:
        context = asked.network.predictor.max_context
        why = f"as it was trained on windows of {context}" if len(asked.before) else "all that there are"
        note += f" It sees the last {seen} bars, {why}."
    sessions = asked.found.exchange or "the pattern of the bars, without holidays"
    return f"{note} Sessions ahead: {sessions}."


def _figures(asked: Prepared, close: np.ndarray, quantiles: np.ndarray, came: pd.DataFrame) -> dict[str, Any]:
    """Say what is expected, and where bars came how far off it was, beside the last value and historical volatility."""
    last = float(asked.bars["close"].iloc[-1])
    figures: dict[str, Any] = {"prob_up": float((close[:, -1] > last).mean()), "came": len(came)}
    if last <= 0:  # returns mean nothing
        return figures
    ratios, bands = close / last, quantiles / last
    figures |= {
        "median_return": float(bands[3, -1] - 1),
        "range_50": [float(bands[2, -1] - 1), float(bands[4, -1] - 1)],
        "range_90": [float(bands[0, -1] - 1), float(bands[6, -1] - 1)],
    }
    if not len(came) or len(asked.bars) < 3 or not (asked.bars["close"] > 0).all():
        return figures
    closes = came["close"].reindex(asked.times).to_numpy(np.float64)[None] / last
    outcomes = Outcomes(
        dates=np.array([asked.bars.index[-1]], "datetime64[ns]"),
        quantiles=bands.T[None],
        closes=closes,
        ends=np.where(np.isnan(closes), np.datetime64("NaT"), asked.times.to_numpy("datetime64[ns]")[None]),
        volatility=bar_volatility(asked.bars["close"].to_numpy(np.float64)[None]),
        mean_return=np.array([ratios.mean() - 1]),
        prob_up=np.array([(ratios.mean(axis=1) > 1).mean()]),
        samples=len(close),
        paths=ratios[None],
    )
    measured = measure(outcomes)
    for kind in ("", "_last_value", "_volatility"):
        for name in _FIGURES:
            values = np.abs(measured[f"{name}{kind}"][0])
            known = values[~np.isnan(closes[0])]
            figures[f"{name}{kind}"] = float(known.mean())
    figures["came_return"] = float(closes[0][~np.isnan(closes[0])][-1] - 1)
    return figures
