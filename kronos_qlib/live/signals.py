"""The signals of one date: that date alone is scored, by the model of a finished run."""

import json
import logging
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pandas as pd
from qlib.data.data import Cal
from qlib.data.dataset import DatasetH, TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

from kronos_qlib.analysis.signals import daily_rank_ic, wide
from kronos_qlib.data.calendar import range_end, store_calendar
from kronos_qlib.data.dataset import KLineDataset
from kronos_qlib.data.handler import KLineHandler
from kronos_qlib.data.loader import read_fields
from kronos_qlib.forecast.forecaster import QUANTILES
from kronos_qlib.live.run import LiveRun, instruments_of, label_expression
from kronos_qlib.live.signal_set import SignalSet
from kronos_qlib.versions import package_versions
from kronos_qlib.workflow.model import KronosModel

logger = logging.getLogger("qlib.signals")
RECENT = 5  # sessions: an instrument with a bar in them, and none on the date, lacks it
SHOWN = 10  # instruments that a message names
SLACK = 20  # sessions read beyond the lookback before it is looked for further back
QUANTILE_COLUMNS = tuple(f"q{level:02d}" for level in QUANTILES)


class StoreLacksBars(Exception):
    """The store has not the bars of the date that is asked for; the message says which and what to do."""


def latest_complete(run: LiveRun, dataset: DatasetH, now: pd.Timestamp) -> pd.Timestamp:
    """Return the last score date whose bar is complete by the exchange's hours.

    Args:
        now: with a time zone.

    Raises:
        StoreLacksBars: the store lacks a later bar that is complete. ValueError: the exchange's hours are not known.
    """
    calendar = store_calendar(run.freq, getattr(dataset, "exchange", None))
    sessions = pd.DatetimeIndex(Cal.calendar(freq=run.freq))
    complete = sessions[-1000:][calendar.ends(sessions[-1000:]) <= now]
    if not len(complete):
        raise StoreLacksBars(f"no bar of the store {run.store} is complete at {now:%Y-%m-%d %H:%M %Z}")
    if complete[-1] == sessions[-1]:
        following = pd.DatetimeIndex(calendar.sessions_after(sessions[-1:], 1)[0])
        end = calendar.ends(following)[0]
        if end <= now:
            raise StoreLacksBars(
                f"the store {run.store} ends on {shown(sessions[-1])}; the bar of {shown(following[0])} is complete "
                f"since {end:%Y-%m-%d %H:%M} UTC: append it (kronos-qlib ingest … --append), or name a --date"
            )
    else:
        logger.info(f"the bar of {shown(sessions[-1])} is not complete at {now:%Y-%m-%d %H:%M %Z}: it does not count")
    return at_score_time(dataset, complete)


def named_date(run: LiveRun, dataset: DatasetH, text: str, now: pd.Timestamp) -> pd.Timestamp:
    """Return the last score date of a day, or that of a time.

    Args:
        now: with a time zone.

    Raises:
        ValueError: it is none of the store's. StoreLacksBars: its bar is not complete yet.
    """
    sessions = pd.DatetimeIndex(Cal.calendar(freq=run.freq))
    try:
        start = pd.Timestamp(text)
        found = sessions[(sessions >= start) & (sessions <= range_end(start, run.freq))]
    except (ValueError, TypeError):
        raise ValueError(f"--date {text!r} is no date such as 2025-06-05, nor latest") from None
    if not len(found):
        raise ValueError(
            f"--date {text} is no session of the store {run.store}, {shown(sessions[0])} … {shown(sessions[-1])}"
        )
    date = at_score_time(dataset, found)
    end = store_calendar(run.freq, getattr(dataset, "exchange", None)).ends(pd.DatetimeIndex([date]))[0]
    if end > now:
        raise StoreLacksBars(f"the bar of {shown(date)} is complete at {end:%Y-%m-%d %H:%M} UTC only")
    return date


def at_score_time(dataset: DatasetH, sessions: pd.DatetimeIndex) -> pd.Timestamp:
    """Return the last of the sessions at one of the dataset's `score_times`. Raises ValueError if there is none."""
    times = getattr(dataset, "score_times", None)
    if times is not None:
        sessions = sessions[sessions.strftime("%H:%M").isin(times)]
        if not len(sessions):
            raise ValueError(f"no session is at one of the run's score_times, {', '.join(times)}")
    return sessions[-1]


