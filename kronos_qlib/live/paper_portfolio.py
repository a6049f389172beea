"""The paper portfolio: Qlib's own backtest of a run's strategy, exchange and costs on the scores of a ledger."""

import warnings
from collections.abc import Mapping
from typing import Any

import pandas as pd
from qlib.backtest import backtest
from qlib.data import D
from qlib.workflow.record_temp import PortAnaRecord

from kronos_qlib.live.judgement import PaperError

_STOCK = ("qlib.", "kronos_qlib.")  # the modules whose classes a configuration from a database may name


def run_paper_portfolio(config: Mapping[str, Any] | None, scores: pd.Series, freq: str = "day") -> pd.DataFrame:
    """Run the backtest of a PortAnaRecord's configuration on scores (datetime, instrument), in the store Qlib is using.

    It begins with the first date and ends with the session after the last one, at which that one's orders are done, or
    the session before the store's last, where Qlib's backtests must end.

    Returns:
        Qlib's report, a row a day: return, cost, bench, turnover, account and others; ratios.

    Raises:
        PaperError: fewer than two dates can be traded; the benchmark lacks a bar; no configuration, or one that names
            classes outside Qlib, which are not loaded because a database says so; or the backtest fails.
    """
    if not config:
        raise PaperError("the run has no PortAnaRecord")
    _check_stock(config)
    record = PortAnaRecord(None, config=dict(config))  # which has Qlib's defaults
    strategy = record.strategy_config
    if "signal" not in strategy.get("kwargs", {}):
        raise PaperError(f"its strategy {strategy.get('class')} takes no signal")
    first, last = scores.index.unique("datetime").min(), scores.index.unique("datetime").max()
    sessions = pd.DatetimeIndex(D.calendar(freq=freq))
    known = sessions[(sessions >= first) & (sessions < sessions[-1])]
    known = known[: known.searchsorted(last, side="right") + 1]
    if len(known) < 2 or scores.index.unique("datetime").size < 2:
        raise PaperError("it needs two dates, and a session of the store after them")
    _require_benchmark(record.backtest_config.get("benchmark"), known, freq)
    strategy = {**strategy, "kwargs": {**strategy["kwargs"], "signal": scores.to_frame("score")}}
    settings = {**record.backtest_config, "start_time": known[0], "end_time": known[-1]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Qlib, about means of days without a trade
            portfolios, _ = backtest(executor=record.executor_config, strategy=strategy, **settings)
    except Exception as error:  # a strategy, an exchange, a store without a benchmark: anything may be raised
        raise PaperError(f"the backtest fails ({type(error).__name__}: {' '.join(str(error).split())})") from error
    report: pd.DataFrame = next(iter(portfolios.values()))[0]
    return report


def _require_benchmark(benchmark: Any, sessions: pd.DatetimeIndex, freq: str) -> None:
    """Raise PaperError if a benchmark lacks a session's bar, whose return Qlib takes for 0."""
    if freq != "day" or not isinstance(benchmark, str):
        return
    closes = D.features([benchmark], ["$close"], sessions[0], sessions[-1], freq=freq)["$close"].dropna()
    lacking = sessions.difference(closes.index.get_level_values("datetime"))
    if len(lacking):
        raise PaperError(
            f"its benchmark {benchmark} has no bar on {lacking[0].date()} ({len(lacking)} of {len(sessions)} sessions)"
        )


def _check_stock(config: Any) -> None:
    """Raise PaperError for a configuration that would load code or a pickle from elsewhere."""
    if isinstance(config, Mapping):
        for key in ("class", "module_path"):
            named = str(config.get(key) or "")
            if ("." in named or key == "module_path") and named and not named.startswith(_STOCK):
                raise PaperError(f"its configuration names {named}, which is not Qlib's")
        for key in ("strategy", "executor", "exchange"):
            if isinstance(config.get(key), str):
                raise PaperError(f"its {key} {config[key]} is not described but named")
        for value in config.values():
            _check_stock(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _check_stock(value)
    elif isinstance(config, str) and config.startswith("file:"):
        raise PaperError(f"its configuration names the file {config}")
