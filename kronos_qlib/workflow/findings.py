"""Findings of checks of a task: records, strategy, backtest and benchmark that cannot run, segments that overlap."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from qlib.config import C
from qlib.data.data import Cal
from qlib.utils import code_to_fname

from kronos_qlib.data.calendar import is_intraday
from kronos_qlib.data.dataset import KLineDataset

QLIB_BENCHMARK = "SH000300"  # what Qlib takes where a backtest names none
_RECORDS = "qlib.workflow.record_temp"


@dataclass(frozen=True)
class Finding:
    """One line of a check: what was looked at, and what of it will run or is wrong."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str


def segment_overlap(dataset: KLineDataset, earlier: str, later: str) -> str | None:
    """Say that one segment reaches into another that should come after it; None if it does not."""
    if not {earlier, later} <= dataset.segments.keys():
        return None
    end, start = dataset.segments[earlier][1], dataset.segments[later][0]
    last, first = end or dataset.handler.dates[-1], start or dataset.handler.dates[0]
    if last < first:
        return None
    return f"segment {earlier!r} ends on {last.date()}, after {later!r} starts on {first.date()}"


def record_findings(task: Mapping[str, Any]) -> Iterator[Finding]:
    """Find records, strategies and backtests of a task that cannot run; Qlib has to be initialised."""
    given = task.get("record") or []
    records = [_configuration(record) for record in (given if isinstance(given, list) else [given])]
    names = [str(record.get("class")) for record in records]
    for record, name in zip(records, names):
        problem = _import_problem(record, _RECORDS)
        yield Finding("error" if problem else "ok", f"record {name}", problem or "will run")
        if not problem and name.startswith("PortAnaRecord"):
            yield from backtest_findings(record.get("kwargs", {}).get("config") or {})
    if "ForecastRecord" in names and "PortAnaRecord" in names[: names.index("ForecastRecord")]:
        yield Finding(
            "warning",
            "record ForecastRecord",
            "stands after PortAnaRecord: a backtest that fails would leave the forecasts without their measures",
        )


def _configuration(record: Any) -> Mapping[str, Any]:
    """Return a record's configuration; Qlib takes the path of its class for one, too."""
    if isinstance(record, Mapping):
        return record
    place, _, name = str(record).rpartition(".")
    return {"class": name, "module_path": place} if place else {"class": name}


def backtest_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find a strategy, dates, a benchmark or an exchange with which a backtest of Qlib fails."""
    strategy, backtest = config.get("strategy") or {}, config.get("backtest") or {}
    if strategy:
        problem = _import_problem(strategy, "qlib.contrib.strategy")
        yield Finding("error" if problem else "ok", "strategy", problem or str(strategy.get("class")))
    executor = (config.get("executor") or {}).get("kwargs") or {}
    freq = executor.get("time_per_step", "day")
    yield from _date_findings(backtest, freq)
    yield from _benchmark_findings(backtest, freq)
    exchange = backtest.get("exchange_kwargs") or {}
    limit = exchange.get("limit_threshold")
    if isinstance(limit, list) or isinstance(limit, bool):
        yield Finding(
            "error",
            "limit_threshold",
            f"is {limit!r}; Qlib takes a number such as 0.095 or, from Python only, a tuple of two expressions",
        )


def _date_findings(backtest: Mapping[str, Any], freq: str) -> Iterator[Finding]:
    try:
        sessions = pd.DatetimeIndex(Cal.calendar(freq=freq, future=True))
        start = pd.Timestamp(backtest.get("start_time") or sessions[0])
        end = pd.Timestamp(backtest.get("end_time") or sessions[-1])
    except Exception as error:
        yield Finding("error", "backtest", one_line(error))
        return
    if end.normalize() == end and is_intraday(freq):
        end += pd.Timedelta(days=1) - pd.Timedelta(1, "ns")
    within = sessions[(sessions >= start) & (sessions <= end)]
    if not len(within):
        known = f"{sessions[0].date()} … {sessions[-1].date()}"
        yield Finding("error", "backtest", f"{start.date()} … {end.date()} has no session; the store has {known}")
    elif within[-1] == sessions[-1]:
        last = sessions[-2] if len(sessions) > 1 else sessions[-1]
        yield Finding(
            "error",
            "backtest",
            f"end_time {end.date()} reaches the store's last session, {_shown(sessions[-1])}, after which Qlib looks "
            f"for the next one and fails; end it on {_shown(last)} at the latest, or give the store a future calendar",
        )
    else:
        yield Finding("ok", "backtest", f"{within[0].date()} … {within[-1].date()}, {len(within):,} steps of {freq}")


def _shown(session: pd.Timestamp) -> str:
    return str(session).removesuffix(" 00:00:00")


def _benchmark_findings(backtest: Mapping[str, Any], freq: str) -> Iterator[Finding]:
    benchmark = backtest.get("benchmark", QLIB_BENCHMARK)
    if benchmark is None:
        benchmark, named = QLIB_BENCHMARK, f"null, for which Qlib takes {QLIB_BENCHMARK}"
    else:
        named = str(benchmark) if "benchmark" in backtest else f"not named, so Qlib takes {QLIB_BENCHMARK}"
    if not isinstance(benchmark, (str, list)):
        return  # a series of returns, from Python
    folder = Path(C.dpm.get_data_uri(freq)) / "features"
    names = [benchmark] if isinstance(benchmark, str) else benchmark
    absent = [name for name in names if not (folder / code_to_fname(str(name)).lower() / f"close.{freq}.bin").exists()]
    if absent:
        text = f"is {named}; the store has no bars of {absent[0]}: name an instrument of it"
        yield Finding("error", "benchmark", text)
    else:
        yield Finding("ok", "benchmark", named)


def _import_problem(configuration: Any, default_module: str) -> str | None:
    """Say why the class of a configuration cannot be imported; None if it can."""
    if not isinstance(configuration, Mapping) or not isinstance(configuration.get("class"), str):
        return f"should be a configuration with class, module_path and kwargs, not {configuration!r:.80}"
    name, module = configuration["class"], configuration.get("module_path") or default_module
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        return f"{module} has no {name} ({one_line(error)})"
    return None


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, its kind before it where the message alone says little."""
    message = " ".join(str(error).split())
    return message if isinstance(error, (ValueError, OSError)) and message else f"{type(error).__name__}: {message}"