def make_signals(run: LiveRun, date: pd.Timestamp, allow_missing: int = 0) -> SignalSet:
    """Score a date with a run's model, on that date's windows or features alone.

    A score is that of the run's own test segment, to the last bit of a Kronos model; where the segment has the date the
    two are compared, and a difference is warned of.

    Args:
        date: a bar of the store's calendar.
        allow_missing: instruments that may lack the date's bar.

    Raises:
        StoreLacksBars: more members of the universe than allowed have recent bars, but none of the date.
        ResultsError: the model or the dataset cannot be loaded. ValueError: no instrument can be scored.
    """
    for name, then, here in run.changed_versions():
        logger.warning(f"the run was made with {name} {then}, here is {here}: scores may differ in the last digits")
    dataset = run.load_dataset()
    _require_bars(run, dataset, date, allow_missing)
    for name in ("train", "valid"):
        if name in dataset.segments and date <= pd.Timestamp(dataset.segments[name][1] or pd.Timestamp.max):
            logger.warning(f"{shown(date)} is not after the run's segment {name!r}: its scores are not out of sample")
    model = run.load_model()
    _set_date(run, dataset, date)
    if isinstance(model, KronosModel):
        table = _kronos_table(model, dataset)
    else:
        scores = model.predict(dataset, segment="test")
        scores = scores.iloc[:, 0] if isinstance(scores, pd.DataFrame) else scores
        table = pd.DataFrame({"score": _of_date(scores, date)})
    table = table[table["score"].notna()].sort_index().rename_axis("instrument")
    if table.empty:
        raise ValueError(f"no instrument has a score on {shown(date)}: none has the bars that the model asks for")
    table.insert(1, "rank", table["score"].rank(ascending=False, method="min").astype(int))
    before, labels = (run.found.read(name) for name in ("pred.pkl", "label.pkl"))
    _compare_with_backtest(table["score"], before, date)
    _warn_of_changed_universe(run, dataset, before, date)
    weights = run.trained.digest("params.pkl")
    kwargs = {"model": run.task["model"], "dataset": run.task["dataset"], "portfolio": run.portfolio}
    return SignalSet(
        date=date,
        table=table,
        experiment=run.found.experiment,
        recorder=run.found.run_id,
        store=str(run.store),
        freq=run.freq,
        label=label_expression(dataset),
        horizon=dataset.horizon if isinstance(model, KronosModel) else None,
        exchange=getattr(dataset, "exchange", None),
        settings=json.loads(json.dumps(kwargs, default=str)),
        weights_digest=weights,
        data_digest=_data_digest(dataset),
        versions=package_versions(),
        promised=_promised(before, labels),
    )


def _require_bars(run: LiveRun, dataset: DatasetH, date: pd.Timestamp, allow_missing: int) -> None:
    """Raise StoreLacksBars if members have bars of the days before and none of the date, in the store's files."""
    sessions = pd.DatetimeIndex(Cal.calendar(freq=run.freq))
    place = sessions.get_loc(date)
    members = instruments_of(dataset, date, run.freq)
    if members is None:
        return
    if not members:
        raise StoreLacksBars(
            f"the universe {_universe(dataset)} of {run.store} has no member on {shown(date)}: "
            "bring its file up to date"
        )
    closes = read_fields(members, ["$close"], sessions[max(0, place - RECENT)], date, run.freq)["$close"]
    last = closes.dropna().reset_index().groupby("instrument")["datetime"].max()
    present = set(closes.index[closes.index.get_level_values("datetime") == date].get_level_values("instrument"))
    lacking = sorted(set(last.index) - present)
    if len(lacking) > allow_missing:
        raise StoreLacksBars(
            f"{len(lacking)} of {len(members)} members of {_universe(dataset)} have no bar of {shown(date)} in "
            f"{run.store}: {_names(lacking)}; append them, or say --allow-missing {len(lacking)} if they did not trade"
        )
    if lacking:
        logger.warning(f"{len(lacking)} members have no bar of {shown(date)} and no signal: {_names(lacking)}")


def _set_date(run: LiveRun, dataset: DatasetH, date: pd.Timestamp) -> None:
    """Make a date the dataset's test segment, and have no more loaded than it needs."""
    segments = {"test": (date, date)}
    if isinstance(dataset, KLineDataset):
        dataset.config(segments=segments)
        _load_lookbacks(dataset, date, pd.DatetimeIndex(Cal.calendar(freq=run.freq)))
        return
    sessions = pd.DatetimeIndex(Cal.calendar(freq=run.freq))
    history = dataset.step_len - 1 if isinstance(dataset, TSDatasetH) else 0
    start = sessions[max(0, sessions.get_loc(date) - history)]
    dataset.config(handler_kwargs={"start_time": start, "end_time": date}, segments=segments)
    dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})


def _load_lookbacks(dataset: KLineDataset, date: pd.Timestamp, sessions: pd.DatetimeIndex) -> None:
    """Load no more bars up to a date than give every member its lookback of valid bars, suspended or not."""
    handler, own = dataset.handler, dataset.handler.start_time
    near = sessions[max(0, sessions.get_loc(date) - dataset.lookback - SLACK)]
    remembers = any(not isinstance(column, str) for column in handler.data_loader.columns.values())
    if remembers or (own is not None and near <= own):  # a user's column may be a function of all bars before
        handler.config(end_time=date)
        return
    handler.config(start_time=near, end_time=date)
    bars = handler.bars()
    scored = set(bars.codes[handler.members() & (bars.dates == date.to_numpy())])
    short = [
        name
        for code, (name, count) in enumerate(zip(bars.instruments, np.diff(bars.offsets)))
        if count < dataset.lookback and code in scored
    ]
    if not short:
        return
    loader = handler.data_loader
    options = {"freq": handler.freq, "label": loader.label, "amount": handler.amount_rule, "volume": loader.volume}
    options |= {"prices": handler.prices, "columns": loader.columns, "conditions": loader.conditions}
    whole = KLineHandler(short, own, date, **options).bars()
    enough = np.diff(whole.offsets) >= dataset.lookback
    starts = whole.dates[(whole.offsets[1:] - dataset.lookback)[enough]]
    if len(starts) and starts.min() < near.to_numpy():
        handler.config(start_time=pd.Timestamp(starts.min()), end_time=date)


def _kronos_table(model: KronosModel, dataset: KLineDataset) -> pd.DataFrame:
    """Score and forecast the date's windows, which are drawn once."""
    settings, horizon = model.settings, dataset.horizon
    with tempfile.TemporaryDirectory() as folder:
        execution = {"cache_dir": folder, "processes": 1, "engine": "local"}
        model.settings = settings.model_copy(update={"forecast": settings.forecast.model_copy(update=execution)})
        try:
            score = model.predict(dataset, "test")
            columns = [f"q{level:02d}_{horizon}" for level in QUANTILES]
            forecast = model.forecast(dataset, "test", ["last_close", "prob_up", *columns])
        finally:
            model.settings = settings
    table = forecast.droplevel("datetime")
    returns = table[columns].div(table["last_close"], axis=0) - 1
    table = table[["last_close", "prob_up"]].join(returns.set_axis(QUANTILE_COLUMNS, axis=1))
    table.insert(0, "score", score.droplevel("datetime"))
    return table


def _of_date(scores: pd.Series, date: pd.Timestamp) -> pd.Series:
    """Return the scores of a date by instrument."""
    return scores.reorder_levels(["datetime", "instrument"]).xs(date, level="datetime").astype(float)


def _compare_with_backtest(scores: pd.Series, before: pd.Series | None, date: pd.Timestamp) -> None:
    """Say whether the scores are those of the run's own test segment, where it has the date."""
    if before is None or date not in before.index.get_level_values("datetime"):
        return
    then = _of_date(before, date).dropna()
    both = pd.DataFrame({"now": scores, "then": then})
    differ = both[both["now"] != both["then"]]
    if differ.empty:
        logger.info(f"the scores of {shown(date)} are those of the run's test segment, to the last bit")
        return
    distance = (both["now"] - both["then"]).abs().max()
    logger.warning(
        f"{len(differ)} of {len(both)} scores of {shown(date)} are not those of the run's test segment, by up to "
        f"{distance:.2g}, rank correlation {both.corr(method='spearman').iloc[0, 1]:.4f}; bars that changed since, "
        "other versions, or features that depend on where the data begin"
    )


def _warn_of_changed_universe(run: LiveRun, dataset: DatasetH, before: pd.Series | None, date: pd.Timestamp) -> None:
    """Warn if instruments that the run scored on its last date up to this one were no members then, by today's file."""
    if before is None:
        return
    dates = before.index.get_level_values("datetime")
    if not (dates <= date).any():
        return
    last = dates[dates <= date].max()
    members = instruments_of(dataset, last, run.freq)
    gone = sorted(set(_of_date(before, last).index) - set(members)) if members is not None else []
    if gone:
        logger.warning(
            f"the universe {_universe(dataset)} changed since the run: {len(gone)} instruments that it scored on "
            f"{shown(last)} are no members of that date now: {_names(gone)}"
        )


def _promised(scores: pd.Series | None, labels: pd.Series | None) -> dict[str, Any] | None:
    """Return what the run's test segment showed: rank IC of a day, its standard deviation, and the days."""
    if scores is None or labels is None:
        return None
    daily = daily_rank_ic(wide(scores), wide(labels)).dropna()
    if len(daily) < 2:
        return None
    first, last = (str(day.date()) for day in (daily.index[0], daily.index[-1]))
    return {
        "rank_ic": float(daily.mean()),
        "sd": float(daily.std()),
        "days": len(daily),
        "first": first,
        "last": last,
    }


def _data_digest(dataset: DatasetH) -> str:
    """Digest the bars or features that the scores are made of."""
    digest = blake2b(digest_size=16)
    if isinstance(dataset, KLineDataset):
        windows = dataset.score_windows("test")
        digest.update(" ".join(windows.instruments).encode())
        digest.update(np.ascontiguousarray(windows.values(np.arange(len(windows)))).tobytes())
        return digest.hexdigest()
    features = dataset.prepare("test", col_set="feature", data_key=DataHandlerLP.DK_I)
    if isinstance(features, pd.DataFrame):
        digest.update(pd.util.hash_pandas_object(features).to_numpy().tobytes())
    return digest.hexdigest()


def _universe(dataset: DatasetH) -> str:
    universe = getattr(dataset.handler, "instruments", None)
    return universe if isinstance(universe, str) else "the universe"


def _names(instruments: Sequence[str]) -> str:
    return ", ".join(instruments[:SHOWN]) + (", …" if len(instruments) > SHOWN else "")


def shown(time: pd.Timestamp) -> str:
    """Return a date, with its time of day where it has one."""
    return str(time).removesuffix(" 00:00:00")
